"""The tables and plots of recipes/bench/initializers.sh, on rows that were made up; and which rows it makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

sys.path.append(str(ROOT / "recipes" / "bench"))  # where the scripts find each other

import initializers_plots as plots
import initializers_report as report
import initializers_results
import initializers_run as driver

STEPS = (0, 30, 100)
BUDGET = 200
# Label, method, transferred, loss at the end by seed, once, each.
MADE_UP: tuple[tuple[str, str, int, tuple[float, float], int], ...] = (
    ("he xavier", "he", 0, (0.50, 0.52), 0),
    ("fine", "fine", 200, (0.21, 0.22), BUDGET),
    ("share paper", "share", 150, (0.20, 0.23), BUDGET),
    ("weight-selection first", "weight-selection", 600, (0.12, 0.12), BUDGET),
    ("weight-selection even", "weight-selection", 600, (0.10, 0.10), BUDGET),
)


def row(label: str, method: str, seed: int, depth: int, updates: int, loss: float, **more: Any) -> dict[str, Any]:
    values = {"loss": loss, "frechet": 100 * loss, "accuracy": 1 - loss}
    return {
        **{"label": label, "method": method, "source": "ancestor", "seed": seed, "depth": depth, "updates": updates},
        **{name: {"value": value, "interval": None} for name, value in values.items()},
        **{"protocol": {name: {"seed": 0} for name in values}, "transferred": 0, "transferred_with_embedders": 0},
        **{"once_steps": 0, "once_flops": 0, "each_steps": updates, "each_flops": 1000 * updates},
        **more,
    }


def content() -> dict[str, Any]:
    rows = []
    for label, method, transferred, losses, once in MADE_UP:
        more = {"transferred": transferred, "once_steps": once, "once_flops": 1000 * once}
        for seed, loss in enumerate(losses):
            for depth in (2, 4):
                rows += [row(label, method, seed, depth, n, loss + (100 - n) / 200, **more) for n in STEPS]
    rows += [row("direct", "he", seed, depth, BUDGET, 0.08) for seed in (0, 1) for depth in (2, 4)]
    settings = {
        "steps": STEPS,
        "budget": BUDGET,
        "tuning": 30,
        "batch_size": 8,
        "samples": 500,
        "sampling_steps": 20,
        "task": "same",
    }
    return {"settings": settings, "ancestor_parameters": 1000, "rows": rows}


@pytest.fixture
def results(tmp_path: Path) -> Callable[[dict[str, Any]], Any]:
    def read(made: dict[str, Any]) -> Any:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(made))
        return initializers_results.Results.read(path)

    return read


def cells(text: str, first: str) -> list[list[str]]:
    """The rows of a Markdown table that begin with a cell, without marks."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return [line for line in split if line[0] == first]


def test_the_tables_hold_means_ranks_and_the_class_of_few_parameters(results: Any) -> None:
    text = report.report(results(content()))
    assert cells(text, "fine")[0] == ["fine", "ancestor", "200", "0", "20.0"]
    assert cells(text, "fine")[1] == ["fine", "0.7150 ± 0.0071", "0.5650 ± 0.0071", "0.2150 ± 0.0071"]
    assert "| **0.1000 ± 0.0000** |" in text, "the best at the end"
    assert cells(text, "direct (200 updates)")[0] == ["direct (200 updates)", "-", "-", "0.0800 ± 0.0000"]
    small, whole = text.split("Among all methods:")
    among = small.split("Mean rank over depths")[1]
    assert "weight-selection" not in among and cells(among, "share paper")[0][-1] == "1.50 ± 0.71"
    assert cells(whole, "weight-selection even")[0][-1] == "1.00 ± 0.00"
    assert "- held-out loss after 100 updates: fine is first of 3, with mean rank 1.50." in among
    assert "- accuracy, % after 100 updates: fine is first of 3" in among, "higher is better there"


def test_fine_behind_the_first_is_said(results: Any) -> None:
    made = content()
    for one in made["rows"]:
        one["loss"]["value"] -= 0.1 * (one["label"] == "share paper")
    assert (
        "share paper is first of 3, with mean rank 1.00 (± 0.00 at 95 %); fine has 2.00, outside of the interval."
        in report.report(results(made))
    )


