"""The batches of a run: which images belong to a step and to this process, read ahead by threads.

A step's images, mirrorings and noise are those of the global batch, whatever the number of processes, parts and
threads; a process takes its slice of them. A batch may mix two sets: the first places are then those of the retained
one, which has an order, mirrorings and noise of its own.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for
from finectl.errors import UsageError
from finectl.world import World

READ_AHEAD = 2
Piece = tuple[int, Tensor, Tensor]
"""Of which set it is, images as they are stored, and their labels, on the CPU."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a batch, on the device.

    Args:
        slots: Its place in the global batch.
        x0: (b, C, H, W), float32, the images.
        labels: (b,), int64.
    """

    slots: slice
    x0: Tensor
    labels: Tensor


def share_of(count: int, index: int, parts: int) -> slice:
    """Return the index-th of `parts` nearly equal slices of 0..count-1."""
    return slice(count * index // parts, count * (index + 1) // parts)


@dataclass(frozen=True, eq=False)
class Retained:
    """Images of a second set that take part in every batch, in its first places.

    Args:
        images: The set; its labels are what the model is given.
        count: How many of them a batch has, over all processes; at least 1, less than the batch size.
    """

    images: ImageSet
    count: int


@dataclass(frozen=True, eq=False)
class _Share:
    """What one set gives to every batch: `count` consecutive places from `first` on.

    Args:
        images: The set.
        first: Its first place in the global batch.
        count: Its images of a step.
        seed: Seed of the run.
        stream: Keeps its random numbers apart from those of the other set; empty for the data itself.
    """

    images: ImageSet
    first: int
    count: int
    seed: int
    stream: str = ""

    @cached_property
    def order(self) -> int:
        """Seed of the order."""
        return generator_for(f"order{self.stream}", self.seed).initial_seed() if self.stream else self.seed

    def indices(self, step: int) -> Tensor:
        """Return the positions of a step's images in the set, (count,)."""
        return batch_indices(len(self.images), self.count, step, self.order)

    def flips(self, step: int) -> Tensor | None:
        """Return which of a step's images to mirror, (count,), bool; None for none."""
        if not self.images.flip:
            return None
        return torch.rand(self.count, generator=generator_for(f"flip{self.stream}", self.seed, step)) < 0.5

    def latent_noise(self, step: int, device: torch.device) -> Tensor | None:
        """Return what turns stored means and variances of latents into draws, (count, C, H, W)."""
        if not self.images.sampled:
            return None
        generator = generator_for(f"latents{self.stream}", self.seed, step, device=device)
        return torch.randn((self.count, *self.images.shape), generator=generator, device=device)

    def within(self, slots: slice) -> slice:
        """Return which of its images lie in a slice of the global batch; an empty slice for none."""
        start, stop = (min(max(edge - self.first, 0), self.count) for edge in (slots.start, slots.stop))
        return slice(start, stop)


class Batches:
    """Reads the batches of successive steps.

    Args:
        data: The training images.
        batch_size: Images of a step, over all processes.
        seed: Seed of order, mirroring and latent noise.
        device: Where the images are to be.
        world: The processes that share a batch.
        parts: Into how many parts this process cuts its share.
        workers: Threads that read ahead; 0 reads when asked.
        retained: Images of a second set in the first places of every batch; None for none.

    Raises:
        UsageError: the batch has fewer images than there are shares, or leaves none to one of the sets.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        seed: int,
        device: torch.device,
        world: World,
        *,
        parts: int = 1,
        workers: int = 0,
        retained: Retained | None = None,
    ) -> None:
        if batch_size < world.size * parts:
            raise UsageError(
                f"--batch-size {batch_size} for {world.size} processes with {parts} parts each",
                expected=f"at least {world.size * parts} images; --batch-size counts those of all processes",
            )
        first = retained.count if retained else 0
        if retained and not 0 < first < batch_size:
            raise UsageError(
                f"{first} retained images in a batch of {batch_size}", expected=f"between 1 and {batch_size - 1}"
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.world = world
        self._new = _Share(data, first, batch_size - first, seed)
        self._again = _Share(retained.images, 0, first, seed, "-retained") if retained else None
        self._shares = [self._again, self._new] if self._again else [self._new]
        mine = share_of(batch_size, world.rank, world.size)
        cut = [share_of(mine.stop - mine.start, index, parts) for index in range(parts)]
        self.slots = [slice(mine.start + one.start, mine.start + one.stop) for one in cut]
        self._pool = ThreadPoolExecutor(workers, "finectl-read") if workers else None
        self._ahead: dict[int, Future[list[list[Piece]]]] = {}

    def indices(self, step: int) -> Tensor:
        """Return the positions of a step's images in the data set, over all processes, without retained ones."""
        return self._new.indices(step)

    def retained_indices(self, step: int) -> Tensor:
        """Return the positions of a step's retained images in their set, over all processes."""
        return self._again.indices(step) if self._again else torch.zeros(0, dtype=torch.int64)

    def get(self, step: int) -> list[Part]:
        """Return this process's parts of a step's batch; the next steps are read meanwhile."""
        if self._pool is None:
            read = self._read(step)
        else:
            for wanted in range(step, step + 1 + READ_AHEAD):
                if wanted not in self._ahead:
                    self._ahead[wanted] = self._pool.submit(self._read, wanted)
            self._ahead = {key: future for key, future in self._ahead.items() if key >= step}
            read = self._ahead.pop(step).result()
        noises = [share.latent_noise(step, self.device) for share in self._shares]
        parts = []
        for slots, pieces in zip(self.slots, read, strict=True):
            x0, labels = [], []
            for index, raw, marks in pieces:
                share, noise = self._shares[index], noises[index]
                moved = raw.to(self.device, non_blocking=True)
                x0.append(share.images.transform(moved, None if noise is None else noise[share.within(slots)]))
                labels.append(marks.to(self.device, non_blocking=True))
            parts.append(Part(slots, _joined(x0), _joined(labels)))
        return parts

    def _read(self, step: int) -> list[list[Piece]]:
        """Return what is stored of each part, set by set, in the order of their places."""
        read: list[list[Piece]] = [[] for _ in self.slots]
        pinned = self.device.type == "cuda"
        for index, share in enumerate(self._shares):
            indices, flips = share.indices(step), share.flips(step)
            for slots, pieces in zip(self.slots, read, strict=True):
                places = share.within(slots)
                if places.start == places.stop:
                    continue
                mine = indices[places]
                raw = share.images.read(mine, None if flips is None else flips[places])
                labels = share.images.labels[mine]
                pieces.append((index, raw.pin_memory(), labels.pin_memory()) if pinned else (index, raw, labels))
        return read

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
