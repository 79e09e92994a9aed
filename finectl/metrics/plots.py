"""Pictures of a comparison: curves, loss by timestep, samples side by side.

Plots are drawn with matplotlib, which may not be installed: then nothing is drawn and the caller says so. The same
values make the same file.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from finectl.metrics import METRICS
from finectl.metrics.convergence import Point, updates_of
from finectl.metrics.report import by_protocol
from finectl.metrics.units import interval_of, one_line, unit_of

if TYPE_CHECKING:
    from torch import Tensor

SIZE_INCH = (8.0, 5.0)
DPI = 120
# Okabe and Ito's colours, which people who are colour-blind tell apart, without the yellow, which is too light.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^DvP*X<>hp"
NAMES_INSIDE = 6  # more names than these do not leave room for the lines
LONGEST_BESIDE, LONGEST_NAME = 26, 60
LEGEND_LINE_INCH = 0.2
BANDS = 6  # more bands than these hide one another
WIDE = 5.0  # from this ratio of the largest to the smallest value on, a straight axis would press the lines together
DODGE = 0.012  # of the axis: how far methods of one depth stand apart
GRID_COLUMNS = 20

P = TypeVar("P", bound="tuple[float, ...]")


@dataclass(frozen=True)
class _Style:
    """How the line of one model looks; no two of 12 models look the same, without colour either."""

    color: str
    linestyle: Any
    marker: str

    @classmethod
    def of(cls, index: int) -> _Style:
        return cls(
            COLOURS[index % len(COLOURS)],
            DASHES[index // len(COLOURS) % len(DASHES)],
            MARKERS[index % len(MARKERS)],
        )

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.linestyle, "linewidth": 1.6}

    @property
    def points(self) -> dict[str, Any]:
        return {"marker": self.marker, "markersize": 4.5}


def available() -> bool:
    """Return whether matplotlib is installed."""
    try:
        return importlib.util.find_spec("matplotlib.figure") is not None
    except (ImportError, ValueError):
        return False


def plot_convergence(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Draw the held-out loss of the training logs against optimiser updates, one line a model.

    Args:
        path: The PNG file.
        curves: Model's name to (updates so far, held-out loss), tuning counted.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and there may be nothing to draw.
    """
    drawn = {name: _finite(points) for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}

    def draw(axes: Any) -> None:
        for index, points in enumerate(drawn.values()):
            style = _Style.of(index)
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, **style.line, **style.points)
        _log_if_wide(axes, [loss for points in drawn.values() for _, loss in points])
        _updates_axis(axes)
        axes.set_ylabel("held-out denoising loss (EMA weights)")

    return bool(drawn) and _figure(path, list(drawn), "", draw)


def plot_curves(path: Path, metric: str, curves: Mapping[str, Sequence[Point]]) -> bool:
    """Draw a metric against optimiser updates, one line a model, its intervals as bands.

    Args:
        path: The PNG file.
        metric: The metric's name.
        curves: Model's name to (updates, value, low, high) in the order of updates, in the metric's own units.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and there may be nothing to draw.
    """
    factor = unit_of(metric).factor
    drawn = {name: [_scaled(point, factor) for point in _finite(points)] for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}

    def draw(axes: Any) -> None:
        for index, points in enumerate(drawn.values()):
            style = _Style.of(index)
            updates, values, lows, highs = zip(*points, strict=True)
            axes.plot(updates, values, **style.line, **style.points)
            if len(points) == 1:
                axes.errorbar(updates, values, _bars(points), color=style.color, capsize=3)
            elif len(drawn) <= BANDS:
                axes.fill_between(updates, lows, highs, color=style.color, alpha=0.18, linewidth=0)
            else:
                axes.errorbar(updates, values, _bars(points), fmt="none", ecolor=style.color, alpha=0.5, linewidth=0.8)
        _log_if_wide(axes, [value for points in drawn.values() for _, value, *_ in points], METRICS[metric].better)
        _updates_axis(axes)
        axes.set_ylabel(_axis_label(metric))

    return bool(drawn) and _figure(path, list(drawn), _title(metric), draw)


