"""`finectl verify`: hash artifacts again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.cli import options as opt

if TYPE_CHECKING:
    from finectl.artifacts.store import Artifact, Workspace
    from finectl.errors import FinectlError


def verify(inputs: opt.Inputs = None, workspace: opt.Workspace = None, json_output: opt.Json = False) -> None:
    """Hash artifacts again and check them against their manifests; without INPUT, the whole workspace.

    Prints the path of every sound artifact. Damage is one error block each, and exit code 3.
    """
    from finectl.artifacts.store import Artifact, Workspace, verify_artifacts
    from finectl.console import Console
    from finectl.errors import FinectlError, InputError
    from finectl.runner import STDIN, read_stdin

    place = Workspace(workspace)
    console = Console()
    names = [name for text in inputs or [] for name in (read_stdin() if text == STDIN else [text])]
    candidates = [_open(place, name) for name in names] if names else list(place.artifacts())
    damaged = 0
    for item in candidates:
        try:
            if not isinstance(item, Artifact):
                raise item[1]
            verify_artifacts([item])
        except FinectlError as error:
            damaged += 1
            console.error(error)
            path, sound = (item.path if isinstance(item, Artifact) else item[0]), False
        else:
            path, sound = item.path, True
        if json_output:
            sys.stdout.write(json.dumps({"path": str(path), "sound": sound}) + "\n")
        elif sound:
            sys.stdout.write(f"{path}\n")
    if damaged:
        raise InputError(
            f"{damaged} of {len(candidates)} artifacts are damaged", expected="the content that was published"
        )
    console.note(f"{len(candidates)} artifacts are sound")


def _open(place: Workspace, name: str) -> Artifact | tuple[Path, FinectlError]:
    """Return the artifact of a name, or what is wrong with it: one damaged INPUT does not hide the others."""
    from finectl.errors import FinectlError

    try:
        return place.find(name, ())
    except FinectlError as error:
        return Path(name), error
