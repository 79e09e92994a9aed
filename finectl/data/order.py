"""The order in which training sees a data set: a pure function of (seed, step), so that a resumed run sees the same."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from finectl.errors import InputError, UsageError


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> torch.Tensor:
    """Return which images one step trains on.

    The stream of samples is one permutation of the data set after another. Sample p of the stream belongs to epoch
    p // count, whose permutation depends on (seed, epoch) alone; step s takes samples s * batch_size onwards. A batch
    may cross an epoch's end, and the batch size changes nothing about the stream.

    Args:
        count: Images in the data set, at least 1.
        batch_size: Images a step, at least 1; it may exceed `count`.
        step: Step, counted from 0.
        seed: Seed of the run.

    Returns:
        int64 tensor (batch_size,) of indices 0..count-1.

    Raises:
        InputError: the data set is empty.
        UsageError: the batch size is below 1 or the step is negative.
    """
    if count < 1:
        raise InputError(f"the data set holds {count} images", expected="at least 1 image")
    if batch_size < 1 or step < 0:
        raise UsageError(f"batch size {batch_size}, step {step}", expected="a batch size of at least 1, a step from 0")
    position, end = step * batch_size, (step + 1) * batch_size
    parts = []
    while position < end:
        epoch, offset = divmod(position, count)
        taken = min(count - offset, end - position)
        parts.append(epoch_permutation(count, epoch, seed)[offset : offset + taken])
        position += taken
    return torch.cat(parts)  # (batch_size,), never a view of the cached permutation


@lru_cache(maxsize=4)
def epoch_permutation(count: int, epoch: int, seed: int) -> torch.Tensor:
    """Return the order of one epoch, an int64 tensor (count,); it is cached and must not be written to."""
    # A hash keeps (seed, epoch) pairs apart: seed + epoch would give epoch 1 of seed 0 the order of epoch 0 of seed 1.
    digest = hashlib.sha256(f"order:{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(count, generator=generator)
