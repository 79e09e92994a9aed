"""Images in tar files as WebDataset writes them, read where they are: nothing is ever unpacked. No torch.

`000.jpg` and `000.txt` of one tar file are an image and its caption. A name in a tar file only tells which belong
together, so none can lead anywhere; links and whatever else is no file of its own are left out.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from finectl.data.collection import MAX_FILE_BYTES
from finectl.data.layout import FLAT_CLASS, SUFFIXES
from finectl.errors import InputError

TAR = ".tar"


class Place(NamedTuple):
    """A file in a tar file: which one, its first byte there, and its size."""

    tar: Path
    offset: int
    size: int


def tar_files(path: Path) -> list[Path]:
    """Return the tar files that a path names: itself, or those in a folder, in the order of their names."""
    if path.is_file():
        return [path] if path.suffix.lower() == TAR else []
    if not path.is_dir():
        return []
    return sorted(file for file in path.iterdir() if file.suffix.lower() == TAR and not file.name.startswith("."))


class TarImages:
    """The images in tar files, all of one class; a name is that of the tar file and of the image in it.

    Args:
        path: The tar file, or the folder of them.

    Attributes:
        top: See `finectl.data.archive.ZipImages`; nothing is looked through here.
    """

    top = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = str(path)
        self._tars = tar_files(path)

    def stamp(self) -> tuple[str, int]:
        """See `Collection.stamp`: path, size and time of change of every tar file."""
        status = [(tar, tar.stat()) for tar in self._tars]
        lines = [f"{os.path.realpath(tar)}\0{one.st_size}\0{one.st_mtime_ns}" for tar, one in status]
        digest = hashlib.sha256("\n".join(["tars", *lines]).encode("utf-8", "surrogateescape")).hexdigest()
        return digest, max(one.st_mtime_ns for _, one in status)

    def text_stamp(self) -> tuple[str, int]:
        """Return what `stamp` does: captions are in the same files."""
        return self.stamp()

    def names(self) -> list[str]:
        """See `Collection.names`."""
        found = sorted(name for name in self._places if name.lower().endswith(SUFFIXES))
        if not found:
            raise InputError(f"{self.path} holds no images", expected=f"files that end in {' '.join(SUFFIXES)}")
        return found

    def class_of(self, name: str) -> str:
        """See `Collection.class_of`."""
        return FLAT_CLASS

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """See `Collection.classes`."""
        return (FLAT_CLASS,) if names else ()

    def read(self, name: str) -> bytes:
        """See `Collection.read`."""
        place = self._places[name]
        if place.size > MAX_FILE_BYTES:
            raise ValueError(f"{place.size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read")
        with place.tar.open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.size)
        if len(content) != place.size:
            raise OSError(f"{place.tar} ends within it")
        return content

    def beside(self, name: str) -> bytes | None:
        """Return another file of the tar files, None when it is not there.

        Raises:
            OSError: it cannot be read.
            ValueError: it is too large.
        """
        return self.read(name) if name in self._places else None

    @cached_property
    def _places(self) -> dict[str, Place]:
        found: dict[str, Place] = {}
        for tar in self._tars:
            try:
                with tarfile.open(tar, "r:") as archive:  # no compression: files are read where they are
                    for member in archive:
                        if member.isreg() and not Path(member.name).name.startswith("."):
                            found[f"{tar.name}/{member.name}"] = Place(tar, member.offset_data, member.size)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise InputError(
                    f"{tar} is not a whole tar file: {error}",
                    expected="tar files without compression, as WebDataset writes them",
                    fix="copy or download it again, or unpack it: --data folder:PATH",
                ) from error
        return found
