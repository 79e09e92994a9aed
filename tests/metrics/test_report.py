"""The comparison as people see it: names, table, convergence plot, samples side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from finectl.console import format_table
from finectl.metrics.frechet import frechet_distance, frechet_with_interval, moments
from finectl.metrics.report import comparison_table, draw_samples, plot_convergence, row_names

ROW: dict[str, Any] = {
    "name": "dit-nano-fine-l2",
    "method": "fine",
    "depth": 2,
    "parameters": 179_588,
    "transferred": 101_888,
    "transferred_with_embedders": None,
    "steps": 600,
    "seconds": 12.4,
    "loss": {"value": 0.09123, "interval": [0.09, 0.0924]},
    "accuracy": {"value": 0.875, "interval": [0.85, 0.9]},
}


def test_names_are_slugs_unless_two_are_the_same() -> None:
    assert row_names(["dit-fine-l2-00000001", "dit-he-l2-00000002"]) == ["dit-fine-l2", "dit-he-l2"]
    assert row_names(["a-1", "a-2", "b-3"]) == ["a-1", "a-2", "b"]


def test_the_table_shows_what_was_measured_with_half_the_interval() -> None:
    columns, cells = comparison_table([ROW])
    shown = dict(zip(columns, cells[0], strict=True))
    assert "frechet" not in shown
    assert shown["loss"] == "0.0912 ±0.0012" and shown["accuracy"] == "87.5 % ±2.5"
    assert shown["parameters"] == "179,588" and shown["with embedders"] == "?" and shown["seconds"] == "12"
    lines = format_table(columns, cells).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 3


def test_the_plot_is_a_picture_and_nothing_is_drawn_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "convergence.png"
    assert not plot_convergence(path, {"a": []}) and not path.exists()
    assert plot_convergence(path, {"a": [(0, 1.0), (10, 0.5)], "b": [(0, 0.4), (10, 0.2)]})
    with Image.open(path) as picture:
        assert picture.size == (960, 600)


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_convergence(tmp_path / "plot.png", {"a": [(0, 1.0)]})


def test_samples_are_drawn_one_row_a_model(tmp_path: Path) -> None:
    dark, light = torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.full((5, 1, 8, 8), 255, dtype=torch.uint8)
    draw_samples(tmp_path / "samples.png", [dark, light])
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.size == (5 * 34 + 2, 2 * 34 + 2)
        assert picture.getpixel((10, 10)) == 0 and picture.getpixel((10, 50)) == 255


def test_the_interval_of_the_distance_holds_the_value_and_shrinks() -> None:
    random = torch.Generator().manual_seed(0)
    reference = torch.randn(2000, 4, generator=random)
    widths = []
    for count in (100, 1600):
        features = torch.randn(count, 4, generator=random) + 0.5
        value, low, high = frechet_with_interval(features, reference, seed=0)
        assert value == frechet_distance(*moments(features), *moments(reference))
        assert low <= value <= high
        assert frechet_with_interval(features, reference, seed=0) == (value, low, high)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
