"""Other words for the prompts of concepts: from a file, or from whatever writes some. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finectl.data.concepts import Concept, read_rows, words
from finectl.data.concepts.combine import require_reserved_apart
from finectl.errors import InputError
from finectl.registry import nearest

EXPECTED = 'lines such as {"prompt": "a robot", "paraphrases": ["a machine man"]}, or with "name" for "prompt"'
LONGEST = 200


def read_paraphrases(path: Path, concepts: Sequence[Concept]) -> dict[str, tuple[str, ...]]:
    """Return the paraphrases of a file by the names of the concepts.

    Raises:
        InputError: the file cannot be read, or a line is wrong or names no concept.
    """
    names = {concept.name: concept.name for concept in concepts}
    prompts = {" ".join(words(concept.prompt)): concept.name for concept in concepts}
    found: dict[str, tuple[str, ...]] = {}
    for where, row in read_rows(path):
        given = row.get("name", row.get("prompt"))
        texts = row.get("paraphrases", [row["paraphrase"]] if "paraphrase" in row else None)
        if not isinstance(given, str) or not _are_texts(texts):
            raise InputError(f"{where} is no list of paraphrases", expected=EXPECTED)
        name = names.get(given) if "name" in row else prompts.get(" ".join(words(given)))
        if name is None:
            known = names if "name" in row else {concept.prompt: "" for concept in concepts}
            raise InputError(f"{where} is about {given!r}, which is no concept here{nearest(given, known)}")
        found[name] = (*found.get(name, ()), *texts)  # type: ignore[misc]
    return found


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, list) and all(isinstance(text, str) for text in texts)


def with_paraphrases(concepts: Sequence[Concept], more: Mapping[str, Iterable[str]]) -> tuple[Concept, ...]:
    """Add paraphrases to concepts; what is said already is left out.

    Args:
        concepts: The concepts.
        more: Paraphrases by the concepts' names.

    Raises:
        InputError: one says what a reserved concept says.
    """
    added = tuple(replace(c, paraphrases=distinct(c, more.get(c.name, ()))) for c in concepts)
    require_reserved_apart(added)
    return added


def distinct(concept: Concept, more: Iterable[str]) -> tuple[str, ...]:
    """Return a concept's paraphrases with others, without those that differ from another in case or marks only."""
    said = {tuple(words(concept.prompt))}
    kept = []
    for text in (*concept.paraphrases, *more):
        cleaned = " ".join(text.split())
        if (key := tuple(words(cleaned))) and key not in said and len(cleaned) <= LONGEST:
            said.add(key)
            kept.append(cleaned)
    return tuple(kept)


def usable(texts: Iterable[str], concept: Concept, concepts: Sequence[Concept]) -> tuple[str, ...]:
    """Return those of a model's paraphrases of a concept that no reserved concept is said in.

    Args:
        texts: What the model wrote.
        concept: What it was asked to say.
        concepts: All concepts.
    """
    if concept.reserved:
        return tuple(texts)
    reserved = [frozenset(words(other.prompt)) for other in concepts if other.reserved]
    return tuple(text for text in texts if not any(said <= set(words(text)) for said in reserved))
