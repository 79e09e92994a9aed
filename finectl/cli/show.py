"""`finectl show`: what an artifact is, what it was made from, what lies in it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from finectl.cli import options as opt

if TYPE_CHECKING:
    from finectl.artifacts.lineage import Ancestry
    from finectl.artifacts.store import Artifact

PICTURES = (".png",)


def show(input: opt.Input = None, workspace: opt.Workspace = None, json_output: opt.Json = False) -> None:
    """Show what an artifact is and where it comes from: configuration, metrics, cost, lineage, pictures, files."""
    from finectl.artifacts.lineage import trace
    from finectl.artifacts.store import Workspace
    from finectl.console import Console
    from finectl.runner import STDIN, read_stdin

    place = Workspace(workspace)
    text = read_stdin()[-1] if input == STDIN else input
    if text is None:
        artifact = place.newest_of_all()
        Console().note(f"no INPUT given: showing the newest artifact, {artifact.path}")
    else:
        artifact = place.find(text, ())
    if json_output:
        sys.stdout.write(json.dumps({"path": str(artifact.path), **asdict(artifact.manifest)}) + "\n")
        return
    sys.stdout.write("\n".join([*_describe(artifact), "", "lineage:", *_tree(trace(place, artifact)), ""]))


def _describe(artifact: Artifact) -> list[str]:
    """Return the manifest for people: one `key: value` a line, and the files with their sizes."""
    import yaml

    manifest = artifact.manifest
    parts = {
        "artifact": f"{manifest.kind}/{artifact.name}",
        "path": str(artifact.path),
        "made by": " ".join(manifest.command),
        "created": manifest.created,
        "digest": manifest.digest,
        "data": manifest.data or None,
        "config": manifest.config,
        "metrics": manifest.metrics or None,
        "cost": manifest.cost,
        "execution": manifest.execution,
        "environment": manifest.environment,
    }
    kept = {key: value for key, value in parts.items() if value is not None}
    lines = yaml.safe_dump(kept, sort_keys=False, width=120, allow_unicode=True).rstrip().splitlines()
    pictures = [file for file in manifest.files if file.path.endswith(PICTURES)]
    others = [file for file in manifest.files if not file.path.endswith(PICTURES)]
    lines += ["files:", *(f"  {file.path}  {file.bytes:,} bytes" for file in others)]
    if pictures:
        shown = [file for file in pictures if not file.path.startswith("samples/")]
        lines += ["pictures:", *(f"  {artifact.path / file.path}" for file in shown)]
        if len(shown) < len(pictures):
            lines.append(f"  {artifact.path / 'samples'}/  ({len(pictures) - len(shown)} images)")
    return lines


def _tree(ancestry: Ancestry, indent: str = "", branch: str = "") -> list[str]:
    """Return the lineage as a tree, the artifact first and what it was made from below it."""
    from finectl.artifacts.lineage import Ancestry

    manifest = ancestry.artifact.manifest
    cost = f"{manifest.cost.get('steps', 0)} steps, {manifest.cost.get('wall_s', 0):.0f} s"
    lines = [f"{indent}{branch}{manifest.kind}/{ancestry.artifact.name}  ({manifest.stage}: {cost})"]
    below = indent + ({"": "", "├── ": "│   ", "└── ": "    "}[branch])
    for index, parent in enumerate(ancestry.parents):
        last = index == len(ancestry.parents) - 1
        mark = "└── " if last else "├── "
        if isinstance(parent, Ancestry):
            lines += _tree(parent, below, mark)
        else:
            lines.append(f"{below}{mark}{parent.path}  (gone or made anew; digest {parent.digest[:12]})")
    return lines
