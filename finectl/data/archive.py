"""Images in a zip file, read where they are: nothing is ever unpacked, so no name in it can lead anywhere. No torch."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from finectl.data.collection import MAX_FILE_BYTES
from finectl.data.layout import SUFFIXES, class_names, class_of, require_layout
from finectl.errors import InputError

MAC_FOLDER = "__MACOSX"  # what macOS adds of its own


class ZipImages:
    """The images in a zip file, laid out as in a folder; a single folder at the top is looked through.

    Args:
        path: The zip file.

    Attributes:
        top: The folder that is looked through, with a slash, which the names leave out; empty where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.title = str(path)

    def stamp(self) -> tuple[str, int]:
        """See `Collection.stamp`: size and time of change of the zip file."""
        status = self.path.stat()
        what = f"zip {os.path.realpath(self.path)}\0{status.st_size}\0{status.st_mtime_ns}"
        return hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest(), status.st_mtime_ns

    def text_stamp(self) -> tuple[str, int]:
        """Return what `stamp` does: captions are in the same file."""
        return self.stamp()

    def names(self) -> list[str]:
        """See `Collection.names`."""
        names = sorted(self._entries)
        require_layout(self.path, names)
        return names

    def class_of(self, name: str) -> str:
        """See `Collection.class_of`."""
        return class_of(name)

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """See `Collection.classes`."""
        return class_names(names)

    def read(self, name: str) -> bytes:
        """See `Collection.read`."""
        return self._read(self._entries[name])

    def beside(self, name: str) -> bytes | None:
        """Return another file of the archive, None when it is not there.

        Args:
            name: Its path in the archive, `top` included.

        Raises:
            OSError: it cannot be read.
            ValueError: it is too large.
        """
        try:
            return self._read(self._zip.getinfo(name))
        except KeyError:
            return None

    def _read(self, entry: zipfile.ZipInfo) -> bytes:
        if entry.file_size > MAX_FILE_BYTES:
            raise ValueError(f"{entry.file_size:,} bytes unpacked, more than the {MAX_FILE_BYTES:,} that are read")
        try:
            return self._zip.read(entry)  # never more than `file_size` bytes
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise OSError(str(error)) from error  # damaged, encrypted, or packed in a way that is not known

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is not a whole zip file: {error}", expected="a zip file of images"
            ) from error

    @property
    def top(self) -> str:
        """See the class."""
        return self._listing[0]

    @property
    def _entries(self) -> dict[str, zipfile.ZipInfo]:
        """Path without the common top folder to entry, images only."""
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[str, dict[str, zipfile.ZipInfo]]:
        found: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            parts = self._parts(entry)
            if parts and not any(part.startswith(".") or part == MAC_FOLDER for part in parts):
                found["/".join(parts)] = entry
        tops = {name.split("/", 1)[0] for name in found}
        if len(tops) == 1 and all("/" in name for name in found):
            return f"{tops.pop()}/", {name.split("/", 1)[1]: entry for name, entry in found.items()}
        return "", found

    def _parts(self, entry: zipfile.ZipInfo) -> tuple[str, ...]:
        """Return the parts of an image's path; none for what is no image.

        Raises:
            InputError: the path leads out of the archive. Nothing would be written there, but who made it meant harm.
        """
        name = entry.filename
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise InputError(
                f"{self.path} names the path {name[:200]!r}, which leads out of the archive",
                expected="relative paths without '..' and backslashes",
                fix="do not use this file unless you know who made it",
            )
        return () if entry.is_dir() or not name.lower().endswith(SUFFIXES) else pure.parts
