"""What is heard of worker processes: their last words, errors and deaths."""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any

from finectl.errors import ComputationError, InputError
from finectl.training.gan.workers import _hear


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    exitcode: int

    def is_alive(self) -> bool:
        return False


def heard(exitcode: int, left: int, *said: dict[str, Any]) -> tuple[list[str], int, Exception | None]:
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    for answer in said:
        answers.put(answer)
    names: list[str] = []
    found = _hear(
        [Ended(exitcode)], answers, threading.Event(), left, lambda: False, lambda name, l1: names.append(name)
    )
    return names, *found


def test_what_a_process_said_before_it_ended_is_heard() -> None:
    said = [{"name": name, "l1": 0.1} for name in ("a", "b")]
    assert heard(0, 2, *said) == (["a", "b"], 0, None)
    assert heard(0, 3, *said) == (["a", "b"], 1, None)


def test_a_process_that_was_killed_is_an_error() -> None:
    names, left, failure = heard(-9, 2, {"name": "a", "l1": 0.1})
    assert (names, left) == (["a"], 1) and isinstance(failure, ComputationError) and "-9" in str(failure)


def test_an_error_comes_back_as_what_it_was() -> None:
    told = {"error": InputError, "what": "gone", "expected": "a file", "fix": "make it"}
    _, _, failure = heard(0, 1, told)
    assert isinstance(failure, InputError) and (failure.exit_code, failure.fix) == (3, "make it")
    _, _, failure = heard(0, 1, {"error": None, "what": "Traceback"})
    assert isinstance(failure, RuntimeError)
