"""`finectl ls`: the artifacts of the workspace."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from finectl.cli import options as opt
from finectl.console import Console

Kind = Annotated[str | None, typer.Argument(metavar="[KIND]", help="Only artifacts of this kind.")]


def ls(kind: Kind = None, workspace: opt.Workspace = None, json_output: opt.Json = False) -> None:
    """List the artifacts of the workspace.

    A table on a terminal; in a pipe one path a line, so that `finectl ls model | xargs finectl verify` works. Damaged
    artifacts are named on stderr.
    """
    from finectl.artifacts.kinds import KINDS
    from finectl.artifacts.store import Artifact, Workspace
    from finectl.errors import UsageError
    from finectl.registry import nearest

    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"there is no kind {kind!r}{nearest(kind, list(KINDS))}", expected=f"one of: {', '.join(KINDS)}"
        )
    notes = Console()
    found: list[Artifact] = []
    place = Workspace(workspace)
    for item in place.artifacts():
        if isinstance(item, Artifact):
            if kind in (None, item.kind):
                found.append(item)
        else:
            notes.note(f"damaged: {item[0]}: {item[1].what}")
    if json_output:
        for artifact in found:
            manifest = artifact.manifest
            size = sum(file.bytes for file in manifest.files)
            line = {"path": str(artifact.path), "kind": manifest.kind, "created": manifest.created, "bytes": size}
            sys.stdout.write(json.dumps(line) + "\n")
    elif sys.stdout.isatty():
        rows = [
            [
                f"{artifact.kind}/{artifact.name}",
                artifact.manifest.created[:19].replace("T", " "),
                f"{sum(file.bytes for file in artifact.manifest.files) / 1e6:.1f}",
                str(artifact.manifest.cost.get("steps", 0) or ""),
            ]
            for artifact in found
        ]
        title = f"{len(found)} artifacts in {place.root}"
        Console(stream=sys.stdout).table(title, ["artifact", "created (UTC)", "MB", "steps"], rows)
    else:
        sys.stdout.writelines(f"{artifact.path}\n" for artifact in found)
