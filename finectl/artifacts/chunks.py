"""Rows of tensors on disk, a file a chunk: how processes share the making of them, and how interrupted work goes on.

Every chunk is made from its number alone and written atomically, so it does not matter who makes it or when: a process
takes every N-th, and leaves out those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import Job
from finectl.artifacts.tensors import check_header, load_tensors, save_tensors
from finectl.console import Progress
from finectl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_IMAGES = 256
MARK = "begun"


class Chunks:
    """The rows of a set of images on disk, in files of `size` images.

    Args:
        directory: Where the files are.
        name: What their names begin with; it says of which images and networks they are.
        count: Images in all.
        size: Images a file.
    """

    def __init__(self, directory: Path, name: str, count: int, size: int) -> None:
        self.directory = directory
        self.name = name
        self.count = count
        self.size = size

    @property
    def firsts(self) -> list[int]:
        """The first image of each file."""
        return list(range(0, self.count, self.size))

    def file(self, first: int) -> Path:
        """Return the file whose first image this is."""
        return self.directory / f"{self.name}-{self.size}-{first}.safetensors"

    def has(self, first: int) -> bool:
        """Tell whether a file is there, whole by its header; one that is not is made again."""
        try:
            check_header(self.file(first))
        except InputError:
            return False
        return True

    def span(self, first: int) -> range:
        """Return the images of a file."""
        return range(first, min(first + self.size, self.count))

    def save(self, first: int, rows: Mapping[str, Tensor]) -> None:
        """Write a file, atomically."""
        self.directory.mkdir(parents=True, exist_ok=True)
        save_tensors(self.file(first), rows)

    def load(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Return the rows of all files, in order."""
        import torch

        parts: dict[str, list[Tensor]] = {}
        for first in self.firsts:
            for name, rows in load_tensors(self.file(first), wanted=wanted).items():
                parts.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}


@dataclass(frozen=True)
class Shares:
    """This process's part of the chunks of a run."""

    job: Job[Any]

    def check(self) -> None:
        """Stop when a signal asked for it; finished chunks are kept."""
        self.job.stop_if_requested(_keep if (self.job.state / MARK).exists() else None)

    def mine(self, chunks: Chunks, progress: Progress) -> Iterator[range]:
        """Give the images of each chunk of this process that is not there yet."""
        world = self.job.world
        for first in chunks.firsts[world.rank :: world.size]:
            span = chunks.span(first)
            if chunks.has(first):
                self.mark()
                progress.advance(len(span))
            else:
                yield span

    def keep(self, chunks: Chunks, span: range, rows: Mapping[str, Tensor], progress: Progress | None = None) -> None:
        """Write a finished chunk, and count its images where that was not done while it was made."""
        chunks.save(span.start, rows)
        self.mark()
        if progress is not None:
            progress.advance(len(span), samples=len(span))

    def mark(self) -> None:
        """Remember that something is saved; until then an interrupted run has nothing to go on from."""
        self.job.state.mkdir(exist_ok=True)
        (self.job.state / MARK).touch()


def _keep() -> None:
    """Nothing is left to save: each finished chunk is in its place already."""
