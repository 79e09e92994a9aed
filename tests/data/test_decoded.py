"""The cache of decoded images: made once, checked, made again when damaged, shared by processes, ended by signals."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from images_on_disk import forbid, make_folder, whole
from PIL import Image

from finectl.artifacts.cache import cache_root
from finectl.console import Console
from finectl.data import decoded, workers
from finectl.data.dataset import load
from finectl.data.sources import DataOptions, describe
from finectl.errors import InputError, Interrupted, OutputError, ResourceError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images")


def test_nothing_is_decoded_or_read_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, pixels = whole(folder)
    forbid(monkeypatch, "_decode_one", "_header")
    again, same = whole(folder)
    assert again.info == first.info
    assert torch.equal(same, pixels)
    assert torch.equal(again.labels, first.labels)
    assert len(load(f"folder:{folder}", "heldout")) == 4


def test_a_copy_elsewhere_is_not_decoded_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pixels = whole(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)  # with other times of change
    forbid(monkeypatch, "_decode_one")
    assert torch.equal(whole(tmp_path / "copy")[1], pixels)


def test_another_size_or_filter_is_another_entry(folder: Path, cache: Path) -> None:
    bicubic = whole(folder, size=8)[1]
    box = whole(folder, DataOptions("box"), size=8)[1]
    assert bicubic.shape == box.shape
    assert not torch.equal(bicubic, box)
    assert whole(folder)[1].shape[-1] == 16
    assert len(list(cache.glob("images/*"))) == 3


def test_a_changed_file_is_noticed(folder: Path) -> None:
    first, pixels = whole(folder)
    path = folder / "cat" / "00.jpg"
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)  # of the same length; the time of change is another
    assert path.stat().st_size == status.st_size
    again, other = whole(folder)
    assert again.info.fingerprint != first.info.fingerprint
    assert not torch.equal(other[0], pixels[0])
    path.unlink()
    assert describe(f"folder:{folder}").count == 19


def test_describing_again_costs_a_look_at_each_file(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "0000.png")
    content = (tmp_path / "0000.png").read_bytes()
    for number in range(1, 1000):
        (tmp_path / f"{number:04}.png").write_bytes(content)
    info = describe(f"folder:{tmp_path}")
    start_s = time.perf_counter()
    assert describe(f"folder:{tmp_path}") == info
    assert time.perf_counter() - start_s < 0.5  # about 10 ms


def test_the_folders_order_is_that_of_the_sorted_paths(tmp_path: Path) -> None:
    from finectl.data.folder import image_files

    for number, name in enumerate(["a/x", "a-b/x", "a.b/x", "a0/x", "a/b/y", "a/b-c", "a/b.d", "A/z"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    files = image_files(tmp_path)
    assert files == sorted(files)
    assert len(files) == 8


def damaged_file(cache: Path) -> Path:
    (path,) = cache.glob("images/*/images.safetensors")
    return path


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:100],
        lambda content: b"",
        lambda content: content + b"x",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b'"U8"', b'"I8"', 1),
        lambda content: content.replace(b"[0, ", b"[8, ", 1),
        lambda content: content.replace(b"fingerprint", b"fingerprunt", 1),
        lambda content: content.replace(b"20, 3, 16, 16", b"20, 3, 8, 32 ", 1),
    ],
)
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], folder: Path, cache: Path) -> None:
    before, pixels = whole(folder)
    path = damaged_file(cache)
    changed = damage(path.read_bytes())
    assert changed != path.read_bytes()
    path.unlink()  # the old file stays mapped
    path.write_bytes(changed)
    said = StringIO()
    after, again = whole(folder, DataOptions(console=Console(stream=said)))
    assert torch.equal(again, pixels)
    assert torch.equal(after.labels, before.labels)
    assert str(path) in said.getvalue() and "made again" in said.getvalue()
    assert torch.equal(before.store.read(torch.arange(20)), pixels)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 1}', '{"version": 0}', '{"version": 1, "headers": 3}', "{" * 9]
)
def test_a_damaged_record_counts_as_none(text: str, folder: Path, cache: Path) -> None:
    info = describe(f"folder:{folder}")
    (record,) = cache.glob("listings/*")
    record.write_text(text)
    assert describe(f"folder:{folder}") == info
    assert len(record.read_text()) > 200


def test_the_file_is_read_by_the_safetensors_library(folder: Path, cache: Path) -> None:
    from safetensors.torch import load_file

    data, pixels = whole(folder)
    tensors = load_file(damaged_file(cache))
    assert torch.equal(tensors["images"], pixels)
    assert torch.equal(tensors["labels"], data.store.labels)


def test_nothing_is_left_beside_the_files(folder: Path, cache: Path) -> None:
    whole(folder)
    assert {path.name for path in (cache / "images").rglob("*") if path.is_file()} == {"images.safetensors"}


def test_what_a_killed_process_left_is_removed(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name != "images.safetensors":
            real(source, target)
            return
        shutil.copy(source, Path(source).with_name(Path(source).name.rsplit(".", 1)[0] + ".999999999"))
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(RuntimeError, match="killed"):
            whole(folder)
    (left,) = (path for path in (cache / "images").iterdir() if path.is_file())
    assert left.suffix == ".999999999"
    whole(folder)
    assert [path.is_dir() for path in (cache / "images").iterdir()] == [True]


BUILD = """
import sys, time
import finectl.data.decoded as decoded
real, count = decoded._decode_one, 0
def slow(*arguments):
    global count
    count += 1
    time.sleep(0.1)
    return real(*arguments)
