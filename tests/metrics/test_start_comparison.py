"""Comparisons of starts: against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from finectl.metrics import plots
from finectl.metrics.plots import _limit_bands, plot_bands
from finectl.metrics.starts import Starts, TunedRun, mean_interval, run_from, run_to

STEPS = (0, 10, 20)


def run(
    concept: str, start: str, seed: int, values: tuple[float, ...], tuning_s: float = 2.0, start_s: float = 0.0
) -> TunedRun:
    return TunedRun(concept, "test", start, seed, {"l1": dict(zip(STEPS, values, strict=True))}, tuning_s, start_s)


def runs() -> list[TunedRun]:
    found = []
    for seed in (0, 1, 2):
        found.append(run("a", "lora", seed, (0.5, 0.3, 0.2)))
        found.append(run("a", "prediction", seed, (0.3, 0.15, 0.1), start_s=0.5))
        found.append(run("b", "lora", seed, (0.7, 0.5, 0.4)))
        found.append(run("b", "prediction", seed, (0.5, 0.45, 0.42), start_s=0.5))
    return found


def test_means_and_curves() -> None:
    starts = Starts.of(runs())
    assert starts.concepts == ("a", "b") and starts.starts == ("lora", "prediction") and starts.seeds == (0, 1, 2)
    assert [point[:2] for point in starts.curve("l1", "lora")] == [
        (0, pytest.approx(0.6)),
        (10, pytest.approx(0.4)),
        (20, pytest.approx(0.3)),
    ]


def test_wins_are_of_concepts_and_differences_are_paired() -> None:
    starts = Starts.of(runs())
    found = starts.against("l1", "prediction", "lora", 20, "lower")
    assert (found.wins, found.concepts) == (1, 2)
    assert found.difference == pytest.approx((-0.1 + 0.02) / 2)
    assert starts.against("l1", "prediction", "lora", 10, "lower").wins == 2
    assert starts.against("l1", "prediction", "lora", 10, "higher").wins == 0
    assert starts.against("l1", "lora", "lora", 10, "lower").wins == 0


def test_a_difference_that_is_the_same_everywhere_has_no_width_whatever_the_level() -> None:
    shifted = [
        run(name, start, seed, (level - shift,) * 3)
        for seed in (0, 1)
        for name, level in (("a", 1.0), ("b", 9.0))
        for start, shift in (("lora", 0.0), ("prediction", 0.25))
    ]
    found = Starts.of(shifted).against("l1", "prediction", "lora", 0, "lower")
    assert (found.low, found.difference, found.high) == pytest.approx((-0.25, -0.25, -0.25))


def test_updates_to_the_threshold_and_the_speed_up_with_prediction_time() -> None:
    starts = Starts.of(runs())
    # LoRA start ends at 0.3; the prediction is at 0.4 after 0 updates and 0.3 after 10.
    found = starts.reached("l1", "prediction", "lora", "lower")
    assert found.updates == pytest.approx(10.0) and found.speed_up == pytest.approx(2.0)
    # An update takes 0.1 s: 2 s against 0.5 + 1.
    assert found.total_s == pytest.approx(1.5) and found.speed_up_total == pytest.approx(2.0 / 1.5)
    assert found.concepts == 1  # on b the prediction ends above LoRA start
    itself = starts.reached("l1", "lora", "lora", "lower")
    assert itself.updates == 20 and itself.speed_up == 1 and itself.concepts == 2


def test_a_start_that_never_reaches_it_and_one_that_is_there() -> None:
    found = [run("a", "lora", 0, (3.0, 2.0, 1.0)), run("a", "bad", 0, (9.0, 8.0, 7.0))]
    found.append(run("a", "good", 0, (0.5, 0.4, 0.3)))
    starts = Starts.of(found)
    assert starts.reached("l1", "bad", "lora", "lower").updates is None
    there = starts.reached("l1", "good", "lora", "lower")
    assert there.updates == 0 and there.speed_up == math.inf


def test_a_concept_with_a_missing_run_or_a_value_that_is_none_is_left_out() -> None:
    found = runs()
    starts = Starts.of(found[:-1])
    assert starts.concepts == ("a",) and starts.left_out == ("b",)
    broken = [*runs()[:-1], run("b", "prediction", 2, (math.nan, 0.1, 0.1))]
    assert Starts.of(broken).left_out == ("b",)


def test_the_interval_of_crossed_samples() -> None:
    assert mean_interval([[2.0]]) == (2.0, -math.inf, math.inf)
    mean, low, high = mean_interval([[1.0], [2.0], [3.0]])
    # t of 2 degrees of freedom: 4.302653; standard error sqrt(1 / 3).
    assert mean == 2 and high - mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5) == mean - low
    narrow = mean_interval([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    wide = mean_interval([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    assert narrow[1:] == pytest.approx((low, high))
    assert wide[0] == 2 and wide[2] - wide[1] > high - low


def test_a_run_survives_json_whose_keys_are_sorted_as_text() -> None:
    one = TunedRun("a", "test", "lora", 0, {"l1": {0: 0.5, 5: 0.4, 10: 0.3, 100: 0.2}}, 1.0)
    read = run_from(json.loads(json.dumps(run_to(one), sort_keys=True)))
    assert read == one and list(read.values["l1"]) == [0, 5, 10, 100]
    assert Starts.of([read]).steps("l1") == (0, 5, 10, 100)
    shuffled = TunedRun("a", "test", "lora", 0, {"l1": {10: 0.3, 0: 0.5, 5: 0.4}})
    assert Starts.of([shuffled]).steps("l1") == (0, 5, 10)


def test_curves_with_bands_are_the_same_file_for_the_same_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = {"lora": [(0.0, 0.6, 0.1, 1.1), (10.0, 0.3, 0.2, 0.4)], "one": [(0.0, 0.4, -math.inf, math.inf)]}
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        assert plot_bands(file, curves, x_label="updates", y_label="l1", title="t", better="lower")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not plot_bands(tmp_path / "c.png", {"x": [(0.0, math.nan, 0.0, 0.0)]}, x_label="x", y_label="y")
    assert not (tmp_path / "c.png").exists()


def test_bands_do_not_press_the_lines_together() -> None:
    figure = pytest.importorskip("matplotlib.figure")
    axes = figure.Figure().add_subplot()
    axes.fill_between([0, 1], [-50, -50], [50, 50])
    _limit_bands(axes, [0.2, 0.6])
    assert axes.get_ylim() == pytest.approx((-0.2, 1.0))


def test_a_start_looks_the_same_in_every_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    looks: list[list[tuple[str, str]]] = []

    def drawn(_path: Path, _names: Any, _title: str, draw: Any) -> bool:
        axes = figure.Figure().subplots()
        draw(axes)
        looks.append([(line.get_color(), line.get_marker()) for line in axes.lines])
        return True

    monkeypatch.setattr(plots, "_figure", drawn)
    points = [(0.0, 0.6, 0.1, 1.1), (10.0, 0.3, 0.2, 0.4)]
    among = ("lora", "mean", "ridge")
    for names in (among, ("mean", "ridge"), ("ridge",)):
        plots.plot_bands(tmp_path / "a.png", dict.fromkeys(names, points), x_label="x", y_label="y", among=among)
    assert len(set(looks[0])) == 3 and looks[1] == looks[0][1:] and looks[2] == looks[0][2:]
