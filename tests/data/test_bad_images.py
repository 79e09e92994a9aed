"""Images that cannot be read: all named, or left out as if they were not there; and the formats that are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from images_on_disk import SKIP, forbid, make_folder, whole
from PIL import Image

from finectl.data.dataset import load
from finectl.data.sources import describe
from finectl.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images")


def spoil(folder: Path) -> list[Path]:
    """Put a file that is no image, two that are cut short, and an empty one in place of four."""
    (folder / "cat" / "05.jpg").write_bytes(b"not an image")
    cut = [folder / "cat" / "04.jpg", folder / "dog" / "11.jpg"]
    for path in cut:
        path.write_bytes(path.read_bytes()[:-100])
    (folder / "dog" / "13.jpg").write_bytes(b"")
    return [folder / "cat" / "05.jpg", *cut, folder / "dog" / "13.jpg"]


def test_bad_files_are_left_out_as_if_they_were_not_there(folder: Path, tmp_path: Path, cache: Path) -> None:
    bad = spoil(folder)
    info = describe(f"folder:{folder}", options=SKIP)
    assert (info.count, info.skipped) == (17, 4)
    data, pixels = whole(folder, SKIP)
    assert data.info == info
    shutil.copytree(folder, tmp_path / "clean")
    for path in bad:
        (tmp_path / "clean" / path.relative_to(folder)).unlink()
    clean, same = whole(tmp_path / "clean")
    assert clean.info.fingerprint == info.fingerprint
    assert clean.info.skipped == 0
    assert torch.equal(same, pixels)
    assert torch.equal(clean.indices, data.indices)
    assert torch.equal(clean.store.labels, data.store.labels)


def test_bad_files_are_looked_for_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder)
    info = describe(f"folder:{folder}", options=SKIP)
    with monkeypatch.context() as patch:
        forbid(patch, "_decode_one", "_header")
        assert whole(folder, SKIP)[0].info == info
    small, _ = whole(folder, SKIP, size=8)
    assert (small.info.fingerprint, small.info.skipped) == (info.fingerprint, 4)


def test_bad_files_that_only_decoding_shows_are_all_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in spoil(folder)[::3]:
        path.unlink()
    assert describe(f"folder:{folder}").count == 19  # headers are whole
    with pytest.raises(InputError, match=r"2 of 19 images .*cannot be read: ") as caught:
        load(f"folder:{folder}")
    assert "cat/04.jpg (image file is truncated" in caught.value.what and "dog/11.jpg" in caught.value.what
    assert "--skip-bad" in caught.value.fix
    forbid(monkeypatch, "_decode_one", "_header")
    with pytest.raises(InputError, match="2 of 19 images"):
        describe(f"folder:{folder}")  # known from now on, before any work is begun


def test_good_files_after_an_error_are_used_with_the_option(folder: Path) -> None:
    spoil(folder)[0].unlink()
    (folder / "dog" / "13.jpg").unlink()
    with pytest.raises(InputError):
        load(f"folder:{folder}")
    assert whole(folder, SKIP)[1].shape[0] == 17


def test_a_class_whose_images_are_all_bad_is_none(folder: Path) -> None:
    (folder / "emu").mkdir()
    (folder / "emu" / "0.jpg").write_bytes(b"x")
    data, _ = whole(folder, SKIP)
    assert data.info.class_names == ("cat", "dog")


def test_only_bad_files_are_refused_in_any_case(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="1 of 1 images"):
        describe(f"folder:{tmp_path}", options=SKIP)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.jpg")
    content = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(content[:-60])
    with pytest.raises(InputError, match="1 of 1 images"):
        describe(f"folder:{tmp_path}", options=SKIP)


def test_a_link_that_leads_nowhere_is_a_bad_file(folder: Path) -> None:
    (folder / "cat" / "zz.png").symlink_to(folder / "missing.png")
    with pytest.raises(InputError, match=r"cat/zz\.png \(.*No such file"):
        describe(f"folder:{folder}")
    assert describe(f"folder:{folder}", options=SKIP).skipped == 1


def test_a_format_that_starts_other_programs_is_no_image(tmp_path: Path) -> None:
    """PIL hands PostScript to an interpreter, whatever the file is called."""
    save_as(tmp_path / "good.png", "PNG")
    save_as(tmp_path / "page.png", "EPS")
    with pytest.raises(InputError, match=r"1 of 2 images .*: page\.png \(not an image\)"):
        describe(f"folder:{tmp_path}")


def save_as(path: Path, kind: str) -> None:
    Image.new("RGB", (8, 8)).save(path, format=kind)


def test_a_camera_file_with_several_pictures_is_its_first(tmp_path: Path) -> None:
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    for name in "ab":
        black.save(tmp_path / f"{name}.jpg", format="MPO", save_all=True, append_images=[white])
    assert bool((load(f"folder:{tmp_path}").images < -0.95).all())


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_common_format_is_read(kind: str, tmp_path: Path) -> None:
    for number in range(2):
        save_as(tmp_path / f"{number}.{kind.lower()}", kind)
    assert bool((load(f"folder:{tmp_path}").images < -0.95).all())
