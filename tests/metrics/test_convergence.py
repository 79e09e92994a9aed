"""Steps to reach a score, and who is compared with whom."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import pytest

from finectl.metrics.convergence import Better, curves_of, reach_table, reaches, steps_to_reach

FALLING = [(0, 1.0), (100, 0.5), (200, 0.3)]


@pytest.mark.parametrize(
    ("points", "bound", "better", "expected"),
    [
        (FALLING, 0.5, "lower", 100),
        (FALLING, 0.75, "lower", 50),
        (FALLING, 0.4, "lower", 150),
        (FALLING, 0.3, "lower", 200),
        (FALLING, 0.29, "lower", None),
        (FALLING, 2.0, "lower", 0),
        ([(50, 0.4), (100, 0.3)], 0.5, "lower", 50),
        (FALLING[::-1], 0.75, "lower", 50),
        ([(0, 0.1), (10, 0.5), (20, 0.9)], 0.6, "higher", 12.5),
        ([(0, 0.1), (10, 0.5)], 0.6, "higher", None),
        ([(0, 1.0), (10, 0.5), (20, 2.0), (30, 0.1)], 0.5, "lower", 10),
        ([(0, math.nan), (10, 1.0), (20, math.nan), (30, 0.0)], 0.5, "lower", 20),
        ([(0, math.inf), (10, 0.2)], 0.5, "lower", 10),
        ([(0, 10.0), (10, math.inf)], 30.0, "higher", 10),
        ([(0, math.inf)], math.inf, "higher", 0),
        ([], 1.0, "lower", None),
    ],
)
def test_steps_to_reach(
    points: list[tuple[float, float]], bound: float, better: Better, expected: float | None
) -> None:
    found = steps_to_reach(points, bound, better)
    assert found == (expected if expected is None else pytest.approx(expected, rel=1e-12))


CURVES = {"fine": [(0, 1.0), (100, 0.0)], "he": [(0, 1.0), (400, 0.0)], "none": [(0, 1.0), (800, 0.9)]}


def test_speed_ups_are_against_the_slowest_or_the_named_model() -> None:
    two = {name: CURVES[name] for name in ("fine", "he")}
    assert [(r.updates, r.speed_up, r.at_least) for r in reaches(two, 0.5, "lower")] == [
        (50, 4.0, False),
        (200, 1.0, False),
    ]
    assert [r.speed_up for r in reaches(two, 0.5, "lower", baseline="fine")] == [1.0, 0.25]
    assert [r.speed_up for r in reaches(two, 0.5, "lower", baseline="unknown")] == [None, None]
    assert reaches({}, 0.5, "lower") == []


def test_a_baseline_that_never_gets_there_gives_a_lower_bound() -> None:
    fine, he, none = reaches(CURVES, 0.5, "lower")
    assert (fine.speed_up, fine.at_least, he.speed_up) == (16.0, True, 4.0)
    assert none.updates is None and none.speed_up is None and none.measured == 800


def point(name: str, updates: int, value: float, n: int = 500) -> dict[str, Any]:
    loss = {"value": value, "interval": [value - 0.1, value + 0.1], "n": n, "protocol": {"n": n}}
    return {"name": name, "checkpoint": updates, "steps": 900, "loss": loss}


ROWS = [point(name, int(updates), value) for name, points in CURVES.items() for updates, value in points]


def test_curves_are_the_checkpoints_of_a_model_in_order_and_of_one_protocol() -> None:
    final = {**point("fine", 0, 0.25), "checkpoint": None}
    rows = [final, *ROWS[:2][::-1], point("other", 100, 0.1, n=20), {"name": "bare", "checkpoint": 1, "steps": 1}]
    curves = curves_of(rows, "loss")
    assert list(curves) == ["fine"]
    assert [p[:2] for p in curves["fine"]] == [(0, 1.0), (100, 0.0), (900, 0.25)]
    assert curves["fine"][-1] == (900, 0.25, 0.15, 0.35)


def test_the_table_of_steps_says_who_is_compared_and_who_never_gets_there() -> None:
    table = reach_table([*ROWS, point("other", 100, 0.1, n=20)], "loss", 0.5)
    assert table.columns == ("model", "updates to loss <= 0.5", "speed-up")
    assert table.cells == (
        ("fine", "50", "> 16.00x"),
        ("he", "200", "> 4.00x"),
        ("none", "-", "-"),
        ("other", "-", "-"),
    )
    assert table.notes == (
        "speed-ups are against none, which never reaches it: the true ones are greater",
        "none does not reach it in 800 updates",
        "other has no value that compares with the others",
    )
    lines = list(csv.DictReader(io.StringIO(table.to_csv(), newline="")))
    assert lines[0] == {"name": "fine", "updates": "50.0", "speed_up": "16.0", "measured": "800"} | {"measured": "100"}
    assert lines[2]["updates"] == ""


def test_the_table_of_steps_takes_a_baseline_and_says_when_the_start_was_not_seen() -> None:
    table = reach_table([*ROWS, point("quick", 100, 0.1)], "loss", 0.5, baseline="he")
    assert [cells[2] for cells in table.cells] == ["4.00x", "1.00x", "-", "2.00x"]
    assert table.notes[0] == "speed-ups are against he"
    assert table.notes[-1] == "quick is there at its first measurement; it may have been earlier"
