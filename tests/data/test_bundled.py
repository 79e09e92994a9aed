"""The bundled sets, the table of sources, the split and balanced subsets."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from finectl.data import digits, photos, sources
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataInfo, DataOptions, absolute_spec, describe, heldout_size, split_indices
from finectl.errors import InputError, UsageError

ROOT = Path(__file__).resolve().parents[2]
needs_skimage = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")


@needs_skimage
def test_describing_a_bundled_set_imports_nothing_heavy() -> None:
    code = """
import sys
from finectl.data.sources import SOURCES, describe
print(list(SOURCES)[:5], describe("digits").count, describe("photos").count)
print(sorted({"torch", "numpy", "PIL", "sklearn", "skimage", "scipy"} & set(sys.modules)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.splitlines() == ["['digits', 'photos', 'folder', 'latents', 'hf'] 1797 1026", "[]"]


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    reference = datasets.load_digits()
    for split, indices in zip(
        ("train", "heldout"), split_indices(describe("digits").fingerprint, digits.COUNT), strict=True
    ):
        data = load("digits", split)
        assert torch.equal((data.images[:, 0] + 1) * 8, torch.tensor(reference.images[indices], dtype=torch.float32))
        assert torch.equal(data.labels, torch.tensor(reference.target[indices]))
        assert data.images.dtype == torch.float32
        assert data.labels.dtype == torch.int64


def test_digits_description_fits_what_is_loaded() -> None:
    info = describe("digits")
    train, heldout = load("digits"), load("digits", "heldout")
    assert (len(train), len(heldout)) == (info.train_count, info.heldout_count) == (1438, 359)
    assert info.fingerprint == hashlib.sha256(digits.data_file().read_bytes()).hexdigest()
    assert tuple(train.images.shape[1:]) == (info.channels, info.image_size, info.image_size) == (1, 8, 8)
    assert (train.images.min(), train.images.max()) == (-1, 1)
    assert info.bundled
    assert describe("digits", 8) == info


@needs_skimage
def test_photos_description_fits_what_is_loaded() -> None:
    info = describe("photos")
    train, heldout = load("photos"), load("photos", "heldout")
    assert (len(train), len(heldout)) == (info.train_count, info.heldout_count)
    assert len(train) + len(heldout) == info.count == 1026
    assert tuple(train.images.shape[1:]) == (3, 32, 32)
    assert set(torch.cat([train.labels, heldout.labels]).tolist()) == set(range(info.num_classes))
    assert train.images.min() >= -1
    assert train.images.max() <= 1
    assert info.class_names[1] == "cat"


@needs_skimage
def test_photo_tiles_are_cut_row_by_row() -> None:
    import numpy as np
    from PIL import Image

    info = describe("photos", image_size=64)
    pixels = np.asarray(Image.open(photos.data_folder() / "astronaut.png"))
    store = photos.open_images("", info, DataOptions())
    chosen = torch.tensor([0, 1, 8, 63, 64])
    for image, (top, left) in zip(store.read(chosen), [(0, 0), (0, 64), (64, 0), (448, 448)], strict=False):
        assert torch.equal(image, torch.tensor(pixels[top : top + 64, left : left + 64]).permute(2, 0, 1))
    assert store.labels[chosen].tolist() == [0, 0, 0, 0, 1]


@needs_skimage
def test_photos_keep_split_and_brightness_at_another_size() -> None:
    small, large = load("photos", "heldout", image_size=16), load("photos", "heldout", image_size=64)
    assert tuple(small.images.shape[1:]) == (3, 16, 16)
    assert torch.equal(small.labels, large.labels)
    torch.testing.assert_close(small.images.mean((1, 2, 3)), large.images.mean((1, 2, 3)), atol=0.01, rtol=0)


def test_split_depends_on_the_fingerprint_alone() -> None:
    train, heldout = split_indices("ab" * 32, 101)
    assert sorted(train + heldout) == list(range(101))
    assert train == sorted(train)
    assert heldout == sorted(heldout)
    assert len(heldout) == 20
    assert split_indices("ab" * 32, 101) == (train, heldout)
    assert split_indices("cd" * 32, 101)[1] != heldout


def test_split_of_the_digits_is_that_of_earlier_versions() -> None:
    heldout = split_indices("09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22", 1797)[1]
    assert heldout[:8] == HELDOUT_DIGITS


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 0), (2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_heldout_size(count: int, expected: int) -> None:
    assert heldout_size(count) == expected


def test_of_a_large_set_ten_thousand_images_are_held_out() -> None:
    assert [heldout_size(count) for count in (49_999, 50_000, 50_003, 1_281_167)] == [10_000] * 4
    assert heldout_size(49_990) == 9_998
    start_s = time.perf_counter()
    train, heldout = split_indices("ef" * 32, 1_281_167)
    assert time.perf_counter() - start_s < 15  # two to three seconds on one core
    assert (len(train), len(heldout), len({*train, *heldout})) == (1_271_167, 10_000, 1_281_167)


def test_the_first_of_the_ranking_are_held_out() -> None:
    def rank(index: int) -> bytes:
        return hashlib.sha256(f"{'ab' * 32}:{index}".encode()).digest()

    assert split_indices("ab" * 32, 60)[1] == sorted(sorted(range(60), key=rank)[:12])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("digits:x", "takes nothing after"),
        ("folder", "names no folder"),
        ("folder:", "names no folder"),
        ("latents", "names no latents"),
        ("hf:", "names no data set"),
    ],
)
def test_wrong_specifications_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        describe(spec)


