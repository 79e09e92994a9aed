"""Plots of initializers.sh: quality against parameters transferred, metrics over updates, cost of several models."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from initializers_results import DIRECT, FINE, METRICS, MODELS, SMALL_SHARE, Results, costed, costs

from finectl.metrics.plots import COLOURS, DASHES, DPI, MARKERS

WIDE = 3.0  # from this ratio of values on, an axis is logarithmic
DODGE = 1.05  # how far methods that transfer equally much stand apart on a logarithmic axis


def plot_all(results: Results, folder: Path) -> None:
    """Draw everything there is to draw."""
    for metric, title, _, factor, higher in METRICS:
        plot_pareto(results, folder / f"pareto-{metric}.png", metric, title, factor, higher)
        plot_curves(results, folder / f"curves-{metric}.png", metric, title, factor, higher)
    plot_cost(results, folder / "cost.png")


def style(index: int) -> dict[str, Any]:
    """Return colour, line and marker of a label; no two of 28 look the same."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {
        "color": COLOURS[index % len(COLOURS)], "linestyle": dash, "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.4, "markersize": 5,
    }  # fmt: skip


def styles(results: Results) -> dict[str, dict[str, Any]]:
    looks = {label: style(index) for index, label in enumerate(results.labels)}
    stand_out = {"linewidth": 2.6, "markeredgecolor": "black"}
    return {label: {**look, **(stand_out if label.startswith(FINE) else {})} for label, look in looks.items()}


