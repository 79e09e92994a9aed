"""Tasks: sets of classes, their words and their roles."""

from __future__ import annotations

import pytest

from finectl.data.concepts import words
from finectl.data.sources import describe
from finectl.data.tasks import class_tasks, data_of, task_of
from finectl.errors import UsageError


@pytest.mark.parametrize(("data", "count"), [("digits", 24), ("photos", 16)])
def test_tasks_are_different_and_the_classes_of_reserved_ones_are_trained(data: str, count: int) -> None:
    tasks = class_tasks(describe(data), count, 3, seed=0)
    assert tasks == class_tasks(describe(data), count, 3, seed=0) != class_tasks(describe(data), count, 3, seed=1)
    assert len({task.atoms for task in tasks}) == len({task.name for task in tasks}) == count
    by_role = {role: [task for task in tasks if task.role == role] for role in ("train", "val", "test")}
    assert len(by_role["val"]) == len(by_role["test"]) == count // 8
    known = {word for task in by_role["train"] for text in task.texts for word in words(text)}
    for task in (*by_role["val"], *by_role["test"]):
        assert set(words(task.prompt)) <= known
    assert all(describe(data_of(task)).count > 0 for task in tasks[:3])


def test_a_task_is_named_in_words_whatever_their_order() -> None:
    digits, photos = describe("digits"), describe("photos")
    assert task_of(digits, ["3", "7"]).prompt == "the digits 3 and 7"
    assert task_of(digits, ["3"]).prompt == "the digit 3"
    assert "the digits 7 and 3" in task_of(digits, ["3", "7"]).texts
    assert task_of(photos, ["cat", "coffee", "rocket"]).prompt == "photos of cat, coffee and rocket"
    assert data_of(task_of(photos, ["cat", "coffee"])) == "photos#cat,coffee"


def test_more_tasks_than_there_are_choices_are_refused() -> None:
    with pytest.raises(UsageError, match="55 choices"):
        class_tasks(describe("digits"), 56, 2, seed=0)
