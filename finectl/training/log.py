"""log.jsonl: one JSON object a line, each with its step; cut back to the saved step when work resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from finectl.artifacts.files import write_atomic

NAME = "log.jsonl"


class Log:
    """Appends to the log of a run.

    Args:
        directory: The staging directory.
        from_step: Keep what an earlier run logged up to this step; the rest is logged again.
    """

    def __init__(self, directory: Path, from_step: int) -> None:
        self.path = directory / NAME
        kept = [entry for entry in read_log(self.path) if entry["step"] <= from_step] if from_step else []
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one entry."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")

    def sync(self) -> None:
        """Put everything written so far on the disk, before the state that counts on it."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the whole entries of a log; a line that a crash cut off is left out, and a missing file is empty."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries
