"""log.jsonl: one JSON object a line, each with its step; cut back to the saved step when work resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from finectl.artifacts.files import write_atomic
from finectl.errors import UsageError

NAME = "log.jsonl"
EVENTS = "tensorboard"


class Log:
    """Appends to the log of a run.

    Args:
        directory: The staging directory; None writes nothing, for a process that does not lead.
        from_step: Keep what an earlier run logged up to this step; the rest is logged again.
        tensorboard: Write the numbers as TensorBoard events too.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self, directory: Path | None, from_step: int, *, tensorboard: bool = False) -> None:
        self._stream = self._events = None
        if directory is None:
            return
        self.path = directory / NAME
        kept = [entry for entry in read_log(self.path) if entry["step"] <= from_step] if from_step else []
        write_atomic(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._stream = self.path.open("a", encoding="utf-8")
        if tensorboard:
            self._events = _event_writer(directory / EVENTS, from_step)

    def write(self, step: int, **values: Any) -> None:
        """Append one entry."""
        if self._stream is not None:
            self._stream.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, float):
                    self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put everything written so far on the disk, before the state that counts on it."""
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        if self._events is not None:
            self._events.flush()

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._stream, self._events):
            if stream is not None:
                stream.close()


def _event_writer(folder: Path, from_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs TensorBoard", fix="pip install 'finectl[tensorboard]'") from error
    return SummaryWriter(str(folder), purge_step=from_step + 1 if from_step else 0)


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
