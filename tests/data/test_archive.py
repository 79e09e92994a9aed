"""Zip files of images: the same set as the folder they were made of, and no way out of them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data.dataset import load
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (12, 9, 12, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        path = tmp_path / "images" / ("cat", "dog")[number % 2] / f"{number:02}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def packed(folder: Path, top: str = "", kind: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / f"images{top.replace('/', '')}.ZIP"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, f"{top}{file.relative_to(folder).as_posix()}")
    return path


@pytest.mark.parametrize("top", ["", "images/", "./"])
def test_a_zip_file_is_the_folder_it_was_made_of(top: str, folder: Path, cache: Path) -> None:
    path = packed(folder, top)
    plain, zipped = load(f"folder:{folder}", image_size=6), load(f"folder:{path}", image_size=6)
    assert replace(zipped.info, name="") == replace(plain.info, name="")
    assert zipped.info.class_names == ("cat", "dog")
    assert torch.equal(zipped.labels, plain.labels)
    assert torch.equal(zipped.images, plain.images)
    assert len(list(cache.glob("images/*"))) == 1  # of the same images, one copy is kept


def test_a_zip_file_is_decoded_to_the_same_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load(f"folder:{folder}", image_size=6)
    monkeypatch.setenv("FINECTL_CACHE", str(folder.parent / "other"))
    assert torch.equal(load(f"folder:{packed(folder)}", image_size=6).images, plain.images)


def test_a_flat_zip_file_is_one_class_and_skips_what_is_no_image(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "flat.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.name)
        archive.writestr("readme.txt", "not an image")
        archive.writestr("__MACOSX/._00.png", "not an image")
        archive.writestr(".hidden/00.png", "not an image")
    info = describe(f"folder:{path}", 6)
    assert (info.count, info.class_names, info.skipped) == (4, ("all",), 0)


def everything_under(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["../out.png", "/etc/out.png", "a/../../out.png", "..\\out.png", "c/..\\x.png"])
def test_a_path_that_leads_out_is_refused_and_nothing_is_written(
    name: str, folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = packed(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), next(folder.rglob("*.png")).read_bytes())
    before = everything_under(tmp_path_factory.getbasetemp())
    with pytest.raises(InputError, match="leads out of the archive"):
        load(f"folder:{path}", image_size=6, options=DataOptions(skip_bad=True))
    assert everything_under(tmp_path_factory.getbasetemp()) == before


def test_a_file_that_is_no_zip_file(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match="not a whole zip file"):
        describe(f"folder:{path}")
    with pytest.raises(InputError, match="does not exist"):
        describe(f"folder:{tmp_path / 'y.zip'}")


def test_a_zip_file_without_images(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    with pytest.raises(InputError, match="holds no images"):
        describe(f"folder:{tmp_path / 'x.zip'}")


def test_a_damaged_entry_is_named_or_left_out(folder: Path) -> None:
    path = packed(folder, kind=zipfile.ZIP_STORED)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("cat/00.png")
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"1 of 12 images .*: cat/00\.png \(Bad CRC") as caught:
        describe(f"folder:{path}", 6)
    assert "--skip-bad" in caught.value.fix
    info = describe(f"folder:{path}", 6, DataOptions(skip_bad=True))
    assert (info.count, info.skipped) == (11, 1)


def huge_png(side: int) -> bytes:
    """Return a PNG of a few bytes that says it has `side` x `side` pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_an_image_of_more_pixels_than_pil_reads_is_corrupt(side: int, folder: Path) -> None:
    path = packed(folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("cat/bomb.png", huge_png(side))
    with pytest.raises(InputError, match=r"cat/bomb\.png \(.*pixels"):
        describe(f"folder:{path}", 6)
    data = load(f"folder:{path}", image_size=6, options=DataOptions(skip_bad=True))
    assert (data.info.count, data.info.skipped) == (12, 1)
    assert data.info.fingerprint == describe(f"folder:{folder}", 6).fingerprint


def test_an_entry_that_would_unpack_to_gigabytes_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import finectl.data.archive as archive_module

    monkeypatch.setattr(archive_module, "MAX_FILE_BYTES", 5_000_000)
    path = packed(folder)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/bomb.png", b"\0" * 6_000_000)
    assert path.stat().st_size < 100_000
    with pytest.raises(InputError, match=r"bomb\.png \(6,000,000 bytes unpacked"):
        describe(f"folder:{path}", 6)
