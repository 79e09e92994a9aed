"""What finectl found out and keeps: `$FINECTL_CACHE`, else `~/.cache/finectl`.

Everything in it can be made again: an entry that is missing, damaged or of another version counts as not there.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from finectl.artifacts.files import sha256_file, sha256_json, write_atomic
from finectl.errors import ResourceError

VERSION = 1
SETTLED_NS = 2 * 10**9  # a file that changed just now may change again without a new time of change
LEAST_BYTES = 1 << 20  # a smaller file is hashed sooner than looked up


def cache_root() -> Path:
    """Return the directory of the cache, which need not exist: `$FINECTL_CACHE`, or `finectl` in the user's cache."""
    own = os.environ.get("FINECTL_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "finectl"


def read_record(stamp: str) -> dict[str, Any] | None:
    """Return what was written under a stamp by this version of finectl, or None."""
    try:
        record = json.loads(_record_file(stamp).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("version") == VERSION else None


def write_record(stamp: str, record: dict[str, Any]) -> None:
    """Keep a JSON value under a stamp; where the cache cannot be written it is found out again the next time."""
    with contextlib.suppress(OSError, ResourceError):
        path = _record_file(stamp)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({**record, "version": VERSION}, sort_keys=True).encode())


def _record_file(stamp: str) -> Path:
    return cache_root() / "listings" / f"{stamp}.json"


def remembered_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes; it is remembered for as long as the file does not change.

    A file counts as the same while its path, device, inode, size and times of change are.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    if status.st_size < LEAST_BYTES:
        return sha256_file(path)
    seen = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    stamp = sha256_json(["file", str(path.resolve()), *seen])
    known = (read_record(stamp) or {}).get("sha256")
    if isinstance(known, str):
        return known
    digest = sha256_file(path)
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        write_record(stamp, {"sha256": digest})
    return digest
