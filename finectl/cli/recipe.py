"""Recipes: YAML files that give a stage's options other defaults. An artifact's manifest is one, too."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from finectl.cli.commands import typed
from finectl.errors import InputError, UsageError
from finectl.registry import nearest

DIGEST = "_digest"
NOT_IN_RECIPES = ("recipe", "dry_run", "out", "ctx", "help")


def load_recipe(path: Path, stage: str, known: Sequence[str], repeated: Collection[str] = ()) -> dict[str, Any]:
    """Return option name to value for one stage.

    Args:
        path: A YAML file with one section a stage, or the manifest.yaml of an artifact of this stage. `FILE:NAME` takes
            the sections under NAME, for a file that holds several variants.
        stage: The subcommand; of a step `gen-weights-STEP`.
        known: The names of its parameters.
        repeated: Those of them that may be given several times, so that a value may hold commas.

    Raises:
        InputError: the file is missing or is not plain YAML.
        UsageError: it has no section for this stage, or a key that is no option; the message names the nearest one.
    """
    from finectl.artifacts.manifest import NAME, read_yaml

    if path.is_dir():
        path = path / NAME
    variant = ""
    if not path.exists() and ":" in path.name:
        name, _, variant = path.name.rpartition(":")
        path = path.with_name(name)
    if not path.is_file():
        raise InputError(f"there is no recipe {path}", expected="a YAML file or an artifact's manifest.yaml")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UsageError(f"the recipe {path} is not a table", expected="one section a stage, such as 'train:'")
    if "schema" in content and not variant:
        return _from_manifest(path, stage, known, repeated)
    if variant:
        content = _variant(path, content, variant)
    if stage not in content:
        raise UsageError(
            f"the recipe {path} has no section {stage!r}{nearest(stage, list(map(str, content)))}",
            expected=f"one of its sections: {', '.join(map(str, content))}",
        )
    section = content[stage] or {}
    if not isinstance(section, dict):
        raise UsageError(f"the section {stage!r} of {path} is not a table", expected="option: value")
    return _checked(path, stage, section, known, repeated)


def _variant(path: Path, content: dict[Any, Any], name: str) -> dict[Any, Any]:
    """Return the sections of one variant of a recipe."""
    found = content.get(name)
    if not isinstance(found, dict):
        tables = [str(key) for key, value in content.items() if isinstance(value, dict)]
        raise UsageError(
            f"the recipe {path} has no variant {name!r}{nearest(name, tables)}",
            expected=f"a table of sections; it has {', '.join(tables)}",
        )
    return found


def _from_manifest(path: Path, stage: str, known: Sequence[str], repeated: Collection[str] = ()) -> dict[str, Any]:
    """Return the options with which an artifact was made, and its parents as INPUT."""
    from finectl.artifacts.manifest import read_manifest

    manifest = read_manifest(path.parent)
    if manifest.stage != stage:
        raise UsageError(
            f"{path} was made by '{manifest.stage}', not by '{stage}'",
            fix=f"{typed(manifest.stage)} --recipe {path}",
        )
    # A digest that is no option is of something that the options name: it is computed again.
    given = {k: v for k, v in manifest.config.items() if v is not None and (k in known or not k.endswith(DIGEST))}
    values = _checked(path, stage, given, known, repeated)
    # Those of another role than the first are named by options.
    inputs = [parent for parent in manifest.parents if parent.role == manifest.parents[0].role]
    parents = [str((path.parent / parent.path).resolve()) for parent in inputs]
    if parents and "inputs" in known:
        values["inputs"] = parents
    elif parents and "input" in known:
        values["input"] = parents[0]
    return values


def _checked(
    path: Path, stage: str, section: dict[Any, Any], known: Sequence[str], repeated: Collection[str] = ()
) -> dict[str, Any]:
    """Return the section with option names as parameter names; a list becomes the comma form of the command line."""
    allowed = [name for name in known if name not in NOT_IN_RECIPES]
    values: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        if name not in allowed:
            raise UsageError(
                f"the recipe {path} sets {key!r}, which is no option of '{typed(stage)}'{nearest(name, allowed)}",
                fix=f"{typed(stage)} --help",
            )
        values[name] = _as_typed(path, key, value, many=name in repeated)
    return values


def _as_typed(path: Path, key: Any, value: Any, many: bool) -> str | list[str] | None:
    """Return a value as it would be typed, so that the parser checks it as strictly: 2.5 is no number of layers."""
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, str | int | float | None):
            raise UsageError(f"the recipe {path} sets {key!r} to {part!r}", expected="text, a number, true or false")
    if value is None:
        return None
    words = [str(part) for part in parts]
    return words if many else ",".join(words)
