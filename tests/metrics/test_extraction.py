"""From images to rows of features: the same rows however the work is cut, and a word for what is not finite."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from finectl.artifacts.chunks import Chunks
from finectl.data.files import open_files
from finectl.data.sources import DataOptions
from finectl.errors import ComputationError
from finectl.metrics.extraction import GROUP, IDENTITY, FeatureExtraction, canonical_order, identity
from finectl.metrics.features import ExtractorInfo


class Means:
    """A network of no weights: means and maxima of the colours."""

    info = ExtractorInfo("means", "0" * 64, "none", "")
    outputs: ClassVar = {"features": 3, "logits": 3}

    def __init__(self, batch_size: int = 4) -> None:
        self.batch_size = batch_size
        self.batches: list[int] = []

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        return torch.from_numpy(image.astype(np.float32).mean(axis=(0, 1)))

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        self.batches.append(len(batch))
        return {name: batch * (2 if name == "logits" else 1) for name in wanted}


def pictures(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 6, 3), dtype=np.uint8)


def extract(images: npt.NDArray[np.uint8], network: Any = None, workers: int = 2, **options: Any) -> dict[str, Tensor]:
    network = network or Means()
    with FeatureExtraction({"means": network}, {"means": ("features",)}, workers) as extraction:
        return extraction.extract(lambda index: images[index], len(images), **options)


def test_every_image_gets_its_row_in_order() -> None:
    images = pictures(2 * GROUP + 3)
    rows = extract(images)
    assert set(rows) == {"means/features", IDENTITY}
    expected = torch.from_numpy(images.astype(np.float32).mean(axis=(1, 2)))
    torch.testing.assert_close(rows["means/features"], expected)


def test_a_network_sees_full_batches_only() -> None:
    network = Means(batch_size=4)
    assert len(extract(pictures(6), network)["means/features"]) == 6
    assert network.batches == [4, 4], "the last batch is padded, so that rounding depends on nothing"


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_change_nothing(workers: int) -> None:
    images = pictures(50)
    one, other = extract(images), extract(images, workers=workers)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_images_give_no_rows() -> None:
    assert extract(pictures(0)) == {}


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(Means):
        def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
            return {name: torch.full((len(batch), 3), torch.nan) for name in wanted}

    with pytest.raises(ComputationError, match="not finite"):
        extract(pictures(3), Broken())


def test_work_stops_between_batches() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    network = Means()
    with pytest.raises(KeyboardInterrupt):
        extract(pictures(9), network, check=stop)
    assert network.batches == []


def test_an_image_is_known_by_its_pixels_and_its_shape() -> None:
    image = pictures(1)[0]
    assert identity(image) == identity(image.copy()) != identity(image[:, ::-1])
    assert identity(image.reshape(6, 5, 3)) != identity(image)


def test_the_same_pixels_in_other_files_are_the_same_image(tmp_path: Path) -> None:
    image, other = pictures(2)
    for name, levels in (("a.png", image), ("b.bmp", image), ("z.png", other)):
        Image.fromarray(levels).save(tmp_path / name)
    files = open_files(str(tmp_path), DataOptions())
    first, copy, third = (identity(files.read(index)) for index in range(3))
    assert first == copy != third


def test_the_canonical_order_does_not_depend_on_the_given_one() -> None:
    rows = extract(pictures(40))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    first = rows["means/features"][canonical_order(rows[IDENTITY])]
    second = rows["means/features"][shuffled][canonical_order(rows[IDENTITY][shuffled])]
    assert torch.equal(first, second) and not torch.equal(first, rows["means/features"])


def chunks_of(images: npt.NDArray[np.uint8], folder: Path, size: int) -> Chunks:
    chunks = Chunks(folder, "row0", len(images), size)
    for first in reversed(chunks.firsts):
        span = chunks.span(first)
        chunks.save(first, extract(images[span.start : span.stop]))
    return chunks


def test_chunks_give_all_rows_whatever_their_size(tmp_path: Path) -> None:
    images = pictures(11)
    whole = extract(images)
    for size in (1, 4, 11, 100):
        loaded = chunks_of(images, tmp_path / str(size), size).load()
        assert all(torch.equal(whole[name], loaded[name]) for name in whole)
    wanted: Callable[[str], bool] = lambda name: name == IDENTITY  # noqa: E731
    assert set(chunks_of(images, tmp_path / "some", 4).load(wanted)) == {IDENTITY}