decoded._decode_one = slow
from finectl.data.dataset import load
print("ready", flush=True)
sys.stdin.readline()
data = load(sys.argv[1])
print(count, data.info.fingerprint, int(data.images.double().sum() * 1000))
"""


def test_two_processes_at_once_decode_once(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILD, f"folder:{folder}"]
    pipe = subprocess.PIPE
    running = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) for _ in range(2)
    ]
    for process in running:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate() for process in running]
    lines = [out.split() for out, _ in said]
    assert sum("waiting for another process" in err for _, err in said) == 1
    assert sorted(int(line[0]) for line in lines) == [0, 20]
    assert lines[0][1:] == lines[1][1:]


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_refused_before_decoding(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "_decode_one")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ResourceError, match="no space left for the cache") as caught:
        whole(folder)
    assert "FINECTL_CACHE" in caught.value.fix
    assert list((cache / "images").iterdir()) == []


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_disk_that_fills_up_leaves_nothing(
    where: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "rename":
            patch.setattr("finectl.data.cache.os.replace", full)
        else:
            real = Path.open

            def opened(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
                stream = real(path, mode, *more, **options)
                if mode != "wb" or path.parent.name != "images":
                    return stream
                broken = type("Broken", (), {"write": full, "seek": stream.seek, "close": stream.close})
                return broken()

            patch.setattr(Path, "open", opened)
        with pytest.raises(ResourceError, match="no space left"):
            whole(folder)
    assert [path for path in (cache / "images").rglob("*") if path.is_file()] == []
    assert whole(folder)[0].info.count == 20


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("FINECTL_CACHE", str(tmp_path / "file" / "cache"))
    assert describe(f"folder:{folder}").count == 20
    with pytest.raises(OutputError, match="cannot be written") as caught:
        whole(folder)
    assert "FINECTL_CACHE" in caught.value.fix


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() != tmp_path / "xdg" / "finectl"
    monkeypatch.delenv("FINECTL_CACHE")
    assert cache_root() == tmp_path / "xdg" / "finectl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "finectl"


def test_images_that_change_while_they_are_decoded_are_not_kept(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = decoded._decode_one
    path = folder / "dog" / "01.jpg"

    def change(images: Any, name: str, form: Any) -> Any:
        if name == "cat/00.jpg":
            Image.new("RGB", (16, 16)).save(path)
        return real(images, name, form)

    describe(f"folder:{folder}")
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "_decode_one", change)
        with pytest.raises(InputError, match="changed while it was read"):
            load(f"folder:{folder}")
    assert [file for file in (cache / "images").rglob("*") if file.is_file()] == []
    assert whole(folder)[1][1:].shape[0] == 19


def test_slow_work_shows_its_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = StringIO(), StringIO()
    describe(f"folder:{folder}", options=DataOptions(console=Console(stream=quick)))
    assert quick.getvalue() == ""
    monkeypatch.setattr(workers, "PATIENCE_S", -1.0)
    load(f"folder:{folder}", options=DataOptions(console=Console(stream=slow)))
    assert "decoding images" in slow.getvalue() and "image=20 images=20" in slow.getvalue()
    silent = StringIO()
    load(f"folder:{folder}", image_size=8, options=DataOptions(console=Console(quiet=True, stream=silent)))
    assert silent.getvalue() == ""


def test_waiting_for_another_process_can_be_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    describe(f"folder:{folder}")

    def taken(*arguments: object) -> None:
        raise BlockingIOError

    def check() -> None:
        raise Interrupted("a signal came", saved=False)

    said = StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", taken)
        with pytest.raises(Interrupted):
            load(f"folder:{folder}", options=DataOptions(console=Console(stream=said), check=check))
    assert "waiting for another process" in said.getvalue()
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: fail_with(errno.ENOLCK))
    assert whole(folder)[0].info.count == 20  # without locks on this file system


def fail_with(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_slow_work_can_be_ended(folder: Path, cache: Path) -> None:
    seen: list[int] = []

    def check() -> None:
        seen.append(len(seen))
        if len(seen) > 4:
            raise Interrupted("a signal came", saved=False)

    with pytest.raises(Interrupted):
        load(f"folder:{folder}", options=DataOptions(check=check))  # three chunks of headers, the second one of pixels
    assert len(seen) == 5
    assert [path for path in (cache / "images").rglob("*") if path.is_file()] == []
    assert whole(folder)[0].info.count == 20


def test_describing_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from finectl.data.sources import *;"
        f"print(describe({f'folder:{folder}'!r}, options=DataOptions(skip_bad=True)).count, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "20 False\n"
