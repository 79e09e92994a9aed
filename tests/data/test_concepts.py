"""Concepts: lists, duplicates, combinations, paraphrases, and reserved ones that stay apart."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finectl.data.concepts import Concept, read_rows, select, slug, to_concept, words
from finectl.data.concepts.combine import SETS, combine, key_of, read_set, require_reserved_apart, without_duplicates
from finectl.data.concepts.demo import BASE_COLOURS, BASE_TEXTURES
from finectl.data.concepts.paraphrase import read_paraphrases, usable, with_paraphrases
from finectl.errors import InputError, UsageError

CATEGORIES = ("art", "character", "facial")


def every() -> tuple[Concept, ...]:
    return tuple(concept for name in CATEGORIES for concept in read_set(name))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("demo", {"train": 60, "val": 6, "test": 12, "unseen": 3}),
        ("art", {"train": 51, "val": 3, "test": 6}),
        ("character", {"train": 51, "val": 3, "test": 6}),
        ("facial", {"train": 19, "val": 2, "test": 5}),
    ],
)
def test_the_builtin_lists(name: str, counts: dict[str, int]) -> None:
    concepts = read_set(name)
    assert Counter(concept.role for concept in concepts) == counts
    assert without_duplicates(concepts) == concepts
    require_reserved_apart(concepts)
    for concept in concepts:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", concept.name) and len(concept.paraphrases) == 2
        assert len({tuple(words(text)) for text in concept.texts}) == 3
        assert concept.atoms and concept.category == name
    assert not any(concept.base and concept.role != "train" for concept in concepts)


def test_held_out_edits_are_new_combinations_of_known_atoms() -> None:
    concepts = read_set("demo")
    pairs = {concept.atoms[:2] for concept in select(concepts, "train")}
    atoms = {atom for concept in select(concepts, "train") for atom in concept.atoms}
    for concept in select(concepts, "test", "val"):
        assert concept.atoms[:2] not in pairs and set(concept.atoms) <= atoms
    for concept in select(concepts, "unseen"):
        assert len(set(concept.atoms) - atoms) == 1
    base = select(concepts, "base")
    assert {concept.atoms for concept in base} == {(c, t) for c in BASE_COLOURS for t in BASE_TEXTURES}
    assert len(base) == 12
    for atom in atoms:  # what is held out can be learned
        assert sum(atom in concept.atoms for concept in select(concepts, "train")) >= 4, atom


def test_every_table_is_there() -> None:
    for name in SETS:
        assert read_set(name)
    with pytest.raises(UsageError, match="did you mean 'facial'"):
        read_set("facials")


def test_prompts_that_say_the_same_are_left_out() -> None:
    prompts = ("A robot, painted red", "painted red: a ROBOT!", "a robot painted blue")
    concepts = [Concept(f"c{i}", prompt, atoms=(f"c{i}",)) for i, prompt in enumerate(prompts)]
    assert [concept.name for concept in without_duplicates(concepts)] == ["c0", "c2"]
    assert key_of(prompts[0]) == key_of(prompts[1]) != key_of(prompts[2])
    reserved = replace(concepts[1], role="test")
    for order in ([concepts[0], reserved], [reserved, concepts[0]]):
        with pytest.raises(InputError, match="say the same"):
            without_duplicates(order)
    with pytest.raises(InputError, match="both have the name"):
        without_duplicates([concepts[0], replace(concepts[2], name="c0")])


def test_combinations_never_have_a_reserved_concept() -> None:
    concepts = every()
    usable_count = Counter(concept.category for concept in concepts if not concept.reserved)
    a, c, f = (usable_count[name] for name in CATEGORIES)
    most = a * c + a * f + c * f
    made = combine(concepts, most, seed=0)
    reserved = {atom for concept in concepts if concept.reserved for atom in concept.atoms}
    assert len(made) == most == len({concept.name for concept in made}) == len({key_of(m.prompt) for m in made})
    assert not any(reserved & set(concept.atoms) for concept in made)
    assert all(len({atom.split("-")[0] for atom in concept.atoms}) == 2 for concept in made)
    require_reserved_apart((*concepts, *made))
    with pytest.raises(UsageError, match=f"{most:,} can be made"):
        combine(concepts, most + 1, seed=0)
    with pytest.raises(UsageError, match="0 can be made"):
        combine(read_set("demo"), 1, seed=0)


def test_the_seed_chooses_the_combinations() -> None:
    first, again, other = (combine(every(), 20, seed) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "leak",
    [
        Concept("x", "a viking raider with a fox, at sea", atoms=("x",)),
        Concept("x", "x", paraphrases=("Raider, a Viking",), atoms=("x",)),
        Concept("x", "x", atoms=("x", "viking")),
    ],
)
def test_a_leak_is_found(leak: Concept) -> None:
    reserved = Concept("viking", "a viking raider", atoms=("viking",), role="test")
    require_reserved_apart([reserved, replace(leak, role="val")])
    require_reserved_apart([replace(reserved, role="train"), leak])
    with pytest.raises(InputError, match=r"x .* has what viking is"):
        require_reserved_apart([reserved, leak])


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_a_users_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "My things.jsonl", {"prompt": "Ein Käfer"}, "", {"prompt": "b", "role": "base"})
    one, other = read_set(str(path))
    assert (one.name, one.role, one.category, one.atoms) == ("ein-kafer", "train", "my-things", ("ein-kafer",))
    assert other.base and select((one, other), "base") == (other,)


@pytest.mark.parametrize(
    ("row", "words_of_error"),
    [
        ("{", "no JSON"), ("[1]", "no JSON object"), ({}, "no prompt"), ({"prompt": "!!"}, "no prompt"),
        ({"prompt": "a", "colour": 1}, "'colour'"), ({"prompt": "a", "role": "best"}, "the role 'best'"),
        ({"prompt": "a", "name": "../x"}, "the name '../x'"), ({"prompt": "a", "paraphrases": "b"}, "no list of texts"),
        ({"prompt": "a", "edit": "sepia"}, "no builtin edit"), ({"prompt": "a", "base": 1}, "neither true nor false"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(row: Any, words_of_error: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_set(str(write_rows(tmp_path / "x.jsonl", {"prompt": "fine"}, row)))
    assert words_of_error in caught.value.what


def test_paraphrases_of_a_file(tmp_path: Path) -> None:
    robot = Concept("robot", "a robot", atoms=("robot",))
    viking = Concept("viking", "a viking raider", atoms=("viking",), role="test")
    path = write_rows(
        tmp_path / "p.jsonl",
        {"prompt": "A Robot!", "paraphrases": ["a  machine man", "A ROBOT", "a machine man."]},
        {"name": "robot", "paraphrase": "an android"},
    )
    added, _ = with_paraphrases((robot, viking), read_paraphrases(path, (robot, viking)))
    assert added.paraphrases == ("a machine man", "an android")
    leaking = write_rows(tmp_path / "l.jsonl", {"name": "robot", "paraphrases": ["a robot like a viking raider"]})
    with pytest.raises(InputError, match="has what viking is"):
        with_paraphrases((robot, viking), read_paraphrases(leaking, (robot, viking)))
    for row in ({"prompt": "a robt", "paraphrases": ["x"]}, {"name": "robt", "paraphrases": ["x"]}):
        with pytest.raises(InputError, match="did you mean"):
            read_paraphrases(write_rows(path, row), (robot,))
    with pytest.raises(InputError, match="no list of paraphrases"):
        read_paraphrases(write_rows(path, {"name": "robot", "paraphrases": "x"}), (robot,))


def test_what_a_model_wrote_is_not_used_where_it_says_a_reserved_concept() -> None:
    robot = Concept("robot", "a robot", atoms=("robot",))
    viking = Concept("viking", "a viking raider", atoms=("viking",), role="test")
    written = ("a machine", "the raider, a viking")
    assert usable(written, robot, (robot, viking)) == ("a machine",)
    assert usable(written, viking, (robot, viking)) == written


def test_names() -> None:
    assert slug("Ein Käfer: 3 / 4!") == "ein-kafer-3-4" and slug("日本") == "concept" and len(slug("a" * 200)) == 80
    assert to_concept({"prompt": "x y"}, "here").name == "x-y"
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(Path("/nowhere/x.jsonl"))
