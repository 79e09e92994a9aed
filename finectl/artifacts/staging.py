"""Staging: the locked directory in which an artifact grows, and its atomic publication.

The order of the steps is what makes a crash harmless at every one of them:

1. the work writes files and its resume state (`state/`) into `.<name>.partial/`;
2. the manifest is written there last, so a staging directory with a manifest is finished work;
3. the resume state and the note of the owner are removed;
4. one rename gives the directory its name, and `latest` is moved to it by another.

A crash before 2 is resumed from the state, a crash after 2 is finished by the next run, without the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from finectl.artifacts.files import (
    exchange,
    is_disk_full,
    path_inside,
    remove_tree,
    sha256_file,
    sync,
    sync_directories,
    write_atomic,
    write_json,
)
from finectl.artifacts.manifest import NAME, FileRecord, read_manifest
from finectl.artifacts.store import LATEST, REPLACED_SUFFIX
from finectl.errors import OutputError

STATE = "state"
OWNER = "owner.json"
RECIPE = "recipe"
# A process that looks at the workspace holds a lock for an instant; one at work holds it for long.
LOCK_ATTEMPTS = 5
LOCK_PAUSE_S = 0.05


class Staging:
    """The staging directory of one artifact, held by this process alone until `close`.

    Args:
        final: The directory that the artifact will have.
        recipe: The recipe's hash; staging of another recipe (possible under `--out`) is in the way.
        fresh: Drop what an earlier run left there, of whatever recipe, instead of going on from it.

    Raises:
        OutputError: another process holds it, it belongs to another recipe, or it cannot be made (exit code 4).
    """

    def __init__(self, final: Path, recipe: str, *, fresh: bool = False) -> None:
        self.final = final
        self.recipe = recipe
        self.path = final.with_name(f".{final.name}.partial")
        self._replaced = final.with_name(f".{final.name}{REPLACED_SUFFIX}")
        self._lock = self._acquire()
        try:
            if self._replaced.is_dir() and not final.exists():
                os.rename(self._replaced, final)  # a crash in the middle of a replacement
            self._discard_replaced()
            if fresh:
                self.clear()
                (self.path / RECIPE).unlink(missing_ok=True)
            self._claim()
        except BaseException:
            self.close()
            raise

    def _acquire(self) -> int:
        """Lock the directory itself: the lock dies with the process, and leaves no file behind."""
        refused = 0
        while True:
            handle = self._open()
            if handle is None:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                refused += 1
                if refused < LOCK_ATTEMPTS:
                    time.sleep(LOCK_PAUSE_S)
                    continue
                raise OutputError(
                    f"{self.final} is being made by {self._owner()}",
                    expected="one process for one recipe",
                    fix="wait until it is done, then run the same command again: it prints the finished artifact",
                ) from None
            if self._is_current(handle):
                return handle
            os.close(handle)  # published or removed between opening and locking it: look again

    def _open(self) -> int | None:
        """Make the directory if need be and open it; None when it vanished in between."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if is_disk_full(error):
                raise
            raise OutputError(
                f"{self.path} cannot be made: {error.strerror}",
                expected="a directory that can be written to",
                fix="choose another --workspace or --out",
            ) from error
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{self.path} cannot be opened: {error.strerror}", fix="choose another --out") from error

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _owner(self) -> str:
        try:
            owner = json.loads((self.path / OWNER).read_text())
            return f"process {owner['pid']} on {owner['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def _claim(self) -> None:
        recipe = self.path / RECIPE
        found = recipe.read_text() if recipe.exists() else self.recipe
        if found != self.recipe:
            raise OutputError(
                f"{self.path} holds unfinished work of another recipe ({found[:8]}, not {self.recipe[:8]})",
                expected="an output directory of its own for each recipe",
                fix=f"finish that work, or start afresh with --no-resume, or remove it: rm -r {self.path}",
            )
        if self.finished and not recipe.exists() and read_manifest(self.path).recipe != self.recipe:
            raise OutputError(
                f"{self.path} holds a finished artifact of another recipe that only has to be published",
                expected="an output directory of its own for each recipe",
                fix=f"run the command that made it again, or start afresh with --no-resume, or: rm -r {self.path}",
            )
        write_json(self.path / OWNER, {"pid": os.getpid(), "host": socket.gethostname()})
        write_atomic(recipe, self.recipe.encode())

    @property
    def finished(self) -> bool:
        """Whether the work is done and only the publication is missing."""
        return (self.path / NAME).exists()

    @property
    def state(self) -> Path:
        """The directory of the resume state; it is never part of the artifact."""
        path = self.path / STATE
        path.mkdir(exist_ok=True)
        return path

    def clear(self) -> None:
        """Drop everything in the staging directory, the resume state too."""
        for entry in sorted(self.path.iterdir()):
            if entry.name in (OWNER, RECIPE):
                continue
            remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def records(self, known: Mapping[str, str] | None = None) -> list[FileRecord]:
        """Sync and hash every file that will be part of the artifact, in order of path.

        Args:
            known: The SHA-256 of files, by path, that need not be read again.
        """
        found = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if path.is_file() and not _is_bookkeeping(relative):
                sync(path)
                name = relative.as_posix()
                digest = (known or {}).get(name) or sha256_file(path)
                found.append(FileRecord(name, path.stat().st_size, digest))
        return found

    def publish(self, *, replace: bool = False) -> Path:
        """Give the finished staging directory its final name and move `latest` to it.

        Args:
            replace: Whether an artifact already under that name gives way (`--force`); it is removed only when the new
                one is in place.

        Raises:
            OutputError: something is under the final name and may not be replaced.
        """
        taken = self.final.exists() and any(self.final.iterdir())
        if taken and not (replace and (self.final / NAME).is_file()):
            raise OutputError(
                f"{self.final} is in the way", fix="choose another --out, or replace an artifact with --force"
            )
        remove_tree(self.path / STATE)
        for name in (OWNER, RECIPE):
            (self.path / name).unlink(missing_ok=True)
        for stray in self.path.rglob(".*.tmp"):
            stray.unlink()
        sync_directories(self.path)
        if taken and exchange(self.path, self.final):
            os.rename(self.path, self._replaced)
        else:
            if taken:
                os.rename(self.final, self._replaced)
            os.rename(self.path, self.final)
        sync(self.final.parent)
        self._discard_replaced()
        return self.final

    def _discard_replaced(self) -> None:
        """Remove a replaced artifact under a name from which nothing is put back: removal may stop half-way."""
        discarded = self.final.with_name(f".{self.final.name}.discarded")
        if self._replaced.is_dir():
            remove_tree(discarded)
            os.rename(self._replaced, discarded)
        remove_tree(discarded)

    def discard_if_empty(self) -> None:
        """Remove the staging directory when no work has been saved in it; once published, it may be another's."""
        if not self._is_current(self._lock):
            return
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        state_saved = (self.path / STATE).exists() and any((self.path / STATE).iterdir())
        if not state_saved and NAME not in entries:
            remove_tree(self.path)

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)


def point_latest(final: Path) -> None:
    """Make `latest` beside a published artifact name it, in one step."""
    temporary = final.parent / f".{LATEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    os.symlink(final.name, temporary)
    os.replace(temporary, final.parent / LATEST)
    sync(final.parent)


def _is_bookkeeping(relative: Path) -> bool:
    """Tell whether a staged file serves the store and not the artifact."""
    hidden_temporary = relative.name.startswith(".") and relative.name.endswith(".tmp")
    return relative.parts[0] in (STATE, OWNER, RECIPE, NAME) or hidden_temporary


def check_records(directory: Path, records: list[FileRecord]) -> bool:
    """Tell whether every file of a finished staging directory is there with its size."""
    for record in records:
        path = path_inside(directory, record.path)
        if not path.is_file() or path.stat().st_size != record.bytes:
            return False
    return True
