"""Rows in the cache that take long to make: one safetensors file, written batch by batch, read through a memory map.

The header is written last, so that a file is whole or none; killed work goes on with the rows that are missing.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from finectl.artifacts.tensors import METADATA_KEY, check_header, read_header, read_metadata
from finectl.console import Console
from finectl.data.cache import locked, no_room, refused_by_disk
from finectl.data.mapped import MappedRows
from finectl.errors import InputError

PAGE = 4096  # room for the header
SAFETENSORS_TYPES = {"uint8": "U8", "float16": "F16"}


@dataclass(frozen=True)
class RowFile:
    """Which rows, and where.

    Args:
        path: The file.
        tensor: What the rows are called in it.
        dtype: numpy's name of the numbers' type, a key of `SAFETENSORS_TYPES`.
        shape: (N, ...).
        maker: What made the rows, and its digest; it is in the file's metadata.
    """

    path: Path
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    maker: tuple[str, str]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def opened(self) -> MappedRows | None:
        """Open the file; None when it is not there, not whole, or another's."""
        try:
            check_header(self.path)
            header = read_header(self.path)
            found = header[self.tensor]
            told = found["dtype"], tuple(found["shape"]), found["data_offsets"][0]
            made_by, digest = self.maker
            if told != (SAFETENSORS_TYPES[self.dtype], self.shape, 0) or read_metadata(self.path)[made_by] != digest:
                return None
            return MappedRows(self.path, int(header["__data_start__"]), self.shape[0], self.shape[1:], self.dtype)
        except (InputError, OSError, ValueError, KeyError, TypeError):
            return None

    def made(
        self,
        rows: Callable[[int], Iterator[Tensor]],
        batch: int,
        work: str,
        console: Console,
        check: Callable[[], None],
    ) -> MappedRows:
        """Open the file, after writing what it lacks; of several processes one writes, and the others wait.

        Args:
            rows: Gives the rows from that one on, in their order, some (n, ...) at a time, on the CPU.
            batch: Rows that are kept together: so many are lost at most when the work is killed.
            work: What a process that waits says that the other one does.
            console: Where it says so.
            check: Called while it waits; it ends the wait by raising.

        Raises:
            InputError: the file was removed while it was read.
            ResourceError: the disk is full.
        """
        mapped = self.opened()
        said: list[str] = []

        def waiting() -> None:
            if not said:
                said.append(f"waiting for another process that {work}")
                console.note(said[0])
            check()

        if mapped is None:
            with locked(f"{self.path.parent.parent.name}-{self.path.parent.name}", waiting):
                mapped = self.opened()
                if mapped is None:
                    self._write(rows, batch)
                    mapped = self.opened()
        if mapped is None:
            raise InputError(f"{self.path} was changed while it was read", fix="run the same command again")
        return mapped

    def _write(self, rows: Callable[[int], Iterator[Tensor]], batch: int) -> None:
        """Write the file after those batches that are there; the lock is held."""
        count = self.shape[0]
        part = self.path.with_name(f".{self.path.name}.{socket.gethostname()}")
        with refused_by_disk(part):
            part.parent.mkdir(parents=True, exist_ok=True)
            held = max(0, part.stat().st_size - PAGE) if part.exists() else 0
            done = min(held // (self.row_bytes * batch) * batch, count)
            free = os.statvfs(part.parent)
            wanted = PAGE + self.row_bytes * (count - done)
            if free.f_bavail * free.f_frsize < wanted:
                raise no_room(part, wanted)
            stream = part.open("r+b" if part.exists() else "w+b")
        with stream:
            with refused_by_disk(part):
                stream.truncate(PAGE + self.row_bytes * done)
                stream.seek(PAGE + self.row_bytes * done)
            for some in rows(done):
                before, done = done, done + len(some)
                with refused_by_disk(part):
                    stream.write(some.contiguous().numpy().tobytes())
                    if done // batch > before // batch or done == count:
                        _sync(stream)
            with refused_by_disk(part):
                stream.seek(0)
                stream.write((PAGE - 8).to_bytes(8, "little") + self._header().ljust(PAGE - 8))
                _sync(stream)
        with refused_by_disk(self.path):
            os.replace(part, self.path)

    def _header(self) -> bytes:
        header: dict[str, Any] = {
            "__metadata__": {METADATA_KEY: json.dumps(dict([self.maker]))},
            self.tensor: {
                "dtype": SAFETENSORS_TYPES[self.dtype],
                "shape": list(self.shape),
                "data_offsets": [0, self.shape[0] * self.row_bytes],
            },
        }
        return json.dumps(header).encode()


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
