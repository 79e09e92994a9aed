"""The pictures of `analyse`, each of which says what it shows.

The same values make the same file; matplotlib has to be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finectl.metrics.plots import COLOURS, DPI
from finectl.stages.analyse.config import ACTIVATIONS, COSINES, GRADIENTS, LANDSCAPE, NORMS
from finectl.stages.analyse.vectors import in_order

LEVELS = 14
LONGEST_BESIDE = 64  # names above this stand below one another
NUMBERS = 12  # cells a side up to which a heat map has room for its numbers
ROW_INCH, BOX_INCH = 0.26, 0.17
POINTS = {"theta_0": "o", "merged": "*"}
POINT_MARKERS = ("s", "^")
PANELS_ACROSS = 3

Result = Mapping[str, Any]


def plot_norms(folder: Path, names: Sequence[str], found: Result) -> None:
    """Draw the entries of task vectors as boxes, by block and by kind of layer, and relative norms by block."""
    for group, title in (("blocks", "block"), ("layers", "kind of layer")):
        places = sorted(found[group], key=in_order)
        height = 1.4 + len(places) * (0.12 + BOX_INCH * len(names))
        figure, (left, right) = _figure(12.0, height, columns=2, sharey=True)
        for index in range(len(names)):
            boxes = [found[group][place]["quantiles"][index] for place in places]
            _draw_boxes(left, boxes, index, len(names))
            values = [found[group][place]["relative"][index] or 0.0 for place in places]
            heights = [_offset(row, index, len(names)) for row in range(len(places))]
            right.barh(heights, values, height=0.8 / len(names), color=_colour(index))
        left.set_xscale("log")
        left.set_yticks(range(len(places)), places)
        left.invert_yaxis()
        left.set_xlabel("|entry of tau|: quartiles, whiskers at 5 % and 95 %")
        right.set_xlabel("|tau| / |theta_0|")
        for axes in (left, right):
            axes.grid(alpha=0.3, axis="x")
        _legend(figure, names)
        figure.suptitle(f"task vectors tau = theta_i - theta_0, by {title}", fontsize="medium")
        _save(figure, folder / f"norms-by-{group[:-1]}.png")


def plot_cosines(folder: Path, names: Sequence[str], found: Result) -> None:
    """Draw the cosines of task vectors: all pairs over all parameters, and each pair by block."""
    side, room = 2.0 + 0.75 * len(names), 0.08 * max(map(len, _short(names)))
    figure, axes = _figure(side + 1.2 + room, side + room / 2)
    _heat_map(figure, axes, found["whole"], "cosine")
    axes.set_xticks(range(len(names)), _short(names), rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), _short(names))
    axes.set_title("cosines between task vectors,\nall parameters", fontsize="medium")
    _save(figure, folder / "cosines.png")

    blocks = sorted(found["blocks"], key=in_order)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]
    values = [[found["blocks"][block][i][j] for i, j in pairs] for block in blocks]
    short = _short(names)
    labels = [f"{short[i]}\nand {short[j]}" for i, j in pairs]
    figure, axes = _figure(max(5.0, 4.0 + 0.75 * len(pairs)), 1.9 + ROW_INCH * len(blocks))
    _heat_map(figure, axes, values, "cosine")
    if len(pairs) == 1:
        axes.set_xticks([0], labels)
    else:
        axes.set_xticks(range(len(pairs)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_title("cosines between task vectors, by block", fontsize="medium")
    _save(figure, folder / "cosines-by-block.png")


def plot_gradients(folder: Path, names: Sequence[str], found: Result) -> None:
    """Draw the cosines between gradients at single timesteps."""
    times = found["timesteps"]
    figure, axes = _figure(7.4, 6.2)
    _heat_map(figure, axes, found["cosines"], "cosine")
    for border in found["borders"][1:-1]:
        place = sum(time < border for time in times) - 0.5
        axes.axhline(place, color="black", linewidth=0.8, linestyle="--")
        axes.axvline(place, color="black", linewidth=0.8, linestyle="--")
    step = max(1, len(times) // 10)
    ticks = list(range(0, len(times), step))
    axes.set_xticks(ticks, [str(times[tick]) for tick in ticks])
    axes.set_yticks(ticks, [str(times[tick]) for tick in ticks])
    axes.set_xlabel("timestep t (more noise to the right)")
    axes.set_ylabel("timestep t")
    title = f"cosines between the loss's gradients at theta_0, {found['images']} images a timestep"
    if found["within"] is not None and found["between"] is not None:
        title += f"\nmean {found['within']:.2f} within a range (dashed), {found['between']:.2f} between ranges"
    axes.set_title(title, fontsize="medium")
    _save(figure, folder / "gradients.png")


def plot_landscape(folder: Path, names: Sequence[str], found: Result) -> None:
    """Draw the loss in the plane of two task vectors, over all timesteps and over each range."""
    figure, axes = _figure(8.2, 6.6)
    points = found["points"]
    _contours(figure, axes, found, found["loss"])
    _mark(axes, points)
    axes.set_title(
        "held-out denoising loss at theta_0 + a u + b v (lower is better),\nthe same noise everywhere",
        fontsize="medium",
    )
    axes.set_xlabel(f"a, along the task vector of {_short([points[1]['name']])[0]}")
    axes.set_ylabel(f"b, along what {_short([points[2]['name']])[0]} adds")
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= LONGEST_BESIDE else 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize="small")
    _save(figure, folder / "landscape.png")
    ranges = [part for part in found["ranges"] if all(value is not None for row in part["loss"] for value in row)]
    if not ranges:
        return
    columns = min(len(ranges), PANELS_ACROSS if len(ranges) != 4 else 2)
    rows = -(-len(ranges) // columns)
    figure, panels = _figure(1.0 + 4.6 * columns, 0.9 + 4.0 * rows, columns=columns, rows=rows)
    flat = list(panels.flat) if len(ranges) > 1 else [panels]
    for panel, part in zip(flat, ranges, strict=False):
        _contours(figure, panel, found, part["loss"])
        _mark(panel, points)
        panel.set_title(f"timesteps {part['first']} to {part['end'] - 1}", fontsize="medium")
        panel.set_xlabel("a")
        panel.set_ylabel("b")
    for panel in flat[len(ranges) :]:
        panel.set_axis_off()
    handles, labels = flat[0].get_legend_handles_labels()
    labels = [*_short([point["name"] for point in points]), labels[-1]]
    across = len(labels) if max(map(len, labels)) <= LONGEST_BESIDE // 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=across, fontsize="small")
    figure.suptitle("held-out denoising loss by range of timesteps (each panel with its own scale)", fontsize="medium")
    _save(figure, folder / "landscape-by-range.png")


def plot_activations(folder: Path, names: Sequence[str], found: Result) -> None:
    """Draw how unevenly the change of each block's output lies over channels, and over positions."""
    models = found["models"]
    places = sorted(models[0]["blocks"], key=in_order)
    height = 1.6 + len(places) * (0.12 + BOX_INCH * len(models))
    figure, panels = _figure(12.0, height, columns=2, sharey=True, sharex=True)
    for axes, kind in zip(panels, ("channels", "positions"), strict=True):
        for index, model in enumerate(models):
            blocks = [model["blocks"][place] for place in places]
            boxes = [_quantiles([value / (block["change"] or 1.0) for value in block[kind]]) for block in blocks]
            _draw_boxes(axes, boxes, index, len(models))
        axes.axvline(1.0, color="black", linewidth=0.8, alpha=0.6)
        axes.set_title(f"by {kind[:-1]}", fontsize="medium")
        axes.set_xlabel(f"mean change of a {kind[:-1]} / mean change of the block")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(places)), places)
    panels[0].invert_yaxis()
    _legend(figure, names)
    figure.suptitle(
        "change of blocks' outputs, |F of the model - F of theta_0|: quartiles, whiskers at 5 % and 95 %",
        fontsize="medium",
    )
    _save(figure, folder / "activations.png")


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _offset(row: int, index: int, count: int) -> float:
    """Return where the bar of a model stands in its row, all of them side by side."""
    return row + (index - (count - 1) / 2) * 0.8 / count


