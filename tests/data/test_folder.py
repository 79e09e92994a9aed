"""Image folders: classes, order, decoding, fingerprint and every way in which a folder can be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finectl.data.dataset import load
from finectl.data.folder import image_files
from finectl.data.sources import DataInfo, DataOptions, describe, split_indices
from finectl.errors import InputError, UsageError


def save(path: Path, colour: int | tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(colour, int) else "RGB", size, colour).save(path)


def everything(spec: str, image_size: int | None = None) -> tuple[DataInfo, torch.Tensor, torch.Tensor]:
    """Return a folder's images and labels in the order of their paths, both splits put back together."""
    train, heldout = load(spec, "train", image_size), load(spec, "heldout", image_size)
    kept, held = split_indices(train.info.fingerprint, train.info.count)
    indices = torch.tensor([*kept, *held])
    order = indices.argsort()
    return (
        train.info,
        torch.cat([train.images, heldout.images])[order],
        torch.cat([train.labels, heldout.labels])[order],
    )


def red(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for name, first in (("zebra", 10), ("ant", 20)):
        for number in range(3):
            save(tmp_path / name / f"{number}.png", (first + number, 0, 255))
    return tmp_path


def test_class_folders_give_sorted_classes(classes: Path) -> None:
    info, images, labels = everything(f"folder:{classes}")
    assert info.class_names == ("ant", "zebra")
    assert (info.count, info.train_count, info.heldout_count) == (6, 5, 1)
    assert (info.image_size, info.channels, info.num_classes, info.bundled) == (8, 3, 2, False)
    assert info.resize_filter == "none"
    assert tuple(images.shape) == (6, 3, 8, 8)
    assert red(images) == [20, 21, 22, 10, 11, 12]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[:, 1].eq(-1).all()
    assert images[:, 2].eq(1).all()


def test_flat_folder_is_one_class_and_skips_what_is_no_image(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".hidden.png", ".git/c.png"):
        save(tmp_path / name, 100)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    info = describe(f"folder:{tmp_path}")
    assert image_files(tmp_path) == ["a.jpg", "b.PNG"]
    assert (info.count, info.num_classes, info.class_names, info.channels) == (2, 1, ("all",), 1)


def test_images_below_a_class_folder_belong_to_it(tmp_path: Path) -> None:
    save(tmp_path / "a" / "deep" / "x.png", 1)
    save(tmp_path / "b" / "y.png", 2)
    assert everything(f"folder:{tmp_path}")[2].tolist() == [0, 1]


def test_order_and_fingerprint_do_not_depend_on_the_directory_order(
    classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = describe(f"folder:{classes}")
    real = os.scandir

    class Reversed:
        def __init__(self, folder: Path) -> None:
            with real(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert describe(f"folder:{classes}") == expected


def test_fingerprint_follows_names_and_contents(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    import shutil

    before = describe(f"folder:{classes}").fingerprint
    copy = tmp_path_factory.mktemp("other") / "place"
    shutil.copytree(classes, copy)
    assert describe(f"folder:{copy}").fingerprint == before
    save(copy / "ant" / "0.png", (20, 1, 255))
    assert describe(f"folder:{copy}").fingerprint != before
    (classes / "ant" / "0.png").rename(classes / "ant" / "9.png")
    assert describe(f"folder:{classes}").fingerprint != before


def test_central_square_is_kept_and_resized(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    for name in ("a.png", "b.png"):
        Image.fromarray(wide).save(tmp_path / name)
    info, images, _ = everything(f"folder:{tmp_path}", image_size=5)
    assert info.resize_filter == "bicubic"
    assert torch.equal(images, torch.full((2, 3, 5, 5), 200 / 127.5 - 1))


def test_shrinking_averages_instead_of_aliasing(tmp_path: Path) -> None:
    checks = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)
    for name in ("a.png", "b.png"):
        Image.fromarray(checks).save(tmp_path / name)
    inner = load(f"folder:{tmp_path}", image_size=8).images[..., 1:-1, 1:-1]
    assert inner.abs().max() < 0.05
    aliased = load(f"folder:{tmp_path}", image_size=8, options=DataOptions("nearest")).images
    assert aliased.abs().min() > 0.99


def test_grey_and_colour_together_are_rgb(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 50)
    save(tmp_path / "b.png", (60, 0, 0))
    info, images, _ = everything(f"folder:{tmp_path}")
    assert info.channels == 3
    assert red(images) == [50, 60]
    assert images[0, 0].equal(images[0, 2])


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    for name, value in (("a.png", 65535), ("b.png", 257 * 40)):
        Image.fromarray(np.full((4, 4), value, dtype=np.uint16)).save(tmp_path / name)
    info, images, _ = everything(f"folder:{tmp_path}")
    assert info.channels == 1
    assert red(images) == [255, 40]


def test_palette_and_exif_orientation_are_decoded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    turned = np.zeros((4, 4, 3), dtype=np.uint8)
    turned[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(turned).save(tmp_path / "b.png", exif=exif)
    images = everything(f"folder:{tmp_path}")[1]
    assert red(images)[0] == 255
    assert images[1, 0, 3].eq(1).all()
    assert images[1, 0, 0].eq(-1).all()


def test_links_back_to_the_top_end(classes: Path) -> None:
    (classes / "ant" / "loop").symlink_to(classes, target_is_directory=True)
    assert len(image_files(classes)) == 6


@pytest.mark.parametrize("make", ["missing", "file", "empty"])
def test_folders_without_images_are_refused(make: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    message = {"missing": "does not exist", "file": "is not a folder", "empty": "holds no images"}[make]
    if make == "file":
        path.write_text("x")
    elif make == "empty":
        path.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        describe(f"folder:{path}")
    assert str(path) in caught.value.what
    assert make != "empty" or ".png" in caught.value.expected


def test_images_beside_class_folders_are_refused(classes: Path) -> None:
    save(classes / "loose.png", 1)
    with pytest.raises(InputError, match="1 images beside 2 class folders"):
        describe(f"folder:{classes}")


def test_several_sizes_need_a_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1, (8, 8))
    save(tmp_path / "b.png", 1, (9, 9))
    with pytest.raises(InputError, match=r"8x8 pixels.*9x9") as caught:
        describe(f"folder:{tmp_path}")
    assert "--image-size" in caught.value.fix
    assert load(f"folder:{tmp_path}", image_size=8).images.shape[-1] == 8
    (tmp_path / "b.png").unlink()
    save(tmp_path / "a.png", 1, (8, 6))
    with pytest.raises(InputError, match="not square: 8x6"):
        describe(f"folder:{tmp_path}")


def test_files_that_are_no_images_are_listed_up_to_ten(tmp_path: Path) -> None:
    save(tmp_path / "good.png", 1)
    for number in range(12):
        (tmp_path / f"bad{number:02}.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="12 of 13 images") as caught:
        describe(f"folder:{tmp_path}")
    assert "bad09.png" in caught.value.what
    assert "bad10.png" not in caught.value.what
    assert "2 more" in caught.value.what


def test_truncated_images_are_named_when_loaded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(4):
        Image.fromarray(noise).save(tmp_path / f"{number}.png")
    for number in range(3):
        content = (tmp_path / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(content[: len(content) // 2])
    assert describe(f"folder:{tmp_path}").count == 4
    with pytest.raises(InputError, match=r"cannot be read: .*\.png"):
        load(f"folder:{tmp_path}")


def test_32_bit_images_are_refused(tmp_path: Path) -> None:
    for name in ("a.tif", "b.tif"):
        Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / name)
    with pytest.raises(InputError, match="32 bits a channel"):
        load(f"folder:{tmp_path}")


def test_a_single_image_has_no_heldout_split(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 1)
    assert len(load(f"folder:{tmp_path}")) == 1
    with pytest.raises(InputError, match="none for the heldout split"):
        load(f"folder:{tmp_path}", "heldout")


def test_unknown_filter_is_refused(classes: Path) -> None:
    with pytest.raises(UsageError, match="unknown resize filter 'sinc'"):
        describe(f"folder:{classes}", options=DataOptions("sinc"))
