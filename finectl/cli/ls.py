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
SHARES = {"what it does": 3, "reference": 2}  # of the room beside the name, where it is short
LEAST = {"updates": 12, "--set": 13}  # characters of what is not to be broken
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
    """Print the initialisation methods: what each starts from, what it can, what it costs and where it is from."""
    from finectl.cli import method_help as told
    from finectl.initializers import METHODS

    if json_output:
        for name, method in METHODS.items():
            line = {"method": name, **asdict(method), "needs": told.needs(method), "updates": told.updates(method)}
            sys.stdout.write(json.dumps(line) + "\n")
        return
    columns = {
        "method": list(METHODS),
        "what it does": [method.help for method in METHODS.values()],
        "needs": [told.needs(method) for method in METHODS.values()],
        "width": [told.width(method) for method in METHODS.values()],
        "updates": [told.updates(method) for method in METHODS.values()],
        "variants": [told.variants(method) or "-" for method in METHODS.values()],
        "--set": [told.constants(method) or "-" for method in METHODS.values()],
        "reference": [method.reference for method in METHODS.values()],
    }
    console = Console(stream=sys.stdout)
    if console.is_terminal:
        _draw(columns)
    else:
        console.table("init --method", list(columns), list(zip(*columns.values(), strict=True)))
    console.line(f"width: of the target, beside its source's\n{told.UPDATES}")


def _draw(columns: dict[str, list[str]]) -> None:
    """Draw the table as two, each with the first column: what is read, and what is looked up."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    terminal = RichConsole(file=sys.stdout)
    first, *others = columns
    for part in (list(SHARES), [name for name in others if name not in SHARES]):
        drawn = Table(box=None, padding=(0, 1, 0, 0))
        drawn.add_column(Text(first), no_wrap=True, style="bold")
        for name in part:
            drawn.add_column(Text(name), overflow="fold", ratio=SHARES.get(name), min_width=LEAST.get(name))
        for row in zip(columns[first], *(columns[name] for name in part), strict=True):
            drawn.add_row(*(Text(cell.replace(", ", ",\n") if "=" in cell else cell) for cell in row))
        terminal.print(drawn)
        terminal.print()
