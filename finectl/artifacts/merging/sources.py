"""The tensors that a merge reads: files whose headers were checked, and what a base lacks, made up on the way."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from finectl.artifacts.merging.numbers import FLOAT_CODES, Array, Bytes, byte_count, encode
from finectl.artifacts.tensors import check_header, read_header
from finectl.errors import InputError

Missing = Mapping[str, Callable[[tuple[int, ...]], Array]]
LISTED_DIFFERENCES = 3


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its stored type, its shape, and where its bytes begin in the file."""

    code: str
    shape: tuple[int, ...]
    start: int

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it can be merged; what is not is copied."""
        return self.code in FLOAT_CODES


class Source(Protocol):
    """What tensors are read from, in stretches of elements."""

    path: Path
    entries: dict[str, Entry]

    def read(self, name: str, first: int, target: Bytes) -> None:
        """Fill `target` with the stored elements of a tensor from element `first` on."""

    def prefetch(self, name: str, first: int, count: int) -> None:
        """Say that a stretch of elements will be read soon."""


class TensorFile:
    """A safetensors file that is open for reading in stretches; reading from several threads is safe.

    Raises:
        InputError: the file is missing, truncated, not safetensors, or its header lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_header(path)
        self.entries = _entries(path)
        self._handle = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)

    def read(self, name: str, first: int, target: Bytes) -> None:
        """Fill `target` with the stored elements of a tensor from element `first` on.

        Raises:
            InputError: the file cannot be read, or became shorter.
        """
        entry, done = self.entries[name], 0
        place = entry.start + byte_count(entry.code, first)
        while done < target.size:
            try:
                got = os.preadv(self._handle, [target.data[done:]], place + done)
            except OSError as error:
                raise InputError(f"{self.path} cannot be read: {error.strerror}") from error
            if not got:
                raise InputError(f"{self.path} became shorter while it was read", expected="a file that nobody writes")
            done += got

    def prefetch(self, name: str, first: int, count: int) -> None:
        """Ask the system to read a stretch of elements ahead, where it can."""
        entry = self.entries[name]
        place, length = entry.start + byte_count(entry.code, first), byte_count(entry.code, count)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, place, length, os.POSIX_FADV_WILLNEED)


class Extended:
    """A base together with tensors that it lacks and the models have, such as projections that start as the identity.

    Args:
        base: The base's own file.
        missing: Name to a function from the shape to the tensor's values. It may be called several times and must
            return the same values each time.
        like: The entries of the models, which say the shape and the stored type of what the base lacks.
    """

    def __init__(self, base: TensorFile, missing: Missing, like: Mapping[str, Entry]) -> None:
        self.path = base.path
        self._base = base
        lacking = [name for name in like if name not in base.entries and like[name].is_float]
        self._missing = {name: missing[name] for name in lacking if name in missing}
        self.entries = dict(base.entries) | {name: like[name] for name in self._missing}

    def read(self, name: str, first: int, target: Bytes) -> None:
        """Fill `target` with the stored elements of a tensor from element `first` on."""
        if name not in self._missing:
            self._base.read(name, first, target)
            return
        entry = self.entries[name]
        values = np.asarray(self._missing[name](entry.shape))
        if values.shape != entry.shape:
            raise InputError(
                f"what stands in for {name} in {self.path} has the shape {list(values.shape)}",
                expected=f"{list(entry.shape)}",
            )
        stretch = values.reshape(-1)[first : first + target.size // byte_count(entry.code, 1)]
        target[...] = encode(stretch.astype(np.float64), entry.code)

    def prefetch(self, name: str, first: int, count: int) -> None:
        """Ask the system to read a stretch of elements ahead, where it can."""
        if name not in self._missing:
            self._base.prefetch(name, first, count)


def check_same(reference: Source, other: Source) -> None:
    """Check that two sources hold tensors of the same names and shapes, of types that can be merged.

    Raises:
        InputError: they do not; the first differences are listed.
    """
    differences = []
    for name in sorted(reference.entries.keys() | other.entries.keys()):
        wanted, found = reference.entries.get(name), other.entries.get(name)
        if wanted is None or found is None:
            differences.append(f"{name} is {'missing' if found is None else 'only there'}")
        elif wanted.shape != found.shape:
            differences.append(f"{name} is {list(found.shape)}, not {list(wanted.shape)}")
        elif wanted.code != found.code and not (wanted.is_float and found.is_float):
            differences.append(f"{name} is of type {found.code}, not {wanted.code}")
    if differences:
        more = len(differences) - LISTED_DIFFERENCES
        listed = "; ".join(differences[:LISTED_DIFFERENCES]) + (f"; and {more:,} more" if more > 0 else "")
        raise InputError(
            f"{other.path} does not fit {reference.path}: {listed}",
            expected="models of one architecture, with tensors of the same names and shapes",
        )


def _entries(path: Path) -> dict[str, Entry]:
    """Return the tensors of a file whose header fits its size, in order of their place in it.

    Raises:
        InputError: the header holds something else than whole numbers that are not negative.
    """
    header = read_header(path)
    start = header.pop("__data_start__")
    del header["__size__"]
    header.pop("__metadata__", None)
    entries = {}
    for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, offsets = info["shape"], info["data_offsets"]
        if not _whole(shape) or not _whole(offsets) or not isinstance(shape, list):
            raise InputError(
                f"{path} has a broken header: the shape {str(shape)[:80]} and offsets {str(offsets)[:80]} of {name}",
                expected="whole numbers of at least 0",
                fix="make the artifact again with --force",
            )
        entries[name] = Entry(info["dtype"], tuple(shape), start + offsets[0])
    return entries


def _whole(values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)