def test_a_bare_folder_is_told_its_prefix(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        describe(str(tmp_path))
    assert caught.value.fix == f"--data folder:{tmp_path}"


def test_a_bare_zip_file_is_told_its_prefix(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(UsageError, match="is a zip file") as caught:
        describe(str(tmp_path / "images.zip"))
    assert caught.value.fix == f"--data folder:{tmp_path / 'images.zip'}"


def test_a_specification_is_made_independent_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table").mkdir()
    assert absolute_spec("digits") == "digits"
    assert absolute_spec("folder:x/../y") == f"folder:{tmp_path}/y"
    assert absolute_spec("latents:z") == f"latents:{tmp_path}/z"
    assert absolute_spec("hf:owner/name,split=test") == "hf:owner/name,split=test"
    assert absolute_spec("hf:table,split=test") == f"hf:{tmp_path}/table,split=test"


def test_impossible_sizes_and_splits_are_refused() -> None:
    with pytest.raises(UsageError, match="8x8 pixels, 16"):
        describe("digits", 16)
    with pytest.raises(UsageError, match="0 pixels"):
        describe("digits", 0)
    with pytest.raises(UsageError, match="unknown split"):
        load("digits", "test")


@needs_skimage
def test_photos_are_not_enlarged() -> None:
    with pytest.raises(UsageError, match="64x64 pixels, 65"):
        describe("photos", 65)


@pytest.mark.parametrize(("spec", "fix"), [("digits", "scikit-learn"), ("photos", "finectl[photos]")])
def test_missing_package_names_the_command(spec: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed") as caught:
        describe(spec)
    assert caught.value.fix.startswith("pip install")
    assert fix in caught.value.fix


def test_package_without_the_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "data_file", lambda: tmp_path / "digits.csv.gz")
    with pytest.raises(InputError, match="cannot be read"):
        describe("digits")


def test_digits_of_another_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    file = tmp_path / "digits.csv.gz"
    file.write_bytes(gzip.compress(b"0," * 64 + b"3\n"))
    monkeypatch.setattr(digits, "data_file", lambda: file)
    with pytest.raises(InputError, match="holds 1 lines"):
        load("digits")


def labelled(labels: list[int]) -> ImageSet:
    info = DataInfo("x", "0" * 64, len(labels), len(labels), 0, 1, 1, 3, ("a", "b", "c"), False)
    images = torch.arange(len(labels), dtype=torch.float32).reshape(-1, 1, 1, 1)
    return ImageSet.in_memory(info, "train", images, torch.tensor(labels))


def test_subset_is_balanced_fixed_and_nested() -> None:
    data = labelled([0] * 50 + [1] * 5 + [2] * 30)
    subset = data.subset(30, seed=1)
    assert subset.labels.bincount().tolist() in ([13, 5, 12], [12, 5, 13])
    assert torch.equal(subset.images, data.subset(30, seed=1).images)
    ids = set(subset.images.flatten().tolist())
    assert len(ids) == 30
    assert set(data.subset(10, seed=1).images.flatten().tolist()) < ids
    assert set(data.subset(30, seed=2).images.flatten().tolist()) != ids
    assert subset.images.flatten().tolist() == sorted(ids)
    assert torch.equal(data.subset(85, seed=3).images, data.images)


def test_subset_keeps_images_with_their_labels() -> None:
    data = labelled([2, 0, 1] * 10)
    subset = data.subset(7, seed=0)
    assert torch.equal(subset.labels, data.labels[subset.images.flatten().long()])


def test_impossible_subsets_are_refused() -> None:
    data = labelled([0, 1])
    with pytest.raises(InputError, match="has 2"):
        data.subset(3, seed=0)
    with pytest.raises(UsageError, match="0 images"):
        data.subset(0, seed=0)


HELDOUT_DIGITS = [8, 13, 19, 20, 23, 27, 32, 37]