def panels(count: int, rows: int = 1) -> tuple[Any, list[list[Any]]]:
    """Return a figure of `count` panels beside each other in each of its rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.0, 3.6 * count), 3.4 * rows + 1.6), layout="constrained")
    return figure, figure.subplots(rows, count, squeeze=False).tolist()


def save(figure: Any, path: Path, handles: Mapping[str, Mapping[str, Any]]) -> None:
    """Put the legend below the panels and write the picture."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], **look) for look in handles.values()]
    columns = max(1, int(figure.get_size_inches()[0] / (0.075 * max(map(len, handles)) + 0.7)))
    figure.legend(lines, list(handles), fontsize="small", loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def scale(axes: Any, values: Sequence[float], higher: bool) -> None:
    """Use a logarithmic axis for values that fall towards 0 over a wide range, with plain numbers at its ticks."""
    if higher or not values or min(values) <= 0 or max(values) < WIDE * min(values):
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if max(values) < 20 * min(values) else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot_pareto(results: Results, path: Path, metric: str, title: str, factor: float, higher: bool) -> None:
    """Draw quality against parameters transferred, one column a depth, for few updates and for all of them."""
    chosen = list(dict.fromkeys([next((s for s in results.steps if s > 0), 0), *results.steps[-1:]]))
    looks = {label: {**look, "linestyle": "none", "markersize": 7} for label, look in styles(results).items()}
    figure, rows = panels(len(results.depths), len(chosen))
    for step, line in zip(chosen, rows, strict=True):
        for depth, axes in zip(results.depths, line, strict=True):
            found = {label: results.values(label, metric, depth=depth, updates=step) for label in results.labels}
            scores = {label: [factor * value for value in values] for label, values in found.items() if values}
            draw_pareto(axes, results, depth, scores, looks, higher)
            axes.set_title(f"depth {depth}, {step:,} updates", fontsize="medium")
        line[0].set_ylabel(title)
    for axes in rows[-1]:
        axes.set_xlabel("% of the ancestor transferred")
    save(figure, path, looks)


def draw_pareto(
    axes: Any,
    results: Results,
    depth: int,
    scores: Mapping[str, Sequence[float]],
    looks: Mapping[str, Mapping[str, Any]],
    higher: bool,
) -> None:
    """Fill one panel: the methods, those that transfer equally much side by side, and the front."""
    shares = {label: results.share(label, depth=depth) for label in scores}
    nothing = min((share for share in shares.values() if share > 0), default=0.1) / 3  # where 0 stands on the axis
    points = {label: (100 * (share or nothing), statistics.fmean(scores[label])) for label, share in shares.items()}
    for label, (place, value) in points.items():
        equal = [other for other in points if math.isclose(points[other][0], place, rel_tol=0.02)]
        aside = DODGE ** (equal.index(label) - (len(equal) - 1) / 2)
        bar = statistics.stdev(scores[label]) if len(scores[label]) > 1 else None
        axes.errorbar([place * aside], [value], yerr=bar, capsize=2, **looks[label])
    front = pareto_front(list(points.values()), higher)
    if front:
        front.append((110.0, front[-1][1]))
        axes.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
    axes.axvline(100 * SMALL_SHARE, color="0.8", linewidth=1, zorder=0)
    axes.set_xscale("log")
    ticks = [tick for tick in (5, 10, 15, 25, 50, 100) if tick > 200 * nothing]
    axes.set_xticks([100 * nothing, *ticks], ["0", *map(str, ticks)])
    axes.set_xlim(right=130)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    scale(axes, [value for _, value in points.values()], higher)


def pareto_front(points: Sequence[tuple[float, float]], higher: bool) -> list[tuple[float, float]]:
    """Return the points that none with as few parameters is better than, from the fewest parameters on."""
    front: list[tuple[float, float]] = []
    for place, value in sorted(points, key=lambda point: (point[0], -point[1] if higher else point[1])):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((place, value))
    return front


def best_variants(results: Results) -> list[str]:
    """Return one label a method: that of the lowest loss after all updates, mean over depths and seeds."""
    last = results.steps[-1]
    found: dict[str, tuple[float, str]] = {}
    for label in results.labels:
        values = results.values(label, "loss", updates=last)
        key = label if label.startswith(FINE) else results.of(label)[0]["method"]
        if values and (key not in found or statistics.fmean(values) < found[key][0]):
            found[key] = (statistics.fmean(values), label)
    chosen = {label for _, label in found.values()}
    return [label for label in results.labels if label in chosen]


def plot_curves(results: Results, path: Path, metric: str, title: str, factor: float, higher: bool) -> None:
    """Draw a metric over updates, one panel a depth: the best variant of each method."""
    labels, looks = best_variants(results), styles(results)
    upper = {"color": "0.35", "linestyle": "--", "linewidth": 1}
    across = min(2, len(results.depths))
    figure, rows = panels(across, math.ceil(len(results.depths) / across))
    figure.set_size_inches(max(9.0, 5.4 * across), 4.2 * len(rows) + 1.6)
    every = [axes for line in rows for axes in line]
    linear = next((step for step in results.steps if step > 0), 1)
    # What starts at random is far off at first; the axis is for what comes after.
    late = results.steps[2:] if len(results.steps) > 3 else results.steps
    for depth, axes in zip(results.depths, every, strict=False):
        drawn = []
        for label in labels:
            points = [(step, results.values(label, metric, depth=depth, updates=step)) for step in results.steps]
            known = [(step, factor * statistics.fmean(values)) for step, values in points if values]
            if known:
                drawn += [value for step, value in known if step in late]
                axes.plot(*zip(*known, strict=True), **looks[label])
        direct = results.values(DIRECT, metric, depth=depth, updates=results.settings["budget"])
        if direct:
            drawn.append(factor * statistics.fmean(direct))
            axes.axhline(drawn[-1], **upper)
        axes.set_xscale("symlog", linthresh=linear)
        axes.set_xticks(results.steps, [f"{step:,}" for step in results.steps])
        axes.set_xlim(left=-linear / 8)
        axes.minorticks_off()
        scale(axes, drawn, higher)
        limit(axes, drawn)
        axes.set_title(f"depth {depth}", fontsize="medium")
        axes.set_xlabel("optimiser updates, tuning counted")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    for axes in every[len(results.depths) :]:
        axes.set_visible(False)
    save(
        figure,
        path,
        {**{label: looks[label] for label in labels}, f"direct, {results.settings['budget']:,} updates": upper},
    )


def is_near(one: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether two costs would be one line in a plot."""
    return all(math.isclose(*pair, rel_tol=0.02) for pair in zip(one, other, strict=True))


def limit(axes: Any, values: Sequence[float]) -> None:
    """Let the axis span these values with a little room."""
    low, high = min(values), max(values)
    if axes.get_yscale() == "log":
        room = (high / low) ** 0.06
        axes.set_ylim(low / room, high * room)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def plot_cost(results: Results, path: Path) -> None:
    """Draw the total cost over the number of models: updates and operations; lines that are the same are one."""
    from matplotlib.ticker import EngFormatter

    figure, [[*both]] = panels(2)
    figure.set_size_inches(11.0, 6.4)
    looks: dict[str, dict[str, Any]] = {}
    counts = range(1, MODELS[-1] + 1)
    for axes, unit, title in zip(both, ("steps", "flops"), ("updates", "FLOP of training"), strict=True):
        lines: dict[tuple[float, float], list[str]] = {}
        for label in costed(results):
            once, each = costs(results, label, unit)
            near = next((key for key in lines if is_near(key, (once, each))), (once, each))
            lines.setdefault(near, []).append(label)
        for (once, each), labels in lines.items():
            name = ", ".join(labels) if len(labels) < 3 else f"{labels[0]} and {len(labels) - 1} more"
            look = looks.setdefault(name, style(len(looks)))
            axes.plot(counts, [once + count * each for count in counts], **look)
        axes.set_xlabel("number of models")
        axes.set_ylabel(f"total {title}")
        axes.set_xticks(list(counts))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}" if unit == "steps" else EngFormatter())
        axes.grid(alpha=0.3)
    save(figure, path, looks)