def plot_bands(
    path: Path,
    curves: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    better: str = "",
    among: Sequence[str] = (),
) -> bool:
    """Draw lines with their intervals: bands of a few, bars of many.

    Args:
        path: The PNG file.
        curves: Name to (x, value, low, high) in the order of x; no end of an interval that is not finite is drawn.
        x_label: What x is.
        y_label: What the values are.
        title: The line above.
        better: "lower" allows a logarithmic axis for values that fall far.
        among: The names of several pictures, in each of which one name looks the same; by default those of `curves`.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and there may be nothing to draw.
    """
    styles = {name: _Style.of(index) for index, name in enumerate(among or curves)}
    drawn = {name: _finite(points) for name, points in curves.items() if _finite(points)}

    def draw(axes: Any) -> None:
        for name, points in drawn.items():
            style = styles[name]
            places, values, lows, highs = zip(*points, strict=True)
            axes.plot(places, values, **style.line, **style.points)
            if not all(math.isfinite(end) for end in (*lows, *highs)):
                continue
            if len(drawn) <= BANDS:
                axes.fill_between(places, lows, highs, color=style.color, alpha=0.15, linewidth=0)
            else:
                axes.errorbar(places, values, _bars(points), fmt="none", ecolor=style.color, alpha=0.5, linewidth=0.8)
        every = [value for points in drawn.values() for _, value, *_ in points]
        _log_if_wide(axes, every, better or "higher")
        _limit_bands(axes, every)
        if all(float(x).is_integer() for points in drawn.values() for x, *_ in points):
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return bool(drawn) and _figure(path, list(drawn), title, draw)


def plot_by_depth(path: Path, metric: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Draw a metric against the models' depth, one line a method, with error bars.

    Of a model's checkpoints the last counts. Two models of one method and depth are two points; the line goes through
    their mean. Only values of one protocol, that of the first, are drawn.

    Args:
        path: The PNG file.
        metric: The metric's name.
        rows: The rows of a comparison.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and one depth makes no curve.
    """
    chosen, apart = _comparable(rows, metric)
    factor = unit_of(metric).factor
    methods: dict[str, list[Point]] = {}
    for row, value in chosen:
        if isinstance(row.get("depth"), int) and math.isfinite(value["value"]):
            point = (float(row["depth"]), value["value"], *interval_of(value))
            methods.setdefault(one_line(row.get("method")), []).append(_scaled(point, factor))

    depths = {point[0] for points in methods.values() for point in points}

    def draw(axes: Any) -> None:
        for index, points in enumerate(methods.values()):
            style = _Style.of(index)
            aside = (index - (len(methods) - 1) / 2) * DODGE * (max(depths) - min(depths))
            stops = sorted({point[0] for point in points})
            means = [fmean(value for depth, value, *_ in points if depth == stop) for stop in stops]
            axes.plot([stop + aside for stop in stops], means, **style.line)
            places, values = [point[0] + aside for point in points], [point[1] for point in points]
            axes.errorbar(places, values, _bars(points), fmt="none", ecolor=style.color, capsize=3)
            axes.plot(places, values, color=style.color, linestyle="none", **style.points)
        _log_if_wide(axes, [value for points in methods.values() for _, value, *_ in points], METRICS[metric].better)
        axes.set_xticks(sorted(depths))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("depth (transformer blocks)")
        axes.set_ylabel(_axis_label(metric))

    return len(depths) > 1 and _figure(path, list(methods), _title(metric) + _apart_text(apart), draw)


def plot_loss_by_timestep(path: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Draw the held-out loss by range of timesteps, one stepped line a model, its intervals as bands.

    Of a model's checkpoints the last counts. Only losses of one protocol, that of the first, are drawn.

    Args:
        path: The PNG file.
        rows: The rows of a comparison; `row["loss"]["ranges"]` has `first`, `last`, `loss` and perhaps `interval`.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and there may be nothing to draw.
    """
    chosen, apart = _comparable(rows, "loss")
    drawn = {}
    for row, value in chosen:
        parts = [part for part in value.get("ranges") or () if part["terms"] and math.isfinite(part["loss"])]
        if parts:
            drawn[row["name"]] = parts

    def draw(axes: Any) -> None:
        for index, parts in enumerate(drawn.values()):
            style = _Style.of(index)
            edges = [edge for part in parts for edge in (part["first"], part["last"] + 1)]
            axes.plot(edges, _twice(part["loss"] for part in parts), **style.line)
            share = (index + 1) / (len(drawn) + 1)  # markers of one range stand side by side, not on one another
            places = [part["first"] + share * (part["last"] + 1 - part["first"]) for part in parts]
            axes.plot(places, [part["loss"] for part in parts], linestyle="none", color=style.color, **style.points)
            intervals = [interval_of({"value": part["loss"], "interval": part.get("interval")}) for part in parts]
            if len(drawn) <= BANDS and all(math.isfinite(end) for ends in intervals for end in ends):
                lows, highs = zip(*intervals, strict=True)
                axes.fill_between(edges, _twice(lows), _twice(highs), color=style.color, alpha=0.18, linewidth=0)
        _log_if_wide(axes, [part["loss"] for parts in drawn.values() for part in parts])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.margins(x=0.01)
        axes.set_xlabel("timestep t (more noise to the right)")
        axes.set_ylabel(_axis_label("loss"))

    title = "held-out denoising loss by timestep (lower is better)"
    return bool(drawn) and _figure(path, list(drawn), title + _apart_text(apart), draw)


def draw_samples(path: Path, pictures: Sequence[Tensor], names: Sequence[str]) -> None:
    """Draw the first images of every model, one row a model; those of a column come from the same noise.

    Args:
        path: The PNG file.
        pictures: For each model, images (N, C, H, W) as uint8 levels, grey or RGB, of any size; up to 20 are shown.
        names: The models' names, drawn at the left.
    """
    from finectl.data.images import make_rows

    path.parent.mkdir(parents=True, exist_ok=True)
    make_rows([levels[:GRID_COLUMNS] for levels in pictures], [one_line(name) for name in names]).save(path)


def _figure(path: Path, names: Sequence[str], title: str, draw: Callable[[Any], None]) -> bool:
    """Make a figure of one plot, let `draw` fill it, put the legend where there is room, and save it."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        return False
    shown = [_legend_name(name) for name in names]
    inside, beside = len(names) <= NAMES_INSIDE, max(map(len, shown)) <= LONGEST_BESIDE
    columns = 2 if max(map(len, shown)) <= LONGEST_NAME // 2 + 6 else 1
    below = 0 if inside or beside else math.ceil(len(names) / columns)
    figure = Figure(figsize=(SIZE_INCH[0], SIZE_INCH[1] + below * LEGEND_LINE_INCH), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title.replace("$", r"\$"), fontsize="medium")
    styles = [_Style.of(index) for index in range(len(names))]
    handles = [Line2D([], [], **style.line, **style.points) for style in styles]
    if inside:
        axes.legend(handles, shown, fontsize="small")
    elif beside:
        figure.legend(handles, shown, fontsize="small", loc="outside right upper")
    else:
        figure.legend(handles, shown, fontsize="small", loc="outside lower center", ncols=columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return True


def _comparable(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[tuple[Any, Any]], int]:
    """Return (row, value) of each model's last checkpoint, of the first protocol, and how many models are not of it."""
    last: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: updates_of(row) or 0):
        if row.get(metric) is not None:
            last[row["name"]] = row
    kept = [last[name] for name in dict.fromkeys(row["name"] for row in rows) if name in last]
    groups = by_protocol([row[metric] for row in kept])
    chosen = [(row, value) for row, value in zip(kept, groups[0], strict=True) if value is not None] if groups else []
    return chosen, len(kept) - len(chosen)


