"""Tensors on disk: safetensors files written atomically, checked before they are trusted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import disk_full, is_disk_full, staged
from finectl.errors import InputError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000
METADATA_KEY = "finectl"
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Any = None) -> None:
    """Write tensors to a safetensors file, atomically and with the same bytes for the same content.

    Args:
        path: Where the file goes.
        tensors: Name to tensor, any dtype and device.
        metadata: A JSON value kept in the header. It goes under one key, because the library writes several keys in an
            order that changes from run to run.

    Raises:
        ResourceError: the disk is full; a file that was there before is untouched.
    """
    from safetensors.torch import save_file

    content = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    header = None if metadata is None else {METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    try:
        with staged(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(content, temporary, metadata=header)
            temporary.chmod(mode)  # the library makes files that nobody else may read
    except Exception as error:
        if type(error).__module__.startswith("safetensors") and is_disk_full(error):
            raise disk_full(path) from error
        raise


def load_tensors(
    path: Path, device: str = "cpu", wanted: Callable[[str], bool] | None = None
) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file whose header has been checked.

    Args:
        path: The file.
        device: Where they go.
        wanted: Which of them, by their names; None for all.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    check_header(path)
    try:
        if wanted is None:
            return load_file(path, device=device)
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys()) if wanted(name)}
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise InputError(
                f"{path} is not a whole safetensors file: {error}", fix="make the artifact again with --force"
            ) from error
        raise


def read_header(path: Path) -> dict[str, Any]:
    """Return the JSON header of a safetensors file (name to dtype, shape and offsets) without reading the tensors.

    Raises:
        InputError: the file is missing, truncated or not safetensors.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise ValueError(f"its header would be {length} bytes long")
            header = json.loads(stream.read(length))
            size = os.fstat(stream.fileno()).st_size  # of this very file: another may take its name at any moment
        if not isinstance(header, dict):
            raise ValueError("its header is not a table")
        header["__data_start__"], header["__size__"] = 8 + length, size
        return header
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing", fix="make the artifact again with --force") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not a whole safetensors file: {error}", fix="make the artifact again with --force"
        ) from error


def read_metadata(path: Path) -> Any:
    """Return the JSON value that `save_tensors` put into the header, or None."""
    value = read_header(path).get("__metadata__", {}).get(METADATA_KEY)
    return None if value is None else json.loads(value)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name to shape for every tensor of a safetensors file, from the header alone."""
    return {name: tuple(info["shape"]) for name, info in read_header(path).items() if not name.startswith("__")}


def check_header(path: Path) -> None:
    """Check that the tensors which the header promises fill the file exactly.

    Raises:
        InputError: an offset, a size or the file's length does not fit.
    """
    header = read_header(path)
    start, size = header.pop("__data_start__"), header.pop("__size__")
    header.pop("__metadata__", None)
    end = 0
    try:
        for info in sorted(header.values(), key=lambda info: info["data_offsets"]):
            first, last = info["data_offsets"]
            if first != end or last - first != DTYPE_BYTES[info["dtype"]] * math.prod(info["shape"]):
                raise ValueError("the offsets in its header do not fit its tensors")
            end = last
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a broken header: {error}", fix="make the artifact again with --force") from error
    if size != start + end:
        raise InputError(
            f"{path} is truncated: it has {size:,} bytes",
            expected=f"{start + end:,} bytes, as its header says",
            fix="make the artifact again with --force",
        )