def _draw_boxes(axes: Any, boxes: Sequence[Sequence[float]], index: int, count: int) -> None:
    """Draw one lying box a row, of five quantiles each: whiskers, quartiles and, in black, the median."""
    colour, half = _colour(index), 0.34 / count
    for row, (low, first, middle, third, high) in enumerate(boxes):
        place = _offset(row, index, count)
        axes.barh(place, third - first, left=first, height=2 * half, color=colour, alpha=0.75)
        axes.hlines([place, place], [low, third], [first, high], color=colour)
        axes.vlines([low, high], place - half / 2, place + half / 2, color=colour)
        axes.vlines(middle, place - half, place + half, color="black", linewidth=1.4)


def _quantiles(values: Sequence[float]) -> list[float]:
    import numpy as np

    return np.quantile(np.asarray(values), (0.05, 0.25, 0.5, 0.75, 0.95)).tolist()


def _legend(figure: Any, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=_colour(index), alpha=0.75) for index in range(len(names))]
    figure.legend(handles, _short(names), loc="outside lower center", ncols=4, fontsize="small")


def _heat_map(figure: Any, axes: Any, values: Sequence[Sequence[float]], label: str) -> None:
    """Draw values in [-1, 1], red above 0 and blue below, with numbers where there is room."""
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    figure.colorbar(image, ax=axes, label=label)
    if max(len(values[0]), 1) > NUMBERS:
        return
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color=colour)