def _apart_text(count: int) -> str:
    if count == 0:
        return ""
    return f"\n{count} {'model' if count == 1 else 'models'} measured in another way left out"


def _finite(points: Sequence[P]) -> list[P]:
    return [point for point in points if math.isfinite(point[1])]


def _scaled(point: Point, factor: float) -> Point:
    updates, value, low, high = point
    return updates, value * factor, low * factor, high * factor


def _bars(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """Return the error bars of points, below and above; none where the interval has no end."""
    below, above = ([value - low for _, value, low, _ in points], [high - value for _, value, _, high in points])
    return _lengths(below), _lengths(above)


def _lengths(values: Sequence[float]) -> list[float]:
    return [max(value, 0.0) if math.isfinite(value) else 0.0 for value in values]


def _twice(values: Iterable[float]) -> list[float]:
    return [value for value in values for _ in range(2)]


def _log_if_wide(axes: Any, values: Sequence[float], better: str = "lower") -> None:
    """Use a logarithmic axis, with plain numbers at its ticks, for values that fall towards 0 over a wide range."""
    if better != "lower" or min(values) <= 0 or max(values) / min(values) <= WIDE:
        return
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _limit_bands(axes: Any, values: Sequence[float]) -> None:
    """Cut bands off that are so wide that the lines would lie on one another."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(max(low, min(values) / 2), min(high, 2 * max(values)))
    elif (span := max(values) - min(values)) > 0:
        axes.set_ylim(max(low, min(values) - span), min(high, max(values) + span))


def _updates_axis(axes: Any) -> None:
    axes.set_xlabel("optimiser updates, tuning counted")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _axis_label(metric: str) -> str:
    unit = unit_of(metric).suffix.strip()
    return f"{metric}, {unit}" if unit else metric


def _title(metric: str) -> str:
    entry = METRICS[metric]
    return f"{entry.help} ({entry.better} is better)"


def _legend_name(name: str) -> str:
    """Return a name as the legend shows it: not as a formula, and cut in its middle where it is very long."""
    name = one_line(name)
    if len(name) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        name = f"{name[:half]}…{name[-half:]}"
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name  # matplotlib leaves names out that begin with _
