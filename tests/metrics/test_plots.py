"""Plots and grids: drawn, the same file from the same values, and without matplotlib not drawn."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageFont

from finectl.metrics.plots import (
    available,
    draw_samples,
    plot_by_depth,
    plot_convergence,
    plot_curves,
    plot_loss_by_timestep,
)

SHAPE = (960, 600)
LONG = "dit-b-2-fine-l12-imagenet-256-latents-lr0.0001-wd0.0-batch256-seed{}-t40000"


def row(name: str, method: str, depth: Any, loss: float, n: int = 500, **more: Any) -> dict[str, Any]:
    ranges = [
        {"first": 250 * part, "last": 250 * part + 249, "loss": loss / 4**part, "interval": [0.0, loss], "terms": 9}
        for part in range(4)
    ]
    measured = {"value": loss, "interval": [loss - 0.1, loss + 0.1], "n": n, "protocol": {"n": n}, "ranges": ranges}
    return {"name": name, "method": method, "depth": depth, "checkpoint": None, "steps": 400, "loss": measured, **more}


ROWS = [row("a", "fine", 2, 0.4), row("b", "he", 2, 0.9), row("c", "fine", 6, 0.3), row("d", "he", 6, 0.8)]
CURVES = {
    "a": [(0, 1.0, 0.9, 1.1), (10, 0.5, 0.4, 0.6)],
    "_b $x$ [bold]": [(0, 0.4, 0.3, 0.5), (10, 0.2, -math.inf, math.inf)],
    "one": [(5, 0.7, 0.6, 0.8)],
}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_every_plot_is_a_picture_and_the_same_values_make_the_same_file(tmp_path: Path) -> None:
    for folder in (tmp_path / "plots", tmp_path / "again"):
        assert plot_curves(folder / "curves.png", "loss", CURVES)
        assert plot_by_depth(folder / "depth.png", "loss", ROWS)
        assert plot_loss_by_timestep(folder / "timestep.png", ROWS)
        assert plot_convergence(folder / "convergence.png", {"a": [(0, 1.0), (10, 0.5)], "b": [(0, 0.4)], "c": []})
    for name in ("curves", "depth", "timestep", "convergence"):
        path = tmp_path / "plots" / f"{name}.png"
        assert size(path) == SHAPE
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_nothing_is_drawn_from_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "plot.png"
    assert not plot_convergence(path, {"a": []})
    assert not plot_curves(path, "loss", {"a": [(0, math.nan, math.nan, math.nan)]})
    assert not plot_by_depth(path, "loss", [ROWS[0], row("e", "he", 2, 0.5), row("f", "he", None, 0.5)]), "one depth"
    assert not plot_by_depth(path, "fid", ROWS)
    assert not plot_loss_by_timestep(path, [{"name": "a"}])
    assert not path.exists()


def test_without_matplotlib_there_is_no_plot_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not available()
    path = tmp_path / "plot.png"
    assert not plot_convergence(path, {"a": [(0, 1.0)]})
    assert not plot_curves(path, "loss", CURVES)
    assert not plot_by_depth(path, "loss", ROWS)
    assert not plot_loss_by_timestep(path, ROWS)
    assert not path.exists()


def test_many_names_stand_outside_the_plot_and_long_ones_below_it(tmp_path: Path) -> None:
    points = CURVES["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where it cannot lay a figure out
        assert plot_curves(tmp_path / "beside.png", "loss", {f"model-{index}": points for index in range(12)})
        assert plot_curves(tmp_path / "below.png", "loss", {LONG.format(index): points for index in range(12)})
    assert size(tmp_path / "beside.png") == SHAPE
    assert size(tmp_path / "below.png")[1] > SHAPE[1], "the legend takes nothing from the plot"


def axes_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep the axes of every figure that is saved."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: kept.extend(self.axes))
    return kept


def test_axes_have_units_and_are_logarithmic_where_values_fall_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = axes_of(monkeypatch)
    plot_curves(tmp_path / "a.png", "accuracy", {"a": [(0, 0.05, 0.04, 0.06), (10, 0.9, 0.8, 1.0)]})
    plot_curves(tmp_path / "b.png", "fid", {"a": [(0, 300.0, 290, 310), (10, 3.0, 2.9, 3.1)]})
    accuracy, fid = axes
    assert accuracy.get_ylabel() == "accuracy, %" and accuracy.get_yscale() == "linear"
    assert list(accuracy.get_lines()[0].get_ydata()) == pytest.approx([5.0, 90.0])
    assert fid.get_yscale() == "log" and "lower is better" in fid.get_title()
    assert fid.get_xlabel() == "optimiser updates, tuning counted"


def test_names_are_text_in_the_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = axes_of(monkeypatch)
    plot_curves(tmp_path / "a.png", "loss", CURVES)
    texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert texts == ["a", r" _b \$x\$ [bold]", "one"]


def test_a_model_measured_in_another_way_is_left_out_and_the_title_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    axes = axes_of(monkeypatch)
    rows = [*ROWS, row("e", "mimetic", 4, 0.1, n=20)]
    plot_by_depth(tmp_path / "a.png", "loss", rows)
    plot_loss_by_timestep(tmp_path / "b.png", rows)
    for one in axes:
        assert "1 model measured in another way left out" in one.get_title()
    assert list(axes[0].get_xticks()) == [2, 6]
    assert len(axes[1].get_legend().get_texts()) == 4


def test_the_last_checkpoint_counts_where_a_model_is_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = axes_of(monkeypatch)
    rows = [
        row("a", "fine", 2, 0.2, checkpoint=300),
        row("a", "fine", 2, 0.9, checkpoint=100),
        row("b", "fine", 6, 0.1),
    ]
    plot_by_depth(tmp_path / "a.png", "loss", rows)
    assert list(axes[0].get_lines()[0].get_ydata()) == [0.2, 0.1]


def levels(value: int, count: int = 5, channels: int = 1, side: int = 8) -> torch.Tensor:
    return torch.full((count, channels, side, side), value, dtype=torch.uint8)


def test_samples_stand_one_row_a_model_with_its_name(tmp_path: Path) -> None:
    draw_samples(tmp_path / "samples.png", [levels(0), levels(255)], ["a", "[bold]"])
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "L"
        left = picture.width - 5 * 50 - 2
        assert picture.height == 2 * 50 + 2 and left > 16
        for column in range(5):
            x = left + 2 + column * 50
            assert picture.getpixel((x, 2)) == picture.getpixel((x + 47, 49)) == 0
            assert picture.getpixel((x, 52)) == picture.getpixel((x + 47, 99)) == 255
            assert picture.getpixel((x - 1, 25)) == 127, "between the images"
        for top in (0, 51):
            name = picture.crop((0, top, left, top + 50))
            assert name.getpixel((0, 0)) == 255 and name.getextrema()[0] < 64, "dark letters on white"


def test_grey_and_colour_and_other_sizes_go_together(tmp_path: Path) -> None:
    colour = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    colour[:, 0] = 200
    draw_samples(tmp_path / "samples.png", [colour, levels(90, 2), levels(5, 30, 3, 24)], ["a", "b", "c"])
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB" and picture.height == 3 * 66 + 2
        left = picture.width - 20 * 66 - 2
        assert picture.getpixel((left + 2, 2)) == (200, 0, 0)
        assert picture.getpixel((left + 2 + 63, 68 + 63)) == (90, 90, 90), "8 pixels became 64"
        assert picture.getpixel((left + 2 + 19 * 66, 2 * 66 + 2)) == (5, 5, 5), "20 columns of 30 images"


def test_rows_of_large_images_and_long_names_stay_in_bounds(tmp_path: Path) -> None:
    draw_samples(tmp_path / "wide.png", [levels(0, 20, 3, 256)], [LONG * 4])
    assert size(tmp_path / "wide.png")[0] <= 4096 + 320


def test_an_old_pillow_has_one_size_of_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bitmap = ImageFont.load_default_imagefont()
    monkeypatch.setattr(ImageFont, "load_default", lambda: bitmap)
    draw_samples(tmp_path / "samples.png", [levels(0)], ["a-name"])
    assert size(tmp_path / "samples.png")[1] == 52
