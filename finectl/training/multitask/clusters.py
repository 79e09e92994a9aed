"""Clusters of timesteps: uniform intervals that a batch is shared among."""

from __future__ import annotations

import torch
from torch import Tensor

from finectl.diffusion.ranges import equal_ranges
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import UsageError
from finectl.training.batches import Batches, Part


class Stratified:
    """Timesteps of which each of k uniform intervals holds equally many, uniform within it.

    Image b of a batch belongs to interval b mod k, so that every process and every part of a batch has images of all.

    Args:
        clusters: k, a divisor of the batch size.
    """

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters

    def __call__(self, count: int, schedule: NoiseSchedule, *, step: int, generator: torch.Generator) -> Tensor:
        """Return the timesteps of a batch, (count,), as `finectl.training.run.Timesteps` says."""
        device = generator.device
        bounds = torch.tensor(equal_ranges(len(schedule), self.clusters), device=device)  # (k, 2)
        first, last = bounds[torch.arange(count, device=device) % self.clusters].unbind(1)  # (count,)
        share = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        return first + (share * (last - first + 1)).long()


def require_all_in_each(batches: Batches, clusters: int) -> None:
    """Check that every part of a batch has images of all clusters: the gradient of each comes from all parts.

    Raises:
        UsageError: a part is smaller than the number of clusters.
    """
    world, parts = batches.world.size, len(batches.slots)
    smallest = batches.batch_size // world // parts
    if smallest < clusters:
        raise UsageError(
            f"--batch-size {batches.batch_size} for {world} processes with {parts} parts each gives parts of "
            f"{smallest} images, and the gradients of {clusters} timestep clusters are taken apart in each of them",
            expected=f"at least {clusters * world * parts} images",
            fix="a larger --batch-size, fewer processes, or a smaller --accumulate",
        )


def of_cluster(part: Part, cluster: int, clusters: int) -> Part:
    """Return the images of a part that belong to one cluster."""
    first = part.slots.start + (cluster - part.slots.start) % clusters
    mine = slice(first - part.slots.start, None, clusters)
    return Part(slice(first, part.slots.stop, clusters), part.x0[mine], part.labels[mine])


def sums_by_cluster(losses: Tensor, slots: Tensor, clusters: int) -> Tensor:
    """Return the sum of the losses of each cluster's images, (k,), float64.

    Args:
        losses: (b,).
        slots: (b,), int64, the places of their images in the global batch.
        clusters: k.
    """
    mine = slots % clusters == torch.arange(clusters, device=slots.device)[:, None]  # (k, b)
    return torch.where(mine, losses.double(), 0.0).sum(1)