def _contours(figure: Any, axes: Any, found: Result, loss: Sequence[Sequence[float]]) -> None:
    """Draw the loss as levels that darken towards less, closer together where it is low."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm

    values = np.asarray(loss)
    low, high = float(values.min()), float(values.max())
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** 2  # the floor of a basin is what is looked for
    norm = BoundaryNorm(levels, 256)
    drawn = axes.contourf(found["a"], found["b"], values, levels=levels, cmap="viridis", norm=norm)
    axes.contour(found["a"], found["b"], values, levels=levels, colors="white", linewidths=0.4, alpha=0.6)
    bar = figure.colorbar(drawn, ax=axes, label="loss")
    bar.set_ticks(levels[::2], labels=[f"{level:.4g}" for level in levels[::2]])
    bar.ax.minorticks_off()
    axes.set_aspect("equal")
    row, column = np.unravel_index(int(values.argmin()), values.shape)
    found_at = (found["a"][int(column)], found["b"][int(row)])
    axes.plot(
        *found_at,
        marker="X",
        markersize=9,
        markeredgecolor="black",
        markerfacecolor="white",
        linestyle="none",
        zorder=3,
        clip_on=False,
    )


def _mark(axes: Any, points: Sequence[Mapping[str, Any]]) -> None:
    """Mark the models, and name what the cross of the least loss is."""
    others = iter(POINT_MARKERS)
    for index, point in enumerate(points):
        name = point["name"]
        share = (
            "" if point["inside"] > 0.995 else f" (its nearest point; {point['inside']:.0%} of tau lies in the plane)"
        )
        axes.plot(
            *point["place"],
            marker=POINTS.get(name) or next(others, "D"),
            markersize=14 if name == "merged" else 9,
            markeredgecolor="black",
            markerfacecolor=("white", "#D55E00", "#56B4E9", "#E69F00")[index],
            linestyle="none",
            label=f"{_short([name])[0]}: {point['loss']:.4g}{share}",
            zorder=4,
        )
    axes.plot(
        [],
        [],
        marker="X",
        markersize=9,
        markeredgecolor="black",
        markerfacecolor="white",
        linestyle="none",
        label="least on the grid",
    )


def _plain(name: str) -> str:
    return name.replace("$", r"\$")


def _short(names: Sequence[str]) -> list[str]:
    """Return names as pictures show them: no formulas, and cut where they are long."""
    return [_plain(name if len(name) <= 40 else f"{name[:24]}…{name[-14:]}") for name in names]


PLOT_OF: dict[str, Callable[[Path, Sequence[str], Result], None]] = {
    NORMS: plot_norms,
    COSINES: plot_cosines,
    GRADIENTS: plot_gradients,
    LANDSCAPE: plot_landscape,
    ACTIVATIONS: plot_activations,
}
