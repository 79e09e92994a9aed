"""`--control folder`: controls are found by their names, and what has none is listed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from finectl.data.controls.folder import describe_folder, match, open_folder
from finectl.data.controls.given import digest_of_files, image_files_of, read_square
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError, UsageError


def pictures(folder: Path, names: list[str], level: int = 0) -> Path:
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level + 10 * index, 0, 255)).save(path)
    return folder


def test_controls_match_by_path_and_name_whatever_their_suffix_and_order(tmp_path: Path) -> None:
    images = pictures(tmp_path / "i", ["b/1.png", "a/1.png", "a/2.png"])
    controls = pictures(tmp_path / "c", ["a/2.png", "b/1.bmp", "a/1.webp", "a/3.png"])
    data = describe(f"folder:{images}")
    info = describe_folder(data, str(controls), DataOptions())
    given, places = open_folder(data, info, DataOptions())
    assert places == [0, 1, 3] and info.channels == 3  # a/1, a/2, (a/3,) b/1
    reds = given.store.read(torch.tensor(places))[:, 0, 4, 4].tolist()
    assert [round(red / 10) for red in reds] == [2, 0, 1]
    other = pictures(tmp_path / "d", ["a/2.png", "b/1.png", "a/1.png"], level=50)
    assert describe_folder(data, str(other), DataOptions()).digest != info.digest


def test_images_without_a_control_are_listed_with_what_is_left_over(tmp_path: Path) -> None:
    images = pictures(tmp_path / "i", ["0.png", "1.png", "2.png"])
    controls = pictures(tmp_path / "c", ["0.png", "two.png", "one.png"])
    data = describe(f"folder:{images}")
    with pytest.raises(InputError) as refused:
        match(data, str(controls), DataOptions())
    assert "2 of 3 images have no control" in refused.value.what and "1.png, 2.png" in refused.value.what
    assert "one.png, two.png" in refused.value.what and "same path and name" in refused.value.expected
    many = pictures(tmp_path / "many", [f"{index:02}.png" for index in range(14)])
    with pytest.raises(InputError) as refused:
        match(describe(f"folder:{many}"), str(controls), DataOptions())
    assert "09.png, ..." in refused.value.what and "10.png" not in refused.value.what
    doubled = pictures(tmp_path / "e", ["0.png", "0.bmp", "1.png", "2.png"])
    with pytest.raises(InputError, match=r"0\.bmp and 0\.png"):
        match(data, str(doubled), DataOptions())


def test_a_folder_has_to_be_named_and_images_have_to_be_in_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder of control images"):
        describe_folder(describe("digits"), None, DataOptions())
    with pytest.raises(UsageError, match="digits has none"):
        describe_folder(describe("digits"), str(tmp_path), DataOptions())


def test_named_images_are_read_as_squares(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "f", ["b.png", "a.png"])
    assert [file.name for file in image_files_of([str(folder), str(folder / "b.png")])] == ["a.png", "b.png", "b.png"]
    assert digest_of_files([folder / "a.png"]) != digest_of_files([folder / "b.png"])
    Image.new("RGB", (20, 10), (255, 255, 255)).save(folder / "wide.png")
    assert read_square(folder / "wide.png", 4, 1).shape == (1, 4, 4)
    (folder / "no.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="not a readable image"):
        read_square(folder / "no.png", 4, 3)
    with pytest.raises(InputError, match="there is no image"):
        image_files_of([str(tmp_path / "gone.png")])
