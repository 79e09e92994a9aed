"""The batches of a run: which images belong to a step and to this process, read ahead by threads.

A step's images, mirrorings and noise are those of the global batch, whatever the number of processes, parts and
threads; a process takes its slice of them.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for
from finectl.errors import UsageError
from finectl.world import World

READ_AHEAD = 2


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

    Raises:
        UsageError: the batch has fewer images than there are shares.
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
    ) -> None:
        if batch_size < world.size * parts:
            raise UsageError(
                f"--batch-size {batch_size} for {world.size} processes with {parts} parts each",
                expected=f"at least {world.size * parts} images; --batch-size counts those of all processes",
            )
        self.data = data
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        self.world = world
        mine = share_of(batch_size, world.rank, world.size)
        cut = [share_of(mine.stop - mine.start, index, parts) for index in range(parts)]
        self.slots = [slice(mine.start + one.start, mine.start + one.stop) for one in cut]
        self._pool = ThreadPoolExecutor(workers, "finectl-read") if workers else None
        self._ahead: dict[int, Future[list[tuple[Tensor, Tensor]]]] = {}

    def indices(self, step: int) -> Tensor:
        """Return the positions of a step's images in the data set, over all processes, (batch_size,)."""
        return batch_indices(len(self.data), self.batch_size, step, self.seed)

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
        noise = self._latent_noise(step)
        parts = []
        for slots, (raw, labels) in zip(self.slots, read, strict=True):
            moved = raw.to(self.device, non_blocking=True)
            x0 = self.data.transform(moved, None if noise is None else noise[slots])
            parts.append(Part(slots, x0, labels.to(self.device, non_blocking=True)))
        return parts

    def _read(self, step: int) -> list[tuple[Tensor, Tensor]]:
        indices = self.indices(step)
        flips = None
        if self.data.flip:
            flips = torch.rand(self.batch_size, generator=generator_for("flip", self.seed, step)) < 0.5
        read = []
        for slots in self.slots:
            mine = indices[slots]
            raw = self.data.read(mine, None if flips is None else flips[slots])
            labels = self.data.labels[mine]
            pinned = self.device.type == "cuda"
            read.append((raw.pin_memory(), labels.pin_memory()) if pinned else (raw, labels))
        return read

    def _latent_noise(self, step: int) -> Tensor | None:
        """Return what turns stored means and variances of latents into draws, (batch_size, C, H, W)."""
        if not self.data.sampled:
            return None
        info = self.data.info
        shape = (self.batch_size, info.channels, info.image_size, info.image_size)
        generator = generator_for("latents", self.seed, step, device=self.device)
        return torch.randn(shape, generator=generator, device=self.device)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
