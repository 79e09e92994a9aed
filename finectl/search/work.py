"""The loop around a search: ask, claim, measure, append, until the best few are re-scored.

Any number of processes run it on one journal at once, on one machine or on several that share a file system.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from finectl.search.base import Ask, Measured, Search
from finectl.search.final import RESCORED, rescore
from finectl.search.journal import Journal

PAUSE_S = 2.0


def work(
    search: Search,
    journal: Journal,
    measure: Callable[[Ask], Measured],
    *,
    rescored: int = RESCORED,
    pause_s: float = PAUSE_S,
) -> list[Measured]:
    """Measure until the search is finished, and return the history; what the journal holds is not measured again.

    A measurement that fails or is interrupted is not lost to the search: its claim is released for the next run.

    Args:
        search: The strategy.
        journal: What has been measured, shared by all who work on the search.
        measure: Makes one measurement.
        rescored: Candidates measured again on fresh noise at the end.
        pause_s: Seconds between two looks at the journal while others make all that is asked.
    """
    while True:
        history = journal.history()
        asks = search.ask(history) or rescore(history, rescored)
        if not asks:
            return history
        mine = next((ask for ask in asks if journal.claim(ask)), None)
        if mine is None:
            time.sleep(pause_s)
            continue
        try:
            measured = measure(mine)
        except BaseException:
            journal.release(mine)
            raise
        journal.append(measured)
