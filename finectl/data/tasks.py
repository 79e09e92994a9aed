"""Tasks: some classes of a data set, and the words that name them. No torch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

from finectl.data.concepts import Concept, slug
from finectl.data.sources import CLASSES, DataInfo
from finectl.errors import UsageError

SHARE = 8
"""One of so many tasks is for validation, and one for testing."""
LEAST = 6
"""Fewer tasks than this are all for training."""
ENUMERATED, DRAWS = 10_000, 100
"""Choices of classes up to which all are looked at; above, so many drawn ones."""
WORDS = {"digits": ("the digits", "handwritten"), "photos": ("photos of", "pictures of")}
OTHERS = ("images of", "pictures of")


def class_tasks(info: DataInfo, count: int, largest: int, seed: int) -> tuple[Concept, ...]:
    """Return tasks of one to several classes; no two are the same, and every class of a reserved one is trained.

    Args:
        info: The data set, whole.
        count: Tasks.
        largest: Classes a task, at most.
        seed: Of the draw.

    Raises:
        UsageError: there are not so many tasks.
    """
    largest = min(largest, info.num_classes)
    possible = sum(math.comb(info.num_classes, size) for size in range(1, largest + 1))
    if count > possible:
        raise UsageError(
            f"--tasks {count}: {info.name} has {possible} choices of up to {largest} of its {info.num_classes} classes",
            expected=f"at most {possible}",
        )
    chosen = _draw(info.num_classes, count, largest, random.Random(seed))  # noqa: S311 - a draw, no secret
    roles = _roles(chosen)
    return tuple(
        task_of(info, [info.class_names[label] for label in labels], role)
        for labels, role in zip(chosen, roles, strict=True)
    )


def task_of(info: DataInfo, names: Sequence[str], role: str = "train") -> Concept:
    """Return the task of some classes.

    Args:
        info: The data set.
        names: The classes, in the labels' order.
        role: `train`, `val` or `test`.
    """
    first, second = WORDS.get(info.name, OTHERS)
    joined = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    noun = first.removesuffix("s") if info.name == "digits" and len(names) == 1 else first
    paraphrases = (joined, f"{second} {joined}", f"{noun} {' and '.join(reversed(names))}")
    prompt = f"{noun} {joined}"
    others = tuple(text for text in dict.fromkeys(paraphrases) if text != prompt)
    return Concept(slug("-".join(names)), prompt, others, tuple(names), role, category=info.name)


def data_of(task: Concept) -> str:
    """Return what `--data` is for a task."""
    return f"{task.category}{CLASSES}{','.join(task.atoms)}"


def _draw(classes: int, count: int, largest: int, random_: random.Random) -> list[tuple[int, ...]]:
    """Return different sets of classes: sizes in turn, and the classes that were drawn least often first."""
    used = [0] * classes
    chosen: dict[tuple[int, ...], None] = {}
    for size in itertools.cycle(range(1, largest + 1)):
        if len(chosen) == count:
            break
        if math.comb(classes, size) <= ENUMERATED:
            every = list(itertools.combinations(range(classes), size))
        else:
            every = [tuple(sorted(random_.sample(range(classes), size))) for _ in range(DRAWS)]
        left = [one for one in every if one not in chosen]
        if not left:
            continue
        fewest = min(sum(used[label] for label in one) for one in left)
        found = random_.choice([one for one in left if sum(used[label] for label in one) == fewest])
        chosen[found] = None
        for label in found:
            used[label] += 1
    return list(chosen)


def _roles(chosen: Sequence[tuple[int, ...]]) -> list[str]:
    """Return a role for each task: the last ones drawn whose classes other tasks have are reserved."""
    roles = ["train"] * len(chosen)
    if len(chosen) < LEAST:
        return roles
    each = max(1, round(len(chosen) / SHARE))
    wanted = ["test", "val"] * each
    for place in reversed(range(len(chosen))):
        others = [labels for other, labels in enumerate(chosen) if roles[other] == "train" and other != place]
        rest = {label for labels in others for label in labels}
        if wanted and len(chosen[place]) > 1 and set(chosen[place]) <= rest:
            roles[place] = wanted.pop(0)
    return roles
