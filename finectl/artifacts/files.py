"""Durable writes, digests and safe paths: the few file operations on which every promise of the store rests."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from finectl.errors import InputError, ResourceError

CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES = 255
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h
DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, content: bytes) -> None:
    """Put `content` under `path` so that a reader sees the old file or the whole new one, also after a power cut."""
    with staged(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json_object(path: Path, *, expected: str = "", fix: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}", expected=expected, fix=fix) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is a {type(values).__name__}", expected="an object")
    return values


class staged:  # noqa: N801 - a context manager that reads like a function
    """Give a temporary name beside `path`; on a clean exit sync it and rename it to `path`, otherwise remove it.

    Raises:
        ResourceError: the disk is full; the file that was under `path` before is untouched.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                sync(self.temporary)
                os.replace(self.temporary, self.path)
                sync(self.path.parent)
                return
        except OSError as late:
            error = late
            if not is_disk_full(late):
                raise
        finally:
            self.temporary.unlink(missing_ok=True)
        if error is not None and is_disk_full(error):
            raise disk_full(self.path) from error


def exchange(one: Path, two: Path) -> bool:
    """Exchange the names of two directories in one step, so that neither name is ever missing.

    Returns:
        Whether it was done: only Linux can do it, and not on every file system.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    result: int = renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE)
    return result == 0


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directories(root: Path) -> None:
    """Flush the entries of a directory and of all directories in it."""
    for folder, _, _ in os.walk(root):
        sync(Path(folder))


def is_disk_full(error: BaseException) -> bool:
    """Tell whether an exception, also one raised by the safetensors library as plain text, means a full disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRORS:
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)


def disk_full(path: Path) -> ResourceError:
    """Return the error that says which file system is full and how much is left on it."""
    try:
        left = f"{shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free there"
    except OSError:
        left = "its file system cannot be read"
    return ResourceError(
        f"no space left on the disk while writing {path} ({left})",
        expected="room for the file; what was saved before is intact",
        fix="free some space, then run the same command again: it goes on from the last saved state",
    )


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def path_inside(root: Path, relative: str) -> Path:
    """Return `root / relative` for a path that a manifest names, refusing every way out of `root`.

    Raises:
        InputError: the path is absolute, has a `..` part, or leads out of `root` through a link.
    """
    pure = PurePosixPath(relative)
    leads_out = not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative
    if leads_out or "\0" in relative or any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in pure.parts):
        raise InputError(
            f"the manifest of {root} names the path {relative[:300]!r}, which leads out of the artifact",
            expected="relative paths without '..'",
            fix=f"do not use this artifact; see who wrote it: finectl show {root}",
        )
    path = root / pure
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{path} is a link that leads out of the artifact", expected="files inside the artifact's directory"
        )
    return path


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it; nothing happens when it is not there."""
    shutil.rmtree(path, ignore_errors=False) if path.exists() else None
