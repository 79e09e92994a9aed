"""Parts of a collection of weights: what `--shard` names, and what was made before. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from finectl.adapters.weight_dataset import FOLDER, KIND, SHARD_KIND, concept_file
from finectl.artifacts.files import staged, sync
from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact, open_artifact
from finectl.errors import FinectlError, UsageError


def parse_shard(text: str) -> tuple[int, int]:
    """Return i and n of `i/n`.

    Raises:
        UsageError: it is of another form, or i is not one of 1 to n.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard {text!r} is none", expected="such as 1/4, 2/4, 3/4 and 4/4")
    return int(number), int(count)


def take_parts(job: Job[Any], collection: str, names: Iterable[str]) -> int:
    """Link the weights that other parts of a collection hold, and return how many.

    Args:
        job: Of this part.
        collection: The hash of all that decides the weights, as other parts have it among their metrics.
        names: Of what is wanted; files are named after it.
    """
    taken = 0
    wanted = {concept_file(name) for name in names}
    (job.directory / FOLDER).mkdir(exist_ok=True)
    for artifact in _collections(job):
        if artifact.manifest.metrics.get("collection") != collection:
            continue
        for file in artifact.manifest.files:
            target = job.directory / file.path
            if file.path in wanted and not target.exists():
                _link(artifact.file(file.path), target)
                taken += 1
    sync(job.directory / FOLDER)
    return taken


def _collections(job: Job[Any]) -> Iterator[Artifact]:
    """Yield the whole artifacts of the workspace that hold weights; damaged ones are passed over."""
    for path in (*job.workspace.paths(KIND), *job.workspace.paths(SHARD_KIND)):
        with contextlib.suppress(FinectlError):
            yield open_artifact(path)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name; on another file system, or one without links, copy it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        with staged(target) as temporary:
            shutil.copyfile(source, temporary)
