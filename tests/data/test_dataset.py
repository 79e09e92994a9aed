"""One split of a data set: reading, mirroring, and what the parts share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataOptions

FLIP = DataOptions(flip=True)


@pytest.fixture(params=["digits", "folder"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A data set in memory, and one in a mapped file."""
    if request.param == "digits":
        return "digits"
    noise = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return f"folder:{tmp_path}"


def test_what_is_read_and_transformed_is_the_image(spec: str) -> None:
    data = load(spec)
    positions = torch.tensor([5, 0, 5, len(data) - 1])
    raw = data.read(positions)
    assert raw.dtype == torch.uint8
    assert tuple(raw.shape[1:]) == data.shape
    assert torch.equal(data.transform(raw), data.images[positions])
    assert data.transform(raw).dtype == torch.float32
    assert not data.sampled
    assert torch.equal(data.labels, data.store.labels[data.indices])


def test_only_chosen_images_are_mirrored(spec: str) -> None:
    data = load(spec)
    positions = torch.arange(6)
    flips = torch.tensor([True, False, False, True, True, False])
    plain, mirrored = data.read(positions), data.read(positions, flips)
    assert torch.equal(mirrored[flips], plain[flips].flip(-1))
    assert torch.equal(mirrored[~flips], plain[~flips])
    assert not torch.equal(mirrored, plain)
    assert torch.equal(data.read(positions), plain)


def test_only_the_training_split_may_be_mirrored(spec: str) -> None:
    assert load(spec, "train", options=FLIP).flip
    assert not load(spec, "heldout", options=FLIP).flip
    assert not load(spec).flip


def test_writing_into_a_batch_changes_nothing(spec: str) -> None:
    data = load(spec)
    before = data.read(torch.arange(3)).clone()
    data.read(torch.arange(3)).zero_()
    assert torch.equal(data.read(torch.arange(3)), before)


def test_several_threads_may_read(spec: str) -> None:
    data = load(spec)
    expected = data.read(torch.arange(len(data)))
    batches = [torch.randint(0, len(data), (7,)) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for batch, raw in zip(batches, pool.map(data.read, batches), strict=True):
            assert torch.equal(raw, expected[batch])


def test_a_subset_reads_its_own_images(spec: str) -> None:
    data = load(spec)
    part = data.subset(9, seed=1)
    assert torch.equal(part.images, data.images[torch.isin(data.indices, part.indices)])
    assert torch.equal(part.read(torch.tensor([8]))[0], part.read(torch.arange(9))[8])
    assert len(part.labels) == 9


def test_a_few_images_of_each_class(spec: str) -> None:
    data = load(spec)
    few, fewer = data.few(3, seed=1), data.few(2, seed=1)
    sizes = data.labels.bincount()
    assert torch.equal(few.labels.bincount(minlength=len(sizes)), sizes.clamp(max=3))
    assert set(fewer.indices.tolist()) < set(few.indices.tolist()) <= set(data.indices.tolist())
    assert not torch.equal(few.indices, data.few(3, seed=2).indices)


def test_a_position_outside_is_an_error(spec: str) -> None:
    data = load(spec)
    with pytest.raises(IndexError):
        data.read(torch.tensor([len(data)]))


def test_images_at_hand_make_a_set() -> None:
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    data = ImageSet.in_memory(load("digits").info, "train", images, torch.arange(4))
    assert torch.equal(data.images, images)
    assert torch.equal(replace(data, indices=torch.tensor([2])).images, images[2:3])
