"""Which concepts there are: lists read, duplicates left out, combinations made, reserved concepts kept apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations as pairs_of
from pathlib import Path

from finectl.data.concepts import Concept, read_rows, slug, to_concept, words
from finectl.errors import InputError, UsageError
from finectl.registry import Entry, Registry

SETS = Registry(
    "set of concepts",
    {
        "demo": Entry("finectl.data.concepts.demo:concepts", "edits of the builtin editor"),
        "art": Entry("finectl.data.concepts.art:ART.concepts", "art styles"),
        "character": Entry("finectl.data.concepts.character:CHARACTER.concepts", "characters"),
        "facial": Entry("finectl.data.concepts.facial:FACIAL.concepts", "facial modifications"),
    },
)
SUFFIX = ".jsonl"
SHOWN = 5


def read_set(name: str) -> tuple[Concept, ...]:
    """Return the concepts of a table, or of the user's file.

    Raises:
        UsageError: there is no such table.
        InputError: the file cannot be read, or a line of it is wrong.
    """
    if name.endswith(SUFFIX) or ("/" in name and name not in SETS):
        path = Path(name).expanduser()
        rows = [to_concept(row, where) for where, row in read_rows(path)]
        if not rows:
            raise InputError(f"{path} has no concepts", expected='lines such as {"prompt": "a robot"}')
        category = slug(path.stem)
        return tuple(replace(concept, category=concept.category or category) for concept in rows)
    module, _, attribute = SETS[name].target.partition(":")
    import importlib

    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    concepts: tuple[Concept, ...] = found()  # type: ignore[operator]
    return concepts


def key_of(prompt: str) -> tuple[str, ...]:
    """Return what prompts that say the same have in common: their words, whatever their order, case and marks."""
    return tuple(sorted(words(prompt)))


def without_duplicates(concepts: Sequence[Concept]) -> tuple[Concept, ...]:
    """Leave out concepts that say the same as one before them.

    Raises:
        InputError: one of the two is reserved and the other is for training, or two different prompts have one name.
    """
    kept: dict[tuple[str, ...], Concept] = {}
    for concept in concepts:
        first = kept.setdefault(key_of(concept.prompt), concept)
        if first.reserved != concept.reserved:
            raise InputError(
                f"{first.prompt!r} ({first.role}) and {concept.prompt!r} ({concept.role}) say the same",
                expected="a reserved concept that training does not see",
                fix="leave one of them out",
            )
    chosen = {id(concept) for concept in kept.values()}
    left = tuple(concept for concept in concepts if id(concept) in chosen)
    names: dict[str, Concept] = {}
    for concept in left:
        if concept.name in names:
            raise InputError(
                f"{concept.prompt!r} and {names[concept.name].prompt!r} both have the name {concept.name!r}",
                expected="a name for each",
            )
        names[concept.name] = concept
    return left


def require_reserved_apart(concepts: Iterable[Concept]) -> None:
    """Check that nothing that is trained on says what a reserved concept says.

    A text leaks when it has all words of a reserved prompt, or when a concept has all atoms of a reserved one.

    Raises:
        InputError: it does; some of the leaks are named.
    """
    concepts = tuple(concepts)
    reserved = [(frozenset(words(c.prompt)), frozenset(c.atoms), c) for c in concepts if c.reserved]
    leaks = []
    for concept in concepts:
        if concept.reserved:
            continue
        texts = [frozenset(words(text)) for text in concept.texts]
        for said, atoms, kept in reserved:
            if atoms <= set(concept.atoms) or any(said <= text for text in texts):
                leaks.append(f"{concept.name} ({concept.prompt!r}) has what {kept.name} is: {kept.prompt!r}")
    if leaks:
        more = f", and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
        raise InputError(
            f"reserved concepts leak into training: {'; '.join(leaks[:SHOWN])}{more}",
            expected="concepts with the role val, test or unseen in no prompt, paraphrase or combination for training",
            fix="change the role of one of them, or leave it out",
        )


def combine(concepts: Sequence[Concept], count: int, seed: int) -> tuple[Concept, ...]:
    """Join concepts of different categories, none of them reserved.

    Args:
        concepts: What may be joined; those that are reserved, are joined already or have a builtin edit are passed by.
        count: How many to make, chosen by the seed.
        seed: Decides which.

    Raises:
        UsageError: there are not so many.
    """
    usable = [c for c in concepts if not c.reserved and len(c.atoms) == 1 and not c.edit]
    taken = {key_of(c.prompt) for c in concepts}
    pool = [pair for pair in pairs_of(usable, 2) if pair[0].category != pair[1].category]
    random.Random(seed).shuffle(pool)  # noqa: S311 - a choice that can be made again, no secret
    made: list[Concept] = []
    for one, other in pool:
        if len(made) == count:
            break
        prompt = f"{one.prompt}, {other.prompt}"
        if key_of(prompt) in taken:
            continue
        taken.add(key_of(prompt))
        made.append(
            Concept(
                name=slug(f"{one.name}--{other.name}"),
                prompt=prompt,
                paraphrases=(f"{other.prompt}, and {one.prompt}",),
                atoms=(*one.atoms, *other.atoms),
                category=f"{one.category}+{other.category}",
            )
        )
    if len(made) < count:
        raise UsageError(
            f"--combinations {count:,}, and {len(made):,} can be made of these concepts",
            expected="concepts of several categories that are not reserved",
            fix=f"--combinations {len(made)}" if made else "--set art,character,facial",
        )
    return _named(made, {c.name for c in concepts})


def _named(made: Sequence[Concept], taken: set[str]) -> tuple[Concept, ...]:
    """Number the names that were cut to the same length."""
    named = []
    for concept in made:
        name, number = concept.name, 1
        while name in taken:
            number += 1
            name = f"{concept.name[:70]}-{number}"
        taken.add(name)
        named.append(replace(concept, name=name))
    return tuple(named)
