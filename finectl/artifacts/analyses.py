"""Analyses of which a command may choose some, each kept as soon as it is made. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.job import Job
from finectl.errors import UsageError
from finectl.registry import nearest


def parse_only(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return the analyses of `--only`, in their own order.

    Args:
        text: Names, separated by commas.
        known: All analyses.

    Raises:
        UsageError: one is none.
    """
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(
                f"--only {text!r}: there is no analysis {name!r}{nearest(name, list(known))}",
                expected=f"some of: {', '.join(known)}",
            )
    return tuple(name for name in known if name in names)


def kept(job: Job[Any], name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return an analysis that an interrupted run has made already, or make it and keep it."""
    file = job.state / f"{name}.json"
    if not file.is_file():
        write_json(file, compute())
    return read_json_object(file)
