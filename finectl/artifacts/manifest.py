"""manifest.yaml: what an artifact is, how it was made and what it was made from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from finectl.artifacts.files import write_atomic
from finectl.artifacts.kinds import KINDS
from finectl.errors import InputError

NAME = "manifest.yaml"
SCHEMA = "finectl/1"
C_LOADER_DEPTH = 1000
DATA_KEYS = {"name", "fingerprint", "count", "bundled"}
# Wall times and drawings differ from run to run; what an artifact's children read does not.
UNDIGESTED = ("log.jsonl", "plots/", "tensorboard/", "previews/", "table.")


@dataclass(frozen=True)
class FileRecord:
    """One file of an artifact: path relative to it, size in bytes, SHA-256 of its content."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ParentRecord:
    """An artifact that this one was made from: its role, its path relative to this one, its digest."""

    role: str
    path: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.yaml; `docs` of each key are in the README's section on artifacts."""

    kind: str
    stage: str
    created: str
    command: list[str]
    config: dict[str, Any]
    execution: dict[str, Any]
    recipe: str
    parents: list[ParentRecord]
    files: list[FileRecord]
    digest: str
    data: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the manifest to `path` as YAML, atomically."""
        text = yaml.safe_dump({"schema": SCHEMA, **asdict(self)}, sort_keys=False, allow_unicode=True, width=120)
        write_atomic(path, text.encode())


def digest_of(files: list[FileRecord]) -> str:
    """Return the digest of an artifact: over the paths and hashes of its files, without the log and the plots."""
    lines = [f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path)]
    kept = [line for line in lines if not line.split("  ", 1)[1].startswith(UNDIGESTED)]
    return hashlib.sha256("".join(kept).encode()).hexdigest()


def read_yaml(path: Path) -> Any:
    """Read a YAML file with the safe loader.

    Raises:
        InputError: the file is not YAML, cannot be read, or holds a tag that asks for anything but plain values.
    """
    try:
        raw = path.read_bytes()
        loader = yaml.SafeLoader if _may_nest_deeply(raw) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(raw, Loader=loader)  # noqa: S506 - one of the two safe loaders
    # An impossible date or number is a ValueError, endless nesting a RecursionError.
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is not plain YAML: {reason}", expected="plain values, no tags") from error


def _may_nest_deeply(raw: bytes) -> bool:
    """Tell whether YAML could be nested so deeply that the loader in C overflows the stack and kills the process."""
    brackets = raw.count(b"[") + raw.count(b"{")
    indents = max((len(line) - len(line.lstrip(b" \t-?:")) for line in raw.splitlines()), default=0)
    return brackets + indents > C_LOADER_DEPTH


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of an artifact.

    Raises:
        InputError: there is none, its schema is not known, or a key is missing or of the wrong type.
    """
    path = directory / NAME
    if not path.is_file():
        raise InputError(
            f"{directory} is no artifact: it has no {NAME}",
            expected="the path of an artifact directory",
            fix="list what there is: finectl ls",
        )
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise _malformed(path, "it is not a table of keys")
    schema = raw.pop("schema", None)
    if schema != SCHEMA:
        raise InputError(
            f"{path} has the schema {schema!r}",
            expected=f"{SCHEMA!r}, the only one that this finectl reads",
            fix="pip install --upgrade finectl" if _is_newer(schema) else "",
        )
    return _checked(path, raw)


def _is_newer(schema: Any) -> bool:
    number = str(schema).removeprefix("finectl/")
    return number.isdecimal() and int(number) > int(SCHEMA.removeprefix("finectl/"))


def _checked(path: Path, raw: dict[str, Any]) -> Manifest:
    """Turn the parsed keys of a manifest into a `Manifest`, naming the first key that does not fit."""
    known = {item.name: item for item in fields(Manifest)}
    for key in known:
        if key not in raw:
            raise _malformed(path, f"the key {key!r} is missing")
    kinds = {
        "str": str,
        "list[str]": list,
        "list[ParentRecord]": list,
        "list[FileRecord]": list,
        "dict[str, Any]": dict,
    }
    for key, item in known.items():
        wanted = kinds[str(item.type)]
        if not isinstance(raw[key], wanted):
            raise _malformed(path, f"{key!r} is a {type(raw[key]).__name__}, not a {wanted.__name__}")
    if raw["kind"] not in KINDS:
        raise _malformed(path, f"the kind {raw['kind']!r} is not one of {', '.join(KINDS)}")
    try:
        raw["files"] = [FileRecord(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in raw["files"]]
        raw["parents"] = [ParentRecord(str(p["role"]), str(p["path"]), str(p["digest"])) for p in raw["parents"]]
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise _malformed(path, f"an entry of files or parents is not complete ({error})") from error
    if not all(isinstance(word, str) for word in raw["command"]):
        raise _malformed(path, "'command' is not a list of words")
    if raw["data"] and not DATA_KEYS <= set(raw["data"]):
        raise _malformed(path, f"'data' lacks {', '.join(sorted(DATA_KEYS - set(raw['data'])))}")
    return Manifest(**{key: raw[key] for key in known})


def _malformed(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a finectl manifest: {reason}", fix=f"make the artifact again; see {path}")
