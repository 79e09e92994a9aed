"""How processes share the chunks of an evaluation, and how interrupted work finds them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from finectl.artifacts.job import Job
from finectl.console import Progress
from finectl.metrics.extraction import Chunks
from finectl.stages.evaluate.config import Config

CHUNK_IMAGES = 256
MARK = "begun"


@dataclass(frozen=True)
class Shares:
    """This process's part of the chunks of a run."""

    job: Job[Config]

    def check(self) -> None:
        """Stop when a signal asked for it; finished chunks are kept."""
        self.job.stop_if_requested(_keep if (self.job.state / MARK).exists() else None)

    def mine(self, chunks: Chunks, progress: Progress) -> Iterator[range]:
        """Give the images of each chunk of this process that is not there yet."""
        world = self.job.world
        for first in chunks.firsts[world.rank :: world.size]:
            span = chunks.span(first)
            if chunks.file(first).exists():
                progress.advance(len(span))
            else:
                yield span

    def keep(self, chunks: Chunks, span: range, rows: Mapping[str, Tensor], progress: Progress) -> None:
        """Write a finished chunk."""
        chunks.save(span.start, rows)
        self.mark()
        progress.advance(len(span), samples=len(span))

    def mark(self) -> None:
        """Remember that something is saved; until then an interrupted run has nothing to go on from."""
        self.job.state.mkdir(exist_ok=True)
        (self.job.state / MARK).touch()


def _keep() -> None:
    """Nothing is left to save: each finished chunk is in the state already."""
