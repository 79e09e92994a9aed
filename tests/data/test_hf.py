"""Data sets of the `datasets` library: columns, labels, splits, and what happens without a network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data.dataset import load
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError, UsageError

datasets = pytest.importorskip("datasets")

COUNT = 15
NAMES = ["dog", "cat", "unseen"]


def pictures(count: int = COUNT) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def table(columns: dict[str, Any], **features: Any) -> Any:
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def plain() -> Any:
    return table(
        {"image": pictures(), "label": [number % 2 for number in range(COUNT)]},
        image=datasets.Image(),
        label=datasets.ClassLabel(names=NAMES),
    )


def saved(data: Any, path: Path) -> str:
    data.save_to_disk(str(path))
    return f"hf:{path}"


def test_a_saved_data_set_is_read(plain: Any, tmp_path: Path) -> None:
    spec = saved(plain, tmp_path / "set")
    data = load(spec)
    assert (data.info.name, data.info.count, data.info.train_count) == (spec, COUNT, 12)
    assert data.info.class_names == tuple(NAMES)
    assert (data.info.image_size, data.info.channels, data.info.resize_filter) == (6, 3, "none")
    everything = data.store.read(torch.arange(COUNT))
    expected = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures()])
    assert torch.equal(everything, expected)
    assert data.store.labels.tolist() == [number % 2 for number in range(COUNT)]
    assert len(load(spec, "heldout")) == 3


def test_nothing_is_decoded_twice(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.data import collection, decoded

    spec = saved(plain, tmp_path / "set")
    before = load(spec)
    monkeypatch.setattr(decoded, "_decode_one", None)
    monkeypatch.setattr(collection, "_header", None)
    assert torch.equal(load(spec).images, before.images)


def test_the_fingerprint_follows_images_and_labels(plain: Any, tmp_path: Path) -> None:
    first = describe(saved(plain, tmp_path / "a"))
    again = describe(saved(plain, tmp_path / "b"))
    assert again.fingerprint == first.fingerprint
    relabelled = plain.map(lambda row: {"label": 1 - row["label"]}, load_from_cache_file=False)
    assert describe(saved(relabelled, tmp_path / "c")).fingerprint != first.fingerprint
    assert describe(saved(plain.select(range(14)), tmp_path / "d")).fingerprint != first.fingerprint


def test_train_is_taken_unless_another_split_is_chosen(plain: Any, tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"test": plain.select(range(5)), "train": plain})
    spec = saved(parts, tmp_path / "set")
    assert describe(spec).count == COUNT
    assert describe(f"{spec},split=test").count == 5
    with pytest.raises(InputError, match="no split 'val'") as caught:
        describe(f"{spec},split=val")
    assert "test, train" in caught.value.expected
    only = saved(datasets.DatasetDict({"validation": plain}), tmp_path / "only")
    assert describe(only).count == COUNT


def test_several_columns_are_named_and_one_is_chosen(tmp_path: Path) -> None:
    fine = [number % 3 for number in range(COUNT)]
    spec = saved(
        table(
            {"left": pictures(), "right": pictures(), "fine": fine, "coarse": [0] * COUNT},
            left=datasets.Image(),
            right=datasets.Image(),
            fine=datasets.ClassLabel(names=NAMES),
            coarse=datasets.ClassLabel(names=["animal"]),
        ),
        tmp_path / "set",
    )
    with pytest.raises(InputError, match="2 image columns: left, right") as caught:
        describe(spec)
    assert caught.value.fix == f"--data {spec},image=left"
    with pytest.raises(InputError, match="2 label columns: fine, coarse"):
        describe(f"{spec},image=right")
    assert load(f"{spec},image=right,label=fine").store.labels.tolist() == fine
    assert describe(f"{spec},image=right,label=coarse").class_names == ("animal",)
    assert describe(f"{spec},image=right,label=none").class_names == ("all",)
    with pytest.raises(InputError, match="no label column 'medium'"):
        describe(f"{spec},image=right,label=medium")


def test_numbers_and_words_are_labels_when_they_are_called_so(tmp_path: Path) -> None:
    words = ["b", "a", "c"] * 5
    columns = {"picture": pictures(), "label": [7, 3, 7] * 5, "word": words}
    features = {"picture": datasets.Image(), "label": datasets.Value("int64"), "word": datasets.Value("string")}
    spec = saved(table(columns, **features), tmp_path / "set")
    assert load(spec).store.labels.tolist() == [1, 0, 1] * 5
    assert describe(spec).class_names == ("3", "7")
    assert load(f"{spec},label=word").store.labels.tolist() == [1, 0, 2] * 5


def test_images_without_labels_are_one_class(plain: Any, tmp_path: Path) -> None:
    info = describe(saved(plain.remove_columns("label"), tmp_path / "set"))
    assert (info.num_classes, info.class_names) == (1, ("all",))


def test_missing_labels_are_refused(plain: Any, tmp_path: Path) -> None:
    hidden = plain.map(lambda row: {"label": -1}, load_from_cache_file=False)
    spec = saved(hidden, tmp_path / "set")
    with pytest.raises(InputError, match=r"15 of 15 images .* have no label"):
        describe(spec)
    assert describe(f"{spec},label=none").count == COUNT


def test_a_table_without_images_is_refused(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="0 image columns") as caught:
        describe(saved(plain.remove_columns("image"), tmp_path / "set"))
    assert "label" in caught.value.expected


def test_bad_images_are_named_or_left_out(tmp_path: Path) -> None:
    encoded = [
        {"bytes": b"no image", "path": None} if number == 4 else picture for number, picture in enumerate(pictures())
    ]
    spec = saved(table({"image": encoded}, image=datasets.Image()), tmp_path / "set")
    with pytest.raises(InputError, match=r"1 of 15 images .*: 0/4 \(not an image\)"):
        describe(spec)
    info = describe(spec, options=DataOptions(skip_bad=True))
    assert (info.count, info.skipped) == (14, 1)


def test_without_a_network_the_ways_out_are_named() -> None:
    with pytest.raises(InputError, match="'owner/no-such-set' cannot be had without a network") as caught:
        describe("hf:owner/no-such-set")
    assert "--download" in caught.value.fix
    assert "save_to_disk" in caught.value.fix and "hf:PATH" in caught.value.fix


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data set") as caught:
        describe(f"hf:{tmp_path}")
    assert f"--data folder:{tmp_path}" in caught.value.fix


def test_an_unknown_choice_is_refused() -> None:
    for argument in ("x,colour=red", "x,split", "x,split="):
        with pytest.raises(UsageError, match="has the choice"):
            describe(f"hf:{argument}")


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="not installed") as caught:
        describe("hf:x")
    assert caught.value.fix == "pip install 'finectl[hub]'"


def test_versions_that_run_code_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(InputError, match=r"datasets 3\.6\.0 is installed"):
        describe("hf:x")
