"""What an artifact was made from, by kind, found from the artifact alone."""

from __future__ import annotations

from finectl.artifacts.kinds import KINDS
from finectl.artifacts.store import Artifact, Workspace
from finectl.errors import InputError


def find_ancestor(artifact: Artifact, kind: str) -> Artifact | None:
    """Return the nearest artifact of a kind that an artifact was made from; None when none is left, unchanged.

    Args:
        artifact: In a workspace; its ancestors are looked for there.
        kind: A key of `KINDS`.

    Raises:
        InputError: a manifest names a parent by an absolute path.
    """
    level = [artifact]
    while level:
        parents = []
        for one in level:
            workspace = Workspace(one.path.absolute().parent.parent)
            for record in one.manifest.parents:
                parent = workspace.parent(one, record.path, record.digest)
                if parent is not None:
                    parents.append(parent)
        found = next((parent for parent in parents if parent.kind == kind), None)
        if found is not None:
            return found
        level = parents
    return None


def require_ancestor(artifact: Artifact, kind: str, option: str) -> Artifact:
    """Return the nearest artifact of a kind that an artifact was made from.

    Args:
        artifact: See `find_ancestor`.
        kind: A key of `KINDS`.
        option: What names one instead.

    Raises:
        InputError: none is there.
    """
    found = find_ancestor(artifact, kind)
    if found is None:
        raise InputError(
            f"the {kind} artifact that {artifact.path} was made from is not in its workspace, or was made anew",
            expected=KINDS[kind].help,
            fix=f"say where it is: {option} PATH",
        )
    return found
