"""Image files at their own sizes: decoding, order, prompts, and every way in which they can be wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from images_on_disk import make_folder
from PIL import Image

from finectl.data import files
from finectl.data.files import describe_files, open_files
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError

PLAIN = DataOptions()
SKIP = DataOptions(skip_bad=True)


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 4), seed: int = 0, **options: object) -> Path:
    """Write a noisy image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.frombytes(mode, size, noise.tobytes()).save(path, **options)
    return path


def zipped(folder: Path, target: Path, top: str = "") -> Path:
    """Pack a folder's files under `top`, last ones first."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file():
                archive.write(path, top + path.relative_to(folder).as_posix())
    return target


def list_prompts(path: Path, **prompts: object) -> None:
    """Write a metadata.jsonl; `a="x"` is the prompt of a.png."""
    path.write_text(
        "".join(json.dumps({"file_name": f"{name}.png", "text": text}) + "\n" for name, text in prompts.items())
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """a.png, b.png and c.png, flat."""
    root = tmp_path / "three"
    for number, name in enumerate("abc"):
        save(root / f"{name}.png", seed=number)
    return root


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "transparent P", "cut P", "GIF"])
def test_decoding_is_that_of_the_usual_tools(mode: str, tmp_path: Path) -> None:
    path = tmp_path / {"CMYK": "x.tif", "GIF": "x.gif"}.get(mode, "x.png")
    if mode == "GIF":
        frames = [Image.open(save(tmp_path / "other" / f"{seed}.png", "RGBA", seed=seed)) for seed in (1, 2)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif mode.endswith(" P"):
        paletted = Image.open(save(tmp_path / "other" / "x.png", "RGBA")).convert("P")
        paletted.save(path, transparency=3 if mode == "cut P" else bytes(range(256)))
    elif mode == "1":
        Image.open(save(tmp_path / "other" / "x.png")).convert("1").save(path)
    elif mode == "P":
        Image.open(save(tmp_path / "other" / "x.png")).quantize(7).save(path)
    else:
        save(path, mode)
    (tmp_path / "folder").mkdir()
    path = path.rename(tmp_path / "folder" / path.name)
    opened = open_files(str(path.parent), PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = opened.read(0)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (4, 6, 3))
    assert pixels.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(pixels, np.array(Image.open(path).convert("RGB")))


def test_decoding_is_that_of_clean_fid(three: Path) -> None:
    utils = pytest.importorskip("cleanfid.utils")
    save(three / "d.png", "RGBA")
    save(three / "e.png", "L", (9, 5))
    opened = open_files(str(three), PLAIN)
    theirs = utils.ResizeDataset([str(three / name) for name in opened.names], "legacy_tensorflow")
    for index in range(opened.count):
        image = theirs[index].permute(1, 2, 0).round().numpy().astype(np.uint8)
        assert np.array_equal(opened.read(index), image)


def test_exif_orientation_is_ignored_and_16_bits_keep_their_range(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    save(tmp_path / "a.png", exif=turned)
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "b.png")
    opened = open_files(str(tmp_path), PLAIN)
    assert opened.read(0).shape == (4, 6, 3)
    assert opened.read(1)[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


def test_order_labels_and_fingerprint_are_those_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "classes")
    opened = open_files(str(folder), PLAIN)
    data = describe(f"folder:{folder}")
    assert opened.names == tuple(sorted(opened.names)) and opened.count == 20
    assert (opened.fingerprint, opened.info.class_names) == (data.fingerprint, data.class_names)
    assert opened.labels == [0] * 10 + [1] * 10
    assert (opened.info.size, opened.info.skipped, opened.info.name) == ((16, 16), 0, f"folder:{folder}")

    def pixels(index: int) -> bytes:
        return opened.read(index).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(pixels, range(20))) == [pixels(index) for index in range(20)]
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: Backwards(scandir(path)))
    again = open_files(str(folder), PLAIN)
    assert (again.names, again.fingerprint) == (opened.names, opened.fingerprint)


class Backwards:
    """A directory that gives its entries the other way round."""

    def __init__(self, entries: object) -> None:
        self.entries = list(entries)[::-1]

    def __enter__(self) -> list[os.DirEntry[str]]:
        return self.entries

    def __exit__(self, *error: object) -> None:
        pass


def test_a_zip_file_holds_the_same_images(three: Path, tmp_path: Path) -> None:
    list_prompts(three / "metadata.jsonl", a="1", b="2", c="3")
    opened = open_files(str(three), PLAIN)
    for top in ("", "inside/"):
        archive = open_files(str(zipped(three, tmp_path / "three.zip", top)), PLAIN)
        assert archive.names == opened.names
        assert archive.fingerprint == opened.fingerprint
        assert archive.info.prompts_digest == opened.info.prompts_digest
        assert all(np.array_equal(archive.read(index), opened.read(index)) for index in range(3))


def test_sizes(tmp_path: Path) -> None:
    save(tmp_path / "a.png", size=(6, 4))
    assert describe_files(str(tmp_path), PLAIN).size == (6, 4)
    save(tmp_path / "b.png", size=(5, 9))
    assert describe_files(str(tmp_path), PLAIN).size is None
    assert [open_files(str(tmp_path), PLAIN).read(index).shape for index in (0, 1)] == [(4, 6, 3), (9, 5, 3)]


def test_no_prompts(three: Path) -> None:
    (three / "notes.txt").write_text("of no image")
    (three / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 3}\n\n')
    opened = open_files(str(three), PLAIN)
    assert opened.prompts() is None
    assert not opened.info.prompts_digest


@pytest.mark.parametrize("key", ["text", "prompt", "caption"])
def test_prompts_of_a_metadata_file(three: Path, key: str) -> None:
    lines = [{"file_name": f"{name}.png", key: f" the {name}é\n", "width": 6} for name in "cab"]
    (three / "metadata.jsonl").write_text("\ufeff" + "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    info = describe_files(str(three), PLAIN)
    assert info.prompts_digest
    assert open_files(str(three), PLAIN).prompts() == ["the aé", "the bé", "the cé"]
    list_prompts(three / "metadata.jsonl", a="the aé", b="the bé", c="another", elsewhere="not here")
    changed = describe_files(str(three), PLAIN)
    assert changed.fingerprint == info.fingerprint
    assert changed.prompts_digest != info.prompts_digest


def test_prompts_beside_the_images(three: Path, tmp_path: Path) -> None:
    for name in "abc":
        (three / f"{name}.txt").write_text(f"{name} & more\n")
    for place in (three, zipped(three, tmp_path / "three.zip"), zipped(three, tmp_path / "top.zip", "top/")):
        assert open_files(str(place), PLAIN).prompts() == ["a & more", "b & more", "c & more"]
    list_prompts(three / "metadata.jsonl", a="1", b="2", c="3")
    assert open_files(str(three), PLAIN).prompts() == ["1", "2", "3"]


def test_prompts_of_class_folders(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for name in ("cat/a.png", "cat/deep/b.png", "dog/a.png"):
        save(root / name)
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "dog/a.png", "text": "a dog"}))
    (root / "cat" / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": name}) + "\n" for name in ("./a.png", "deep/b.png"))
    )
    for place in (root, zipped(root, tmp_path / "data.zip")):
        assert open_files(str(place), PLAIN).prompts() == ["./a.png", "deep/b.png", "a dog"]


def test_prompts_beside_the_only_folder_of_a_zip_file(three: Path, tmp_path: Path) -> None:
    target = zipped(three, tmp_path / "three.zip", "images/")
    rows = "".join(json.dumps({"file_name": f"images/{name}.png", "text": name}) + "\n" for name in "abc")
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr("metadata.jsonl", rows)
    assert open_files(str(target), PLAIN).prompts() == ["a", "b", "c"]


@pytest.mark.parametrize("how", ["listed", "beside", "blank", "all elsewhere"])
def test_prompts_of_only_some_images_are_refused(three: Path, how: str) -> None:
    if how == "beside":
        (three / "a.txt").write_text("a")
    else:
        rows = {"listed": {"a": "x"}, "blank": {"a": "x", "b": " ", "c": None}, "all elsewhere": {"x": "x"}}[how]
        list_prompts(three / "metadata.jsonl", **rows)
    missing = "3 of 3 images in .* have no prompt, such as a.png" if how == "all elsewhere" else "2 of 3 .* b.png"
    with pytest.raises(InputError, match=missing) as caught:
        describe_files(str(three), PLAIN)
    assert "metadata.jsonl" in caught.value.expected and "0.txt" in caught.value.expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"file_name": "a.png", "text": "x"}\n{"file_name', "line 2 of metadata.jsonl in .* is no JSON"),
        (b'["a.png", "x"]', "line 1 of metadata.jsonl in .* has no file_name"),
        (b'{"image": "a.png", "text": "x"}', "has no file_name: {.image"),
        (b'{"file_name": "a.png", "text": ["x", "y"]}', "a prompt that is no text"),
        (b'{"file_name": "a.png", "text": "x"}\n{"file_name": "./a.png", "text": "y"}', "gives ./a.png another prompt"),
        (b'{"file_name": "a.png", "text": "\xff"}', "metadata.jsonl in .* cannot be read"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_damaged_metadata(three: Path, content: bytes, problem: str) -> None:
    (three / "metadata.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        describe_files(str(three), PLAIN)
    assert len(caught.value.what) < 1000


def test_a_damaged_image_is_named(three: Path) -> None:
    whole = (three / "b.png").read_bytes()
    (three / "b.png").write_bytes(whole[:-30])  # the header is whole
    opened = open_files(str(three), PLAIN)
    assert opened.read(0).shape == opened.read(2).shape == (4, 6, 3)
    with pytest.raises(InputError, match=r"1 of 3 images in .*three cannot be read: b\.png \(") as caught:
        opened.read(1)
    assert "--skip-bad" in caught.value.fix
    (three / "c.png").write_bytes(b"none")
    with pytest.raises(InputError, match=r"1 of 3 images in .* cannot be read: c\.png \(not an image\)") as caught:
        describe_files(str(three), PLAIN)
    assert "--skip-bad" in caught.value.fix


def test_bad_images_are_left_out_where_that_is_allowed(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe_files(str(three), SKIP)
    assert (whole.count, whole.skipped) == (3, 0)
    assert whole == describe_files(str(three), PLAIN)
    list_prompts(three / "metadata.jsonl", a="1", c="3")
    (three / "b.png").write_bytes((three / "b.png").read_bytes()[:-30])
    opened = open_files(str(three), SKIP)
    assert (opened.names, opened.count, opened.info.skipped) == (("a.png", "c.png"), 2, 1)
    assert opened.prompts() == ["1", "3"]
    assert opened.fingerprint == describe(f"folder:{three}", 4, SKIP).fingerprint != whole.fingerprint
    with monkeypatch.context() as patched:
        patched.setattr(files, "_decode", None)  # known by now
        assert describe_files(str(three), SKIP) == opened.info
    save(three / "b.png", seed=1)
    (three / "metadata.jsonl").unlink()
    assert describe_files(str(three), SKIP).count == 3
    for name in "abc":
        (three / f"{name}.png").write_bytes(b"none")
    with pytest.raises(InputError, match="3 of 3 images"):
        describe_files(str(three), SKIP)


def test_no_images(tmp_path: Path) -> None:
    for options in (PLAIN, SKIP):
        with pytest.raises(InputError, match="holds no images"):
            describe_files(str(tmp_path), options)
    with pytest.raises(InputError, match="does not exist"):
        describe_files(str(tmp_path / "none"), PLAIN)
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match="not a whole zip file"):
        describe_files(str(tmp_path / "x.zip"), PLAIN)


def test_a_bomb_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(encoded, "PNG")
    (tmp_path / "a.png").write_bytes(encoded.getvalue())
    with pytest.raises(InputError, match=r"a\.png"):
        describe_files(str(tmp_path), PLAIN)


def test_describing_needs_no_torch(three: Path) -> None:
    program = (
        "import sys; from finectl.data.files import describe_files; from finectl.data.sources import DataOptions;"
        "print(describe_files(sys.argv[1], DataOptions(skip_bad=True)).count, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(three)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
