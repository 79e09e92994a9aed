"""`finectl ls`: the artifacts of the workspace."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from finectl.cli import options as opt
from finectl.console import Console

LISTED_METHODS = "methods"
Kind = Annotated[
    str | None, typer.Argument(metavar="[KIND]", help="Only artifacts of this kind; methods: how init can start.")
]


def ls(kind: Kind = None, workspace: opt.Workspace = None, json_output: opt.Json = False) -> None:
    """List the artifacts of the workspace.

    A table on a terminal; in a pipe one path a line, so that `finectl ls model | xargs finectl verify` works. Damaged
    artifacts are named on stderr.
    """
    from finectl.artifacts.kinds import KINDS
    from finectl.artifacts.store import Artifact, Workspace
    from finectl.errors import UsageError
    from finectl.registry import nearest

    if kind == LISTED_METHODS:
        _list_methods(json_output)
        return
    if kind is not None and kind not in KINDS:
        raise UsageError(
            f"there is no kind {kind!r}{nearest(kind, [*KINDS, LISTED_METHODS])}",
            expected=f"one of: {', '.join([*KINDS, LISTED_METHODS])}",
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


def _list_methods(json_output: bool) -> None:
    """Print the initialisation methods: what each starts from, what it can, and where it is from."""
    from finectl.initializers import METHODS

    if json_output:
        for name, method in METHODS.items():
            sys.stdout.write(json.dumps({"method": name, **asdict(method)}) + "\n")
        return
    columns = ["method", "needs", "variants", "width", "updates", "what it does", "reference"]
    rows = [
        [
            name,
            "shapes only" if method.anew else method.sources[0],
            ", ".join(method.variants) or "-",
            "any" if method.widths else "its own",
            "--tune-steps" if method.tunes else "0",
            method.help,
            method.reference,
        ]
        for name, method in METHODS.items()
    ]
    Console(stream=sys.stdout).table("init --method", columns, rows)
