"""Concepts: what a generator of edited images can be asked for, in words. No torch.

A concept is one line of JSON in `concepts.jsonl`, the file of a `prompts` artifact; a `pairs` artifact has a copy with
the concepts that it holds images of.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from finectl.artifacts.files import write_atomic
from finectl.artifacts.store import Artifact
from finectl.errors import InputError

FILE = "concepts.jsonl"
ROLES = ("base", "train", "val", "test", "unseen")
TRAINABLE = ("base", "train")
RESERVED = ("val", "test", "unseen")
WORD = re.compile(r"[^\W_]+", re.UNICODE)
LONGEST_NAME = 80


@dataclass(frozen=True)
class Concept:
    """One concept.

    Args:
        name: A unique name of lower-case letters, digits and hyphens; files are named after it.
        prompt: What it is called in a text.
        paraphrases: Other texts that mean the same.
        atoms: What it is made of: the edits, or the names of the concepts that it joins; its own name else.
        role: `train`, `base` (for the base GAN alone), `val`, `test` (reserved), or `unseen` (reserved, with an atom
            that no concept for training has).
        edit: The builtin edit that makes its images (`finectl.data.edits`); empty where there is none.
        base: Whether the base GAN is trained on it.
        category: The list that it is from.
    """

    name: str
    prompt: str
    paraphrases: tuple[str, ...] = ()
    atoms: tuple[str, ...] = ()
    role: str = "train"
    edit: str = ""
    base: bool = False
    category: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """The prompt and its paraphrases."""
        return (self.prompt, *self.paraphrases)

    @property
    def reserved(self) -> bool:
        """Whether no training may see it."""
        return self.role in RESERVED


def slug(text: str) -> str:
    """Return a text as a name: lower-case ASCII letters and digits, hyphens between."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST_NAME].strip("-") or "concept"


def words(text: str) -> list[str]:
    """Return the words of a text without case and punctuation."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def select(concepts: Iterable[Concept], *roles: str) -> tuple[Concept, ...]:
    """Return the concepts of some roles, in order; `base` stands for all that the base GAN is trained on."""
    return tuple(c for c in concepts if c.role in roles or ("base" in roles and c.base))


def write_concepts(path: Path, concepts: Sequence[Concept]) -> None:
    """Write concepts, one a line."""
    lines = [json.dumps(asdict(concept), ensure_ascii=False) for concept in concepts]
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def read_concepts(artifact: Artifact) -> tuple[Concept, ...]:
    """Read the concepts of a `prompts` or `pairs` artifact.

    Raises:
        InputError: the artifact has none, or they are damaged.
    """
    path = artifact.file(FILE)
    concepts = tuple(to_concept(row, where) for where, row in read_rows(path))
    if not concepts or len({concept.name for concept in concepts}) < len(concepts):
        raise InputError(f"{path} has no concepts, or two of one name", fix="make the artifact again with --force")
    return concepts


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return where it stands and the object, of every line of a file of JSON lines that is not blank.

    Raises:
        InputError: the file cannot be read, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}", expected="JSON lines in UTF-8") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON: {error}", expected='such as {"prompt": "a robot"}') from error
        if not isinstance(row, dict):
            raise InputError(f"{where} is no JSON object", expected='such as {"prompt": "a robot"}')
        rows.append((where, row))
    return rows


def to_concept(row: Mapping[str, Any], where: str) -> Concept:
    """Return the concept of a JSON object; only `prompt` must be there.

    Raises:
        InputError: a field is unknown, or of the wrong type.
    """
    known = {field.name for field in fields(Concept)}
    if unknown := sorted(set(row) - known):
        raise InputError(f"{where} has {unknown[0]!r}", expected=f"some of: {', '.join(sorted(known))}")
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not words(prompt):
        raise InputError(f"{where} has no prompt", expected='"prompt": words')
    values: dict[str, Any] = {"name": slug(prompt), **row}
    for name in ("name", "role", "edit", "category"):
        if not isinstance(values.get(name, ""), str):
            raise InputError(f"{where}: {name} is no text")
    for name in ("paraphrases", "atoms"):
        listed = values.get(name, ())
        if not isinstance(listed, list | tuple) or not all(isinstance(item, str) for item in listed):
            raise InputError(f"{where}: {name} is no list of texts")
        values[name] = tuple(listed)
    if not isinstance(values.get("base", False), bool):
        raise InputError(f"{where}: base is neither true nor false")
    if values.get("role", "train") not in ROLES:
        raise InputError(f"{where} has the role {values['role']!r}", expected=f"one of: {', '.join(ROLES)}")
    if values["name"] != slug(values["name"]):
        raise InputError(
            f"{where} has the name {values['name']!r}",
            expected="lower-case letters, digits and hyphens",
            fix="leave it out",
        )
    if values.get("edit", ""):
        from finectl.data.edits import parse_edit

        parse_edit(values["edit"])
    values["atoms"] = values["atoms"] or (values["name"],)
    values["base"] = values.get("base", False) or values.get("role") == "base"
    return Concept(**values)