def test_the_cost_of_n_models_counts_the_budget_once(results: Any) -> None:
    text = report.report(results(content())).split("Total cost of n models")[1]
    shared = next(line for line in text.splitlines() if line.startswith("| fine, share paper"))
    assert [cell.strip() for cell in shared.strip("|").split("|")[1:]] == [
        *("200", "100", "300 (0.67x)", "400 (1.00x)", "500 (1.20x)", "700 (1.43x)", "1,100 (1.64x)")
    ]
    assert cells(text, "direct")[0][1:5] == ["0", "200", "200", "400"]


def test_what_was_not_measured_has_no_rank(results: Any) -> None:
    made = content()
    made["rows"] = [one for one in made["rows"] if not (one["label"] == "fine" and one["updates"] == 30)]
    read = results(made)
    assert cells(report.report(read), "fine")[1][2] == "-"
    assert "fine" not in report.ranks(read, read.labels, "loss", 30, False)


def test_values_of_several_protocols_are_refused(results: Any) -> None:
    made = content()
    made["rows"][3]["protocol"]["frechet"] = {"seed": 1}
    with pytest.raises(SystemExit, match="frechet was measured in 2 ways"):
        results(made)
    with pytest.raises(SystemExit, match="no rows"):
        results({**made, "rows": []})


def test_the_front_has_no_point_that_another_is_better_than() -> None:
    points = [(20.0, 0.3), (10.0, 0.5), (30.0, 0.4), (20.0, 0.2), (40.0, 0.1)]
    assert plots.pareto_front(points, higher=False) == [(10.0, 0.5), (20.0, 0.2), (40.0, 0.1)]
    assert plots.pareto_front(points, higher=True) == [(10.0, 0.5)]


def test_the_plots_are_drawn(results: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    results(content())
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "results.json"), "--out", str(tmp_path / "out")])
    report.main()
    drawn = {path.name for path in (tmp_path / "out").iterdir() if path.stat().st_size > 1000}
    named = {f"{kind}-{metric}.png" for kind in ("pareto", "curves") for metric in ("loss", "frechet", "accuracy")}
    assert drawn == {*named, "cost.png", "tables.md"}
    assert (
        plots.best_variants(initializers_results.Results.read(tmp_path / "results.json"))[-1] == "weight-selection even"
    )


def settings(**changed: Any) -> Any:
    values: dict[str, Any] = {
        **{
            "depths": (2,),
            "seeds": (0,),
            "steps": STEPS,
            "budget": BUDGET,
            "tuning": 30,
            "batch_size": 8,
            "samples": 8,
        },
        **{"sampling_steps": 2, "draws": 1, "rate": 4e-3, "task": "same", "source_size": 8, "methods": ()},
    }
    return driver.Settings(**{**values, **changed})


def test_every_method_and_variant_has_a_row() -> None:
    table = driver.table()
    rows = driver.members(settings())
    variants = {(line["method"], variant) for line in table for variant in line["variants"] or [None]}
    made = {(one.method, one.options[-1] if one.options else None) for one in rows}
    assert variants - {("direct", None)} <= made and rows[-1].label == "direct"
    assert len({one.label for one in rows}) == len(rows)
    tuned = {line["method"] for line in table if "tune_steps" in line["options"]}
    assert {one.method for one in rows if one.tunes} == tuned - {"direct"}
    assert "fine (sigma of photos)" in {one.label for one in driver.members(settings(task="transfer"))}


def test_rows_are_chosen_by_method_or_by_name() -> None:
    chosen = driver.members(settings(methods=("weight-selection even", "fine", "direct")))
    assert [one.label for one in chosen] == ["fine", "weight-selection even", "direct"]
    with pytest.raises(SystemExit, match="there is no wave-selection"):
        driver.members(settings(methods=("wave-selection",)))


def test_a_method_is_started_from_each_thing_that_it_takes() -> None:
    line = {"method": "some", "sources": ["learngene", "model"], "condensed": "tleg"}
    assert driver.sources_of(line) == ["tleg", "ancestor"]
    assert driver.sources_of({**line, "condensed": ""}) == ["ancestor"]
    assert driver.sources_of({**line, "sources": ["learngene"], "condensed": ""}) == ["fine"]
