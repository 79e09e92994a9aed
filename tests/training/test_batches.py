"""Batches: the same images, mirrorings and draws however they are shared, cut and read."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from fitting import images

from finectl.data.dataset import ImageSet
from finectl.data.order import batch_indices
from finectl.errors import UsageError
from finectl.training.batches import Batches, Part, share_of
from finectl.world import World

BATCH, SEED, CPU = 12, 3, torch.device("cpu")


class Moments:
    """Latents of two channels: mean i, standard deviation 1, and minus i where mirrored."""

    sampled = True
    labels = torch.arange(40) % 10

    def read(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
        mean = indices.float()
        mean = mean if flips is None else torch.where(flips, -mean, mean)
        return torch.cat([mean.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.zeros(len(indices), 1, 8, 8)], dim=1)

    def transform(self, raw: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return raw[:, :1] + (0 if noise is None else noise)


def latents() -> ImageSet:
    return ImageSet(images().info, "train", Moments(), torch.arange(40), flip=True)


def all_parts(data: ImageSet, size: int, cut: int, workers: int, steps: range) -> list[Part]:
    """Return what all processes together see of each step, joined in the order of the slots."""
    joined = []
    for step in steps:
        parts = []
        for rank in range(size):
            with Batches(data, BATCH, SEED, CPU, World(rank, size), parts=cut, workers=workers) as batches:
                parts += batches.get(step)
        slots = [index for part in parts for index in range(part.slots.start, part.slots.stop)]
        assert slots == list(range(BATCH))
        x0 = torch.cat([part.x0 for part in parts])
        joined.append(Part(slice(0, BATCH), x0, torch.cat([part.labels for part in parts])))
    return joined


@pytest.mark.parametrize(("size", "cut", "workers"), [(2, 1, 0), (1, 3, 0), (5, 2, 0), (1, 1, 2), (3, 2, 1)])
@pytest.mark.parametrize("make", [images, latents])
def test_sharing_changes_nothing(make: Any, size: int, cut: int, workers: int) -> None:
    data = make()
    for one, other in zip(
        all_parts(data, 1, 1, 0, range(5)), all_parts(data, size, cut, workers, range(5)), strict=True
    ):
        assert torch.equal(one.x0, other.x0) and torch.equal(one.labels, other.labels)


def test_a_batch_is_that_of_the_order() -> None:
    data = images()
    with Batches(data, BATCH, SEED, CPU, World()) as batches:
        (part,) = batches.get(4)
    indices = batch_indices(len(data), BATCH, 4, SEED)
    assert torch.equal(part.x0, data.images[indices]) and torch.equal(part.labels, data.labels[indices])


def test_mirroring_is_drawn_anew_for_half_of_the_images() -> None:
    data = replace(images(), flip=True)
    with Batches(data, BATCH, SEED, CPU, World()) as batches, Batches(images(), BATCH, SEED, CPU, World()) as plain:
        mirrored = []
        for step in range(30):
            one, other = batches.get(step)[0].x0, plain.get(step)[0].x0
            is_same = (one == other).flatten(1).all(1)
            is_mirrored = (one == other.flip(-1)).flatten(1).all(1)
            assert bool((is_same | is_mirrored).all())
            mirrored.append(~is_same)
    share = float(torch.stack(mirrored).float().mean())
    assert 0.4 < share < 0.6
    assert not all(torch.equal(mirrored[0], other) for other in mirrored)


def test_latents_are_drawn_anew_in_every_step() -> None:
    data = replace(latents(), flip=False)
    with Batches(data, 40, SEED, CPU, World()) as batches:
        noise = [batches.get(step)[0].x0 - batches.indices(step).view(-1, 1, 1, 1) for step in range(3)]
    assert not torch.allclose(noise[0], noise[1])
    assert abs(float(torch.stack(noise).std()) - 1) < 0.05


def test_reading_ahead_goes_on_from_any_step_and_ends() -> None:
    with (
        Batches(images(), BATCH, SEED, CPU, World(), workers=2) as ahead,
        Batches(images(), BATCH, SEED, CPU, World()) as plain,
    ):
        for step in (7, 8, 9, 3, 4):  # a run goes back when a loss is not finite
            assert torch.equal(ahead.get(step)[0].x0, plain.get(step)[0].x0)
        assert any(thread.name.startswith("finectl-read") for thread in threading.enumerate())
    assert not any(thread.name.startswith("finectl-read") for thread in threading.enumerate())


def test_a_batch_smaller_than_its_shares() -> None:
    with pytest.raises(UsageError, match="--batch-size 3 for 2 processes with 2 parts"):
        Batches(images(), 3, SEED, CPU, World(0, 2), parts=2)
    assert [share_of(7, index, 3) for index in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 7)]
