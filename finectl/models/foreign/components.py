"""The other parts of a pipeline (VAE, text encoder, tokenizer, scheduler): kept by reference, or copied.

components.json of a model says for each what it is, where it was found, its digest, and where its copy lies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finectl.artifacts.files import path_inside, sha256_file, sha256_json, sync, write_json
from finectl.artifacts.lineage import Ancestry, trace
from finectl.artifacts.store import Artifact, Workspace
from finectl.errors import InputError
from finectl.hub import local_folder
from finectl.models.foreign.readers import member
from finectl.models.foreign.source import INDEX, PIPELINES, Source
from finectl.models.vae import CLASS, PATTERNS

NAME = "components.json"
LABELS = "labels.json"
FOLDER = "components"
WAYS = ("reference", "copy", "none")
PLAIN = (".json", ".txt", ".safetensors", ".model", ".jinja")
"""What a component's folder may hold to be copied: data, never pickles or code."""

VAE = "vae"


@dataclass(frozen=True)
class Component:
    """One part of a pipeline.

    Args:
        library: The package of its class, as model_index.json names it.
        kind: Its class.
        source: The folder of the pipeline or of the part, or the hub's id.
        subfolder: The part's folder inside the source.
        digest: Hash of its files.
        copied: Its folder inside the artifact, where it was copied.
    """

    library: str
    kind: str
    source: str
    subfolder: str
    digest: str
    copied: str | None = None


def parts_of(source: Source) -> dict[str, Component]:
    """Return the parts of a pipeline beside the network that is trained, by name.

    Raises:
        InputError: model_index.json names a part that is not there.
    """
    if source.index is None or source.root is None:
        return {}
    found = {}
    for name, entry in sorted(source.index.items()):
        is_part = isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)
        if not is_part or name == PIPELINES[str(source.index["_class_name"])]:
            continue
        folder = member(source.root, name)
        if not folder.is_dir():
            raise InputError(
                f"{source.root / INDEX} names a {name}, and {folder} is missing",
                expected="a whole pipeline",
                fix="download it again, or leave the other parts out: --components none",
            )
        place = source.name if not Path(source.name).exists() else str(source.root.resolve())
        found[name] = Component(entry[0], entry[1], place, name, folder_digest(folder))
    return found


def folder_digest(folder: Path) -> str:
    """Return the hash of the content of a folder's files, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return sha256_json([[path.relative_to(folder).as_posix(), sha256_file(path)] for path in files])


def keep(directory: Path, source: Source, parts: Mapping[str, Component], way: str) -> None:
    """Write what is kept of a pipeline into the directory of a model: components.json, copies, and its labels.

    Raises:
        InputError: a part that is to be copied has pickled weights only.
    """
    index = source.index or {}
    labels = index.get("id2label")
    if isinstance(labels, dict) and labels:
        write_json(directory / LABELS, {str(key): str(value) for key, value in labels.items()})
    if way == "none" or source.root is None or not parts:
        return
    kept = {}
    for name, part in parts.items():
        copied = f"{FOLDER}/{name}" if way == "copy" else None
        if copied is not None:
            copy_plain(member(source.root, name), directory / copied)
        kept[name] = asdict(part) | {"copied": copied}
    write_json(directory / NAME, {"index": index, "components": kept})


def copy_plain(source: Path, target: Path) -> None:
    """Copy the data files of a component's folder.

    Raises:
        InputError: its weights are pickled.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.suffix in PLAIN)
    pickled = [path for path in source.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        raise InputError(
            f"{source} has pickled weights only ({pickled[0].name}), which finectl does not copy",
            expected="safetensors",
            fix="--components reference, or a revision of the model with safetensors",
        )
    for path in files:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        sync(copy)


@dataclass(frozen=True)
class Kept:
    """What is known of the pipeline that a model came in.

    Args:
        artifact: The artifact that keeps it: the model itself, or an ancestor.
        index: The pipeline's model_index.json; empty where nothing is known.
        parts: The other parts by name.
    """

    artifact: Artifact
    index: Mapping[str, Any]
    parts: Mapping[str, Component]


def known_parts(artifact: Artifact, workspace: Workspace) -> Kept:
    """Return the parts of a model's pipeline: its own, or those of the nearest ancestor that has any.

    Args:
        artifact: A model.
        workspace: Where its ancestors are.
    """
    for ancestor in _line(trace(workspace, artifact)):
        if ancestor.has(NAME):
            return read_parts(ancestor)
    return Kept(artifact, {}, {})


def known_labels(artifact: Artifact, workspace: Workspace) -> dict[str, str]:
    """Return class number -> name, as an imported pipeline had it, where the number of classes is still the same."""
    for ancestor in _line(trace(workspace, artifact)):
        if ancestor.has(LABELS):
            values = json.loads(ancestor.file(LABELS).read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in values.items()}
    return {}


def _line(ancestry: Ancestry) -> list[Artifact]:
    """Return an artifact and its ancestors along the first parents."""
    line = [ancestry.artifact]
    while ancestry.parents and isinstance(ancestry.parents[0], Ancestry):
        ancestry = ancestry.parents[0]
        line.append(ancestry.artifact)
    return line


def read_parts(artifact: Artifact) -> Kept:
    """Return the parts that an artifact keeps.

    Raises:
        InputError: components.json is damaged.
    """
    try:
        values = json.loads(artifact.file(NAME).read_text(encoding="utf-8"))
        parts = {str(name): Component(**part) for name, part in values["components"].items()}
        return Kept(artifact, dict(values["index"]), parts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{artifact.path / NAME} is damaged: {error}", fix="import the model again") from error


def locate(artifact: Artifact, name: str, part: Component) -> Path:
    """Return the folder of a part, checked to be what it was.

    Raises:
        InputError: it is gone, or another one is in its place.
    """
    if part.copied is not None:
        return path_inside(artifact.path, part.copied)
    root = Path(part.source)
    if not root.is_dir() and not root.is_absolute():
        root = local_folder(part.source, f"the {name}", ("*.json", "*.txt", "*.safetensors", "*.model"))
    folder = member(root, part.subfolder) if part.subfolder else root
    if not folder.is_dir():
        raise InputError(
            f"the {name} of {artifact.path} is missing: {folder}",
            expected="the folder that was there when the model was imported",
            fix=f"put it back, or name another: --{name} PATH" if name == VAE else "put it back, or --components none",
        )
    if folder_digest(folder) != part.digest:
        raise InputError(
            f"the {name} of {artifact.path} is not what it was: {folder} has changed",
            expected=f"digest {part.digest[:16]}...",
            fix="put the former one back, or import the model again",
        )
    return folder


def vae_folder(name_or_path: str) -> Path:
    """Return the folder of an autoencoder that `describe_vae` has found: as named, or its `vae` in a pipeline's."""
    folder = local_folder(name_or_path, "the autoencoder", PATTERNS)
    return folder if _class_in(folder / "config.json") == CLASS else folder / VAE


def _class_in(path: Path) -> str:
    return str(json.loads(path.read_text(encoding="utf-8")).get("_class_name")) if path.is_file() else ""


def digests(parts: Mapping[str, Component]) -> Sequence[str]:
    """Return what the parts contribute to the digest of a source."""
    return [f"{name} {parts[name].digest}" for name in sorted(parts)]
