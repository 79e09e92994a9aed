"""Decoded images in the cache (`finectl.artifacts.cache`): their place, lock and writing. No torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from finectl.artifacts.cache import VERSION, cache_root
from finectl.artifacts.files import is_disk_full, sha256_json, sync
from finectl.errors import FinectlError, OutputError, ResourceError

POLL_S = 0.1
ELSEWHERE = "put the cache on another disk: FINECTL_CACHE=DIR"


def images_file(fingerprint: str, image_size: int, channels: int, resize_filter: str) -> Path:
    """Return where the decoded images of a data set are kept, once they are."""
    key = sha256_json([VERSION, fingerprint, image_size, channels, resize_filter])
    return cache_root() / "images" / key[:32] / "images.safetensors"


class locked:  # noqa: N801 - a context manager that reads like a function
    """Hold the lock of a piece of work, so that of several processes one does it and the others find it done.

    Where the file system knows no locks there is none; the work is then done more than once and the last one stays.

    Args:
        key: What the work makes.
        waiting: Called again and again while another process is at it; it may end the waiting by raising.
    """

    def __init__(self, key: str, waiting: Callable[[], None]) -> None:
        self.path = cache_root() / "locks" / key
        self._waiting = waiting
        self._file: IO[bytes]

    def __enter__(self) -> None:
        with refused_by_disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        try:
            while not self._taken():
                self._waiting()
                time.sleep(POLL_S)
        except BaseException:
            self._file.close()
            raise

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # which gives the lock back; the file stays, or two processes could lock two files


class Draft:
    """A file that is written bit by bit under a name of its own and then put in its place at once.

    Args:
        key: What is being made; what a killed process left of the same is removed.
        size: Bytes that it will take.

    Raises:
        ResourceError: the disk has not that much room.
        OutputError: the cache cannot be written.
    """

    def __init__(self, key: str, size: int) -> None:
        folder = cache_root() / "images"
        self.path = folder / f".{key}.{socket.gethostname()}.{os.getpid()}"
        with refused_by_disk(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{key}.{socket.gethostname()}.*"):
                if not _is_running(left.suffix[1:]):
                    left.unlink(missing_ok=True)
            if shutil.disk_usage(folder).free < size:
                raise no_room(self.path, size)
            self.stream = self.path.open("wb")

    def publish(self, target: Path) -> None:
        """Sync the file and give it its name."""
        with refused_by_disk(target):
            self.stream.close()
            sync(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path, target)
            sync(target.parent)

    def discard(self) -> None:
        """Remove the file unless it was published."""
        with contextlib.suppress(OSError):  # closing writes what is buffered, for which there may be no room
            self.stream.close()
        self.path.unlink(missing_ok=True)


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def refused_by_disk(path: Path) -> Iterator[None]:
    """Say what it means when the cache cannot be written."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise no_room(path) from error
        raise _unwritable(path, error) from error


def no_room(path: Path, size: int = 0) -> ResourceError:
    """Return the error of a cache that does not fit on its disk."""
    needed = f"; decoded images take {size / 1e6:,.0f} MB" if size else ""
    return ResourceError(
        f"no space left for the cache in {path.parent} "
        f"({shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are free there{needed})",
        expected="room for the decoded images, so that an epoch does not decode them again",
        fix=f"free some space, or {ELSEWHERE}",
    )


def _unwritable(path: Path, error: OSError) -> FinectlError:
    return OutputError(f"the cache {path} cannot be written: {error.strerror}", fix=ELSEWHERE)
