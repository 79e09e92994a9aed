"""Rows of a file that is mapped into memory: read at random by several threads, without holding the file in memory."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# What a process has read of a mapped file counts as its memory until it is told to let go of it.
HELD_BYTES = 64 << 20
# Each keeps a file open, of which a process may have 1,024 on many machines.
OPEN_SHARDS = 256


class MappedRows:
    """A table (count, *row) in a file.

    Args:
        path: The file, which must hold all of the table.
        offset: Byte at which the table begins.
        count: Rows.
        row: Shape of a row.
        dtype: numpy's name of the numbers' type ("uint8", "float16", "float32").
        held_bytes: What may be read before the pages are given back; less where many such tables are open.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        count: int,
        row: tuple[int, ...],
        dtype: str = "uint8",
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.path = path
        self.shape = (count, *row)
        self._dtype = np.dtype(dtype)
        self._row_bytes = math.prod(row) * self._dtype.itemsize
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(mmap.MADV_RANDOM)
        table = np.frombuffer(self._map, np.uint8, count * self._row_bytes, offset)
        self._rows = table.reshape(count, self._row_bytes)  # bytes, so that no table need be aligned
        self._offset = offset
        self._held = 0
        self._held_bytes = held_bytes

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, indices: Tensor) -> Tensor:
        """Return rows (B, *row) in memory of their own; the copy is made without Python's lock.

        Args:
            indices: int64 (B,), 0..count-1.

        Raises:
            IndexError: one of them is outside.
        """
        wanted = indices.numpy()
        if wanted.size and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} of {len(self)}")
        self._fetch(wanted)
        taken = np.empty((len(wanted), self._row_bytes), np.uint8)
        np.take(self._rows, wanted, axis=0, out=taken, mode="clip")  # the other modes copy twice
        self._let_go(taken.nbytes)
        return torch.from_numpy(taken.view(self._dtype).reshape(len(wanted), *self.shape[1:]))

    def _fetch(self, wanted: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Have the disk read all rows at once: they would else be waited for page by page."""
        for index in wanted.tolist():
            first = self._offset + index * self._row_bytes
            start = first - first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, first + self._row_bytes - start)

    def _let_go(self, taken: int) -> None:
        """Give pages back once in a while; they stay in the system's cache, and a reader meanwhile gets them again."""
        self._held += taken  # a race between threads only changes when the pages are given back
        if self._held > self._held_bytes:
            self._held = 0
            self._map.madvise(mmap.MADV_DONTNEED)


class Table(NamedTuple):
    """A table in a file: the byte at which it begins, and its rows."""

    path: Path
    offset: int
    rows: int


class ShardedRows:
    """Tables of rows of one shape in many files; several threads may read at once.

    Args:
        tables: Where each is.
        row: Shape of a row.
        dtype: numpy's name of the numbers' type.
    """

    def __init__(self, tables: Sequence[Table], row: tuple[int, ...], dtype: str) -> None:
        self.tables = tuple(tables)
        self.row = row
        self.dtype = dtype
        self._rows = lru_cache(maxsize=OPEN_SHARDS)(self._map)

    def _map(self, number: int) -> MappedRows:
        # Of hundreds of maps none may keep its pages: the kernel maps what lies around a row with it.
        return MappedRows(*self.tables[number], self.row, self.dtype, held_bytes=0)

    def take(self, tables: Tensor, rows: Tensor) -> Tensor:
        """Return rows (B, *row) in memory of their own.

        Args:
            tables: int64 (B,), of which table each is.
            rows: int64 (B,), which of its rows.
        """
        numbers = tables.unique().tolist()
        if len(numbers) == 1:
            return self._rows(numbers[0]).take(rows)
        read = torch.empty((len(rows), *self.row), dtype=getattr(torch, self.dtype))
        for number in numbers:
            places = (tables == number).nonzero().flatten()
            read[places] = self._rows(number).take(rows[places])
        return read
