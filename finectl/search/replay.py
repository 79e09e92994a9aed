"""Strategies written as what they are, rounds of measurements one after another, and replayed from a history.

A strategy's `rounds` yields batches and receives their measurements. Run again over a history it takes the same
decisions up to the first batch that is not complete: that is how `ask` is a function of the history although the
strategy reads like a loop. The order in which a batch was measured, and by whom, plays no part.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence

from finectl.search.base import Ask, Measured, Options, Space, first_of_each

Rounds = Generator[list[Ask], list[Measured], None]


class Replayed(ABC):
    """A search by rounds.

    Args:
        space: The candidates.
        options: What every strategy is told.
    """

    def __init__(self, space: Space, options: Options) -> None:
        self.space = space
        self.options = options
        # Where the last replay stopped, so that a history that only grew is not replayed from its beginning.
        self._live: Rounds | None = None
        self._pending: list[Ask] | None = None
        self._answers: list[Measured] = []

    @abstractmethod
    def rounds(self) -> Rounds:
        """Yield each batch, receive its measurements in the same order, return when the search is finished."""

    @abstractmethod
    def candidates(self) -> tuple[int, int]:
        """Return the least and the most full measurements that the search makes, before any re-scoring."""

    def ask(self, history: Sequence[Measured]) -> list[Ask]:
        """Return what to measure next; nothing when the search is finished."""
        known = first_of_each(history)
        if self._live is None or any(known.get(answer.ask) != answer for answer in self._answers):
            self._answers = []
            self._live = self.rounds()
            self._pending = next(self._live, None)
        while self._pending is not None:
            missing = [ask for ask in self._pending if ask not in known]
            if missing:
                return missing
            answers = [known[ask] for ask in self._pending]
            self._answers += answers
            try:
                self._pending = self._live.send(answers)
            except StopIteration:
                self._pending = None
        return []
