"""Captions: both layouts, what is missing, names that lead elsewhere, and what they are part of."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from finectl.data.captions import captions_of
from finectl.data.dataset import load
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError

ALL, ANY, NONE = (DataOptions(captions=name) for name in ("all", "any", "none"))
TEXTS = {"a.png": "a red square", "b.png": "a green square", "c.png": "a blue square", "d.png": "a red square"}


def images(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(TEXTS):
        Image.new("RGB", (8, 8), (60 * index, 10, 10)).save(folder / name)
    return folder


def listed(folder: Path, rows: Sequence[tuple[str, str]]) -> Path:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (images(folder) / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def beside(folder: Path, texts: dict[str, str]) -> Path:
    images(folder)
    for name, text in texts.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    return folder


def read(spec: object, options: DataOptions = ALL) -> tuple[str, ...]:
    info = describe(f"folder:{spec}", None, options)
    return captions_of(info, options, [0] * info.count)


def test_both_layouts_and_a_zip_file_give_the_same_captions_whatever_their_order(cache: Path, tmp_path: Path) -> None:
    first = listed(tmp_path / "listed", list(TEXTS.items()))
    second = listed(tmp_path / "reversed", list(reversed(TEXTS.items())))
    third = beside(tmp_path / "beside", TEXTS)
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for path in sorted(third.iterdir()):
            file.write(path, path.name)
    assert read(first) == tuple(TEXTS.values())
    assert {read(folder) for folder in (second, third, packed)} == {read(first)}
    infos = [describe(f"folder:{folder}", None, ALL) for folder in (first, second, third, packed)]
    assert len({info.captions for info in infos}) == len({info.fingerprint for info in infos}) == 1


def test_captions_are_part_of_the_fingerprint_and_not_of_the_split(cache: Path, tmp_path: Path) -> None:
    folder = listed(tmp_path / "x", list(TEXTS.items()))
    bare, told = describe(f"folder:{folder}", None, NONE), describe(f"folder:{folder}", None, ALL)
    assert bare.captions == "" and told.captions and told.fingerprint != bare.fingerprint
    assert told.split_by == bare.fingerprint
    held = {load(f"folder:{folder}", "heldout", None, options).indices.tolist().__str__() for options in (NONE, ALL)}
    assert len(held) == 1
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text().replace("blue", "navy"))
    changed = describe(f"folder:{folder}", None, ALL)
    assert changed.fingerprint != told.fingerprint and changed.split_by == told.split_by
    assert "a navy square" in read(folder)


def test_captions_that_nothing_changed_are_not_read_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = beside(tmp_path / "x", TEXTS)
    for path in folder.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))
    before = describe(f"folder:{folder}", None, ALL)

    def fail(*arguments: object) -> None:
        raise AssertionError("this should have come from the cache")

    monkeypatch.setattr("finectl.data.folder.read_prompts", fail)
    assert describe(f"folder:{folder}", None, ALL) == before


@pytest.mark.parametrize("missing", ["b.png", "d.png"])
def test_an_image_without_a_caption_is_named_only_where_captions_are_wanted(
    cache: Path, tmp_path: Path, missing: str
) -> None:
    texts = {name: text for name, text in TEXTS.items() if name != missing}
    for folder in (beside(tmp_path / "b", texts), listed(tmp_path / "l", list(texts.items()))):
        for options in (ALL, ANY):
            with pytest.raises(InputError, match=missing) as caught:
                describe(f"folder:{folder}", None, options)
            assert "1 of 4 images" in caught.value.what and "metadata.jsonl" in caught.value.expected
        assert describe(f"folder:{folder}", None, NONE).captions == ""


def test_no_captions_at_all(cache: Path, tmp_path: Path) -> None:
    folder = images(tmp_path / "x")
    assert describe(f"folder:{folder}", None, ANY) == describe(f"folder:{folder}", None, NONE)
    with pytest.raises(InputError, match="no captions") as caught:
        describe(f"folder:{folder}", None, ALL)
    assert "metadata.jsonl" in caught.value.expected


def test_names_that_lead_elsewhere_name_no_image_and_open_no_file(cache: Path, tmp_path: Path) -> None:
    shutil.copy(images(tmp_path / "other") / "a.png", tmp_path / "a.png")
    hostile = ["../a.png", str(tmp_path / "a.png"), "x/../../a.png", "a.png\0", "..\\a.png", ""]
    folder = listed(tmp_path / "x", [*TEXTS.items(), *((name, "stolen") for name in hostile)])
    assert read(folder) == tuple(TEXTS.values())
    only = listed(tmp_path / "y", [("../a.png", "stolen"), *list(TEXTS.items())[1:]])
    with pytest.raises(InputError, match=r"a\.png"):
        read(only)


@pytest.mark.parametrize(
    ("line", "says"),
    [("{", "no JSON"), ('{"text": "x"}', "file_name"), ('{"file_name": "a.png", "text": 3}', "no text")],
)
def test_a_damaged_list(cache: Path, tmp_path: Path, line: str, says: str) -> None:
    folder = listed(tmp_path / "x", list(TEXTS.items()))
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=says) as caught:
        read(folder)
    assert "line 5 of metadata.jsonl" in caught.value.what


def test_bundled_sets_have_captions_without_files() -> None:
    for name, first in (("digits", "a photo of the digit 0"), ("photos", "a photo of astronaut")):
        info = describe(name, None, ALL)
        assert info.captions and info.fingerprint != describe(name).fingerprint
        found = captions_of(info, ALL, load(name, "train").store.labels.tolist())
        assert found[0] == first and len(set(found)) == info.num_classes
    assert describe("shape:4x8x8:1", None, ALL).captions


def test_a_column_of_a_table(cache: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = images(tmp_path / "x")
    rows = {"image": [str(folder / name) for name in TEXTS], "caption": list(TEXTS.values()), "other": ["x"] * 4}
    for column, texts in (("caption", list(TEXTS.values())), ("other", ["x"] * 4)):
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
        spec = f"hf:{tmp_path / 'saved'}" + (",text=other" if column == "other" else "")
        info = describe(spec, None, ALL)
        assert list(captions_of(info, ALL, [0] * 4)) == texts
    rows["caption"][2] = " "
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "holes")
    with pytest.raises(InputError, match="row 2"):
        describe(f"hf:{tmp_path / 'holes'}", None, ANY)


def packed(path: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def test_tar_files_hold_images_and_captions(cache: Path, tmp_path: Path) -> None:
    folder = beside(tmp_path / "x", TEXTS)
    files = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    (tmp_path / "shards").mkdir()
    packed(tmp_path / "shards/0.tar", files[:4])
    packed(tmp_path / "shards/1.tar", files[4:])
    assert read(tmp_path / "shards") == tuple(TEXTS.values()) == read(packed(tmp_path / "all.tar", files[::-1]))
    data = load(f"folder:{tmp_path / 'shards'}", "train", None, ALL)
    plain = load(f"folder:{folder}", "train", None, ALL)
    every = torch.arange(4)
    assert torch.equal(data.store.read(every), plain.store.read(every)) and data.info.num_classes == 1


def test_hostile_and_damaged_tar_files(cache: Path, tmp_path: Path) -> None:
    folder = beside(tmp_path / "x", TEXTS)
    files = [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]
    shard = packed(tmp_path / "a.tar", [*files, ("../../up.png", files[0][1]), ("../../up.txt", b"above")])
    with tarfile.open(shard, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "a.png")
        archive.addfile(link)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert len(read(shard)) == 5, "read like any other, and written nowhere"
    assert sorted(path for path in tmp_path.rglob("*")) == before
    for name, content in (("cut.tar", shard.read_bytes()[:1500]), ("none.tar", b"x" * 2000)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)
    with pytest.raises(InputError, match=r"b\.png"):
        read(packed(tmp_path / "missing.tar", [file for file in files if file[0] != "b.txt"]))
