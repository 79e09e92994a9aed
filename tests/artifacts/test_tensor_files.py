"""safetensors files: the same bytes for the same content, and headers that are checked before they are trusted."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_safetensors

from finectl.artifacts.tensors import check_header, load_tensors, read_metadata, save_tensors, tensor_shapes
from finectl.errors import InputError, ResourceError


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.arange(6.0).reshape(2, 3).T,
        "a": torch.tensor([1, 2]),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_tensors(path, tensors, {"step": 3, "x": [1.5]})
    loaded = load_tensors(path)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    assert read_metadata(path) == {"step": 3, "x": [1.5]}
    assert tensor_shapes(path) == {name: tuple(value.shape) for name, value in tensors.items()}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_order_of_the_names_does_not_change_a_byte(tmp_path: Path) -> None:
    one, two = torch.ones(3), torch.zeros(2)
    save_tensors(tmp_path / "1", {"a": one, "b": two}, {"k": 1, "l": 2})
    save_tensors(tmp_path / "2", {"b": two, "a": one}, {"l": 2, "k": 1})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize("length", [0, 7, 8, 20, -1, -9])
def test_every_truncation_is_noticed(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(4)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"truncated|not a whole") as caught:
        load_tensors(path)
    assert caught.value.fix


def file_with(header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        file_with({"x": {"dtype": "U8", "shape": [9], "data_offsets": [0, 8]}}),
        file_with({"x": {"dtype": "U8", "shape": [8], "data_offsets": [1, 9]}}),
        file_with({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}),
        file_with({"x": {"dtype": "what", "shape": [8], "data_offsets": [0, 8]}}),
        file_with({"x": {"dtype": "U8", "shape": [8]}}),
        file_with({"x": [0, 8]}),
        file_with({"x": {"dtype": "U8", "shape": 8, "data_offsets": [0, 8]}}),
        file_with({"x": {"dtype": "U8", "shape": [-2, -4], "data_offsets": [0, 8]}}),
        file_with({"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}, data=b"\0" * 9),
        file_with([1]),
        file_with(b"\xff\xff"),
        file_with(b"[" * 200_000),
        file_with({}, length=2**62),
        b"PK\x03\x04 a pickle in a zip",
    ],
)
def test_headers_that_lie(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError):
        load_tensors(path)


def test_the_small_file_of_the_other_tests_is_sound(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(tiny_safetensors())
    check_header(tmp_path / "x")
    assert load_tensors(tmp_path / "x")["x"].tolist() == [0] * 8


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is missing"):
        load_tensors(tmp_path / "none")


def test_a_full_disk_as_the_library_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(1)})
    before = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(ResourceError, match="no space left"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_others_may_read_the_file_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
