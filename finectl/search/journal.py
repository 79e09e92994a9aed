"""search.jsonl: every measurement of a search, and who is making which, one JSON object a line.

    {"claim": [0.1, 0.5], "samples": 5000, "noise": 0, "owner": "host:pid:token", "time": 1760000000.0}
    {"candidate": [0.1, 0.5], "samples": 5000, "noise": 0, "value": 7.3, "interval": [7.2, 7.4], "owner": ...}
    {"release": [0.2, 0.5], "samples": 5000, "noise": 0, "owner": ...}

A line is appended by one write and synced before the search goes on. Several writers on one file system share the
file: the order of its lines decides who holds a claim, so that all read the same. A line that a crash cut off is
skipped, and the next writer begins a new one. Where a search says by what protocol it measures, each line names it, and
a file with lines of another is refused: their values cannot be compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finectl.artifacts.files import disk_full, is_disk_full, sync
from finectl.errors import InputError, OutputError
from finectl.search.base import Ask, Measured

NAME = "search.jsonl"
CLAIM_TIMEOUT_S = 3600.0


class Journal:
    """The journal of one search.

    Args:
        path: The file; it need not exist.
        timeout_s: Seconds after which a claim no longer counts, much longer than a measurement takes and than the
            clocks of the machines differ.
        protocol: What decides a value beside candidate, samples and noise, as a digest; "" where that is one anyway.
        owner: Who writes: `host:pid:token`; this process if None.
        clock: Seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        *,
        timeout_s: float = CLAIM_TIMEOUT_S,
        protocol: str = "",
        owner: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.protocol = protocol
        self.owner = owner or f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._clock = clock
        self._offset = 0
        self._history: list[Measured] = []
        self._done: set[Ask] = set()
        self._holders: dict[Ask, tuple[str, float]] = {}

    def history(self) -> list[Measured]:
        """Return everything measured so far, by whomever, in order of the file.

        Raises:
            InputError: the file holds measurements of another protocol.
        """
        self._read()
        return list(self._history)

    def append(self, measured: Measured) -> None:
        """Put a measurement on the disk; when this returns it survives a crash.

        Raises:
            ResourceError: the disk is full.
            OutputError: the file cannot be written to.
        """
        value = measured.value if math.isfinite(measured.value) else None
        interval = list(measured.interval) if measured.interval and all(map(math.isfinite, measured.interval)) else None
        self._write({"candidate": list(measured.candidate), **_key(measured.ask), "value": value, "interval": interval})

    def claim(self, ask: Ask) -> bool:
        """Take a measurement on, or renew the claim to it; False where it is made already or another holds it.

        Raises:
            ResourceError: the disk is full.
            OutputError: the file cannot be written to.
        """
        self._read()
        if ask in self._done:
            return False
        holder = self._holder(ask)
        if holder is not None and holder != self.owner:
            if not _is_dead(holder):
                return False
            self._write({"release": list(ask.candidate), **_key(ask)}, owner=holder)
        self._write({"claim": list(ask.candidate), **_key(ask)})
        self._read()
        return ask not in self._done and self._holder(ask) == self.owner

    def release(self, ask: Ask) -> None:
        """Give a claim back, so that another may take it at once."""
        self._write({"release": list(ask.candidate), **_key(ask)})

    def _holder(self, ask: Ask) -> str | None:
        owner, since = self._holders.get(ask, ("", -math.inf))
        return owner if self._clock() - since <= self.timeout_s else None

    def _write(self, entry: dict[str, Any], *, owner: str | None = None) -> None:
        who = {"owner": owner or self.owner, "time": self._clock()}
        how = {"protocol": self.protocol} if self.protocol else {}
        line = json.dumps({**entry, **who, **how}, allow_nan=False) + "\n"
        try:
            is_new = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                with contextlib.suppress(OSError):  # some network file systems have no locks, and append all the same
                    fcntl.flock(handle, fcntl.LOCK_EX)
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":
                    line = f"\n{line}"
                content = line.encode()
                while content:
                    content = content[os.write(handle, content) :]
                os.fsync(handle)
            finally:
                os.close(handle)
            if is_new:
                sync(self.path.parent)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.path) from error
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror}", expected="a file that can be appended to"
            ) from error

    def _read(self) -> None:
        """Take in the whole lines that were added since the last time."""
        try:
            with self.path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._forget()
                stream.seek(self._offset)
                added = stream.read()
        except FileNotFoundError:
            self._forget()
            return
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                self._take_in(json.loads(line))  # what is no entry was cut off by a crash

    def _forget(self) -> None:
        self._offset = 0
        self._history, self._done, self._holders = [], set(), {}

    def _take_in(self, entry: dict[str, Any]) -> None:
        kind = next(kind for kind in ("candidate", "claim", "release", "") if not kind or kind in entry)
        ask = Ask(tuple(map(float, entry[kind])), int(entry["samples"]), int(entry["noise"]))
        owner, moment = str(entry["owner"]), float(entry["time"])
        if entry.get("protocol", self.protocol) != self.protocol:
            raise InputError(
                f"{self.path} is the journal of another search: its models, data, objective or sampling differ",
                expected="measurements that can be compared",
                fix="name another file with --journal",
            )
        held_by, since = self._holders.get(ask, ("", -math.inf))
        if kind == "candidate":
            value = math.nan if entry["value"] is None else float(entry["value"])
            low_high = entry["interval"]
            interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
            self._history.append(Measured(ask.candidate, ask.samples, value, interval, ask.noise))
            self._done.add(ask)
        elif kind == "claim" and (held_by == owner or moment - since > self.timeout_s):
            self._holders[ask] = (owner, moment)
        elif kind == "release" and held_by == owner:
            del self._holders[ask]


def _key(ask: Ask) -> dict[str, int]:
    return {"samples": ask.samples, "noise": ask.noise}


def _is_dead(owner: str) -> bool:
    """Tell whether a process of this machine is known to be gone, so that nobody waits for its claims."""
    host, pid, *_ = (*owner.rsplit(":", 2), "", "")
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False
