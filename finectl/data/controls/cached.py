"""Control maps in the cache: measured once, uint8 (count, c, H, W) in one file, read through a memory map.

What a file holds depends on the images and on the control alone. It is written batch by batch, so that a run that was
killed goes on with the images that are missing.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.cache import cache_root
from finectl.artifacts.files import sha256_json
from finectl.artifacts.tensors import METADATA_KEY, check_header, read_header, read_metadata
from finectl.console import Console
from finectl.data.cache import locked, no_room, refused_by_disk
from finectl.data.controls import Extractor
from finectl.data.mapped import MappedRows
from finectl.data.sources import DataOptions
from finectl.data.workers import in_order
from finectl.errors import InputError

VERSION = 1
NAME = "controls.safetensors"
TENSOR = "controls"
PAGE = 4096  # room for the header, which is written last
BATCH = 16
"""Images measured at a time: what is lost at most when a run is killed."""


@dataclass(frozen=True)
class MapsFile:
    """Which maps: their place in the cache follows from it.

    Args:
        digest: Of the control (`ControlInfo.digest`).
        images: Fingerprint of the images, and how they were brought to their size.
        shape: (count, c, H, W).
    """

    digest: str
    images: str
    shape: tuple[int, int, int, int]

    @property
    def key(self) -> str:
        """What names the entry."""
        return sha256_json([VERSION, self.digest, self.images, list(self.shape)])[:32]

    @property
    def path(self) -> Path:
        """The file."""
        return cache_root() / "controls" / self.key / NAME

    @property
    def row_bytes(self) -> int:
        """Bytes of one map."""
        return self.shape[1] * self.shape[2] * self.shape[3]

    def opened(self) -> MappedRows | None:
        """Open the file; None when it is not there, or not whole."""
        try:
            check_header(self.path)
            header = read_header(self.path)
            found = header[TENSOR]["dtype"], tuple(header[TENSOR]["shape"]), header[TENSOR]["data_offsets"][0]
            if found != ("U8", self.shape, 0) or read_metadata(self.path)["control"] != self.digest:
                return None
            return MappedRows(self.path, int(header["__data_start__"]), self.shape[0], self.shape[1:])
        except (InputError, OSError, ValueError, KeyError, TypeError):
            return None


def open_maps(
    file: MapsFile,
    pixels: Callable[[Tensor], Tensor],
    extractor: Callable[[], Extractor],
    *,
    threads: bool,
    console: Console,
    check: Callable[[], None],
) -> MappedRows:
    """Return the maps of images; what the cache does not hold is measured, and goes on where it was left.

    Args:
        file: Which maps.
        pixels: Positions int64 (B,) to their images, uint8 (B, C, H, W) on the CPU.
        extractor: Gives what measures them; it is called when some are missing.
        threads: Whether several threads may measure at once.
        console: Where progress is shown.
        check: Called between batches; it ends the work by raising.

    Raises:
        InputError: the file was removed while it was read.
        ResourceError: the disk is full.
    """
    maps = file.opened()
    said: list[str] = []

    def waiting() -> None:
        if not said:
            said.append("waiting for another process that measures these controls")
            console.note(said[0])
        check()

    if maps is None:
        with locked(f"controls-{file.key}", waiting):
            maps = file.opened()
            if maps is None:
                _write(file, pixels, extractor(), threads, DataOptions(console=console, check=check))
                maps = file.opened()
    if maps is None:
        raise InputError(f"{file.path} was changed while it was read", fix="run the same command again")
    return maps


def _write(
    file: MapsFile, pixels: Callable[[Tensor], Tensor], extractor: Extractor, threads: bool, options: DataOptions
) -> None:
    """Write the file batch by batch, after those batches that are there; the lock is held."""
    count, row_bytes, path = file.shape[0], file.row_bytes, file.path
    part = path.with_name(f".{NAME}.{socket.gethostname()}")
    with refused_by_disk(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = max(0, part.stat().st_size - PAGE) if part.exists() else 0
        done = min(held // (row_bytes * BATCH) * BATCH, count)
        free = os.statvfs(path.parent)
        if free.f_bavail * free.f_frsize < PAGE + row_bytes * (count - done):
            raise no_room(part, PAGE + row_bytes * (count - done))
        stream = part.open("r+b" if part.exists() else "w+b")
    with stream:
        with refused_by_disk(part):
            stream.truncate(PAGE + row_bytes * done)
            stream.seek(PAGE + row_bytes * done)
        for maps in _measured(file, pixels, extractor, threads, options, done):
            with refused_by_disk(part):
                stream.write(maps.contiguous().numpy().tobytes())
        header: dict[str, Any] = {
            "__metadata__": {METADATA_KEY: json.dumps({"control": file.digest})},
            TENSOR: {"dtype": "U8", "shape": list(file.shape), "data_offsets": [0, count * row_bytes]},
        }
        with refused_by_disk(part):
            stream.flush()
            os.fsync(stream.fileno())
            stream.seek(0)
            stream.write((PAGE - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(PAGE - 8))
            stream.flush()
            os.fsync(stream.fileno())
    with refused_by_disk(path):
        os.replace(part, path)


def _measured(
    file: MapsFile,
    pixels: Callable[[Tensor], Tensor],
    extractor: Extractor,
    threads: bool,
    options: DataOptions,
    done: int,
) -> Iterator[Tensor]:
    """Give the maps of the images from `done` on, batch by batch in their order."""

    def measure(positions: Tensor) -> Tensor:
        found = extractor(pixels(positions))
        if found.dtype != torch.uint8 or tuple(found.shape) != (len(positions), *file.shape[1:]):
            raise ValueError(f"maps {tuple(found.shape)} of {found.dtype}, not {file.shape[1:]} of bytes")
        return found

    if threads:
        images = range(done, file.shape[0])
        yield from in_order(images, lambda image: measure(torch.tensor([image])), options, "measuring controls")
        return
    with (options.console or Console()).progress("measuring controls", file.shape[0], unit="image", done=done) as bar:
        for positions in torch.arange(done, file.shape[0]).split(BATCH):
            if options.check is not None:
                options.check()
            yield measure(positions)
            bar.advance(len(positions), samples=len(positions))
