"""Work on many images by several threads, its results in order, its progress shown when it takes long. No torch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

from finectl.console import Console, Progress
from finectl.data.sources import DataOptions

CHUNK = 8
MAX_WORKERS = 32
PATIENCE_S = 2.0

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Sequence[Item], work: Callable[[Item], Result], options: DataOptions, stage: str
) -> Iterator[Result]:
    """Apply `work` to every item and give the results in the items' order; few are kept waiting at a time.

    Args:
        items: What to work on.
        work: Called by several threads at once.
        options: Its console shows the progress of work that takes more than 2 seconds; its check may end it.
        stage: What the progress is called.
    """
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)

    def chunk(start: int) -> list[Result]:
        return [work(item) for item in items[start : start + CHUNK]]

    waiting: deque[Future[list[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        with Patience(options.console or Console(), stage, len(items)) as patience:
            starts = iter(range(0, len(items), CHUNK))
            for start in starts:
                waiting.append(pool.submit(chunk, start))
                if len(waiting) > 2 * workers:
                    break
            while waiting:
                results = waiting.popleft().result()
                for start in starts:
                    waiting.append(pool.submit(chunk, start))
                    break
                patience.advance(len(results))
                if options.check is not None:
                    options.check()
                yield from results
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Patience:
    """The progress of work that is often quick: nothing is shown in its first 2 seconds."""

    def __init__(self, console: Console, stage: str, total: int) -> None:
        self._console, self._stage, self._total = console, stage, total
        self._done = 0
        self._start_s = time.monotonic()
        self._shown: Progress | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Patience:
        self._exit.__enter__()
        return self

    def advance(self, count: int) -> None:
        """Count work done."""
        self._done += count
        if self._shown is not None:
            self._shown.advance(count, samples=count)
        elif time.monotonic() - self._start_s > PATIENCE_S:
            progress = self._console.progress(self._stage, self._total, "image", self._done)
            self._shown = self._exit.enter_context(progress)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.__exit__(kind, error, trace)
