"""Fixed noised batches: the same for the same seed, of other images for each batch."""

from __future__ import annotations

import torch

from finectl.data.dataset import load
from finectl.training.probe import Probe, probes


def drawn(purpose: str = "test", seed: int = 0) -> list[Probe]:
    data = load("digits", "train")
    device = torch.device("cpu")
    return list(probes(data, purpose, batches=3, batch_size=5, timesteps=1000, seed=seed, device=device))


def same(one: Probe, other: Probe) -> list[bool]:
    return [torch.equal(*pair) for pair in zip(one, other, strict=True)]


def test_batches_are_fixed_and_differ_from_each_other() -> None:
    first = drawn()
    assert len(first) == 3 and [list(part.shape) for part in first[0]] == [[5, 1, 8, 8], [5], [5], [5, 1, 8, 8]]
    assert all(all(same(*pair)) for pair in zip(first, drawn(), strict=True))
    assert not any(same(first[0], first[1])[index] for index in (0, 2, 3))
    assert not any(same(first[0], drawn(seed=1)[0])[index] for index in (0, 2, 3))
    other = same(first[0], drawn("other")[0])
    assert other == [True, True, False, False], "the same images with other noise"
    data = load("digits", "train")
    row = int((data.images == first[0].x0[0]).flatten(1).all(1).nonzero()[0])
    assert int(data.labels[row]) == int(first[0].y[0]), "labels go with their images"
