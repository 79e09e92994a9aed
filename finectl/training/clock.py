"""Wall seconds of a run over all its resumptions, and what they decide: when to save and when to leave."""

from __future__ import annotations

import time

from finectl.artifacts.job import Execution


class Clock:
    """Measures a run.

    Args:
        before_s: Seconds of work of earlier runs.
        execution: When to save and when to leave.
    """

    def __init__(self, before_s: float, execution: Execution) -> None:
        self._before_s = before_s
        self._execution = execution
        self._start_s = self._saved_s = time.monotonic()

    def seconds(self) -> float:
        """Return the seconds of work so far, over all runs."""
        return self._before_s + time.monotonic() - self._start_s

    def saved(self) -> None:
        """Note that the state has just been saved."""
        self._saved_s = time.monotonic()

    def is_time_to_save(self, step: int) -> bool:
        """Tell whether the state is to be saved after this step."""
        if self._execution.save_every:
            return step % self._execution.save_every == 0
        return time.monotonic() - self._saved_s >= 60 * self._execution.save_minutes

    def is_over(self) -> bool:
        """Tell whether this run has worked as long as it may."""
        limit_s = 60 * self._execution.max_minutes
        return limit_s > 0 and time.monotonic() - self._start_s >= limit_s
