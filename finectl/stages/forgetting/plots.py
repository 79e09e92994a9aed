"""The pictures of `analyse forgetting`, each of which says what it shows.

The same values make the same file; matplotlib has to be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finectl.metrics.plots import COLOURS, DPI
from finectl.stages.forgetting.config import CHAIN, EWC, LOSS
from finectl.stages.forgetting.setting import SOURCE, TARGET
from finectl.stages.forgetting.subjects import FINETUNED, PRETRAINED

Result = Mapping[str, Any]
BLUE, RED, GREEN, GREY = COLOURS[0], COLOURS[1], COLOURS[2], "#666666"
COLOUR_OF = {PRETRAINED: BLUE, FINETUNED: RED}
BAR_INCH = 0.26
LONGEST = 60


def plot_chain(folder: Path, found: Result) -> None:
    """Draw the metric of the images against the share of the steps that the pre-trained model makes."""
    if found["metric"] is None:
        return
    points, lower = found["points"], found["better"] == "lower"
    figure, axes = _figure(8.0, 5.0)
    x, values = [100 * point["x"] for point in points], [point["value"] for point in points]
    if points[0]["change"] is None:
        lows, highs = zip(*(point["interval"] for point in points), strict=True)
        band = "95 % interval of one point"
    else:
        lows, highs = zip(*([values[0] + end for end in point["change"]["interval"]] for point in points), strict=True)
        band = f"95 % interval of the difference from x = {x[0]:g} %"
    axes.fill_between(x, lows, highs, color=RED, alpha=0.18, linewidth=0, label=band)
    axes.plot(x, values, color=RED, marker="o", markersize=4.5, linewidth=1.6, label="fine-tuned, then pre-trained")
    axes.axhline(values[0], color=GREY, linestyle="--", linewidth=1.0, label=f"{values[0]:.4g}, that of x = {x[0]:g} %")
    place = (min if lower else max)(range(len(values)), key=lambda index: values[index])
    axes.plot(
        x[place], values[place], marker="*", markersize=14, color=GREEN, markeredgecolor="black", linestyle="none",
        label=f"best: {values[place]:.4g} at x = {x[place]:g} %",
    )  # fmt: skip
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("x: share of the reverse steps, the last ones (least noise), made by the pre-trained model, %")
    axes.set_ylabel(f"{found['metric']} against {found['reference'] or 'no reference'}")
    axes.set_title(
        f"chain of forgetting ({found['better']} is better), {found['samples']:,} images a point from the same noise\n"
        "better above x = 0 than at it: fine-tuning harmed what is general at little noise",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, folder / "chain.png")


def plot_ewc(folder: Path, found: Result) -> None:
    """Draw the EWC distance by block: in total, and a parameter."""
    blocks = {part["name"]: part for part in found["blocks"]}
    figure, (left, right) = _figure(12.0, 1.6 + BAR_INCH * len(blocks), columns=2, sharey=True)
    for axes, key, label in ((left, "total", "sum of F (theta - theta_0)^2"), (right, "mean", "mean a parameter")):
        values = [part[key] for part in blocks.values()]
        axes.barh(range(len(blocks)), values, color=BLUE)
        if min(values) > 0 and max(values) / min(values) > 100:
            axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3, axis="x")
    left.set_yticks(range(len(blocks)), list(blocks))
    left.invert_yaxis()
    figure.suptitle(
        f"EWC distance by block, from the network's input to its output: {found['total']:.4g} in all\n"
        "how far fine-tuning moved the weights, each by how much the loss on the source needs it (Fisher information)",
        fontsize="medium",
    )
    _save(figure, folder / "ewc-by-block.png")


def plot_losses(folder: Path, found: Result) -> None:
    """Draw the held-out loss of both models on both domains by timestep, and how much fine-tuning changed it."""
    domains = [domain for domain in (SOURCE, TARGET) if domain in found]
    width = 6.2 * len(domains) if len(domains) > 1 else 8.0
    figure, panels = _figure(width, 7.2, columns=len(domains), rows=2, sharex=True, squeeze=False, sharey="row")
    for column, domain in enumerate(domains):
        part, (upper, under) = found[domain], (panels[0][column], panels[1][column])
        for model, colour in COLOUR_OF.items():
            _steps(upper, part["models"][model]["ranges"], colour, model)
        for model, summary in part["labelled"].items():
            _steps(upper, summary["ranges"], COLOUR_OF[model], f"{model}, given the labels", dashed=True)
        base = [each["loss"] for each in part["models"][PRETRAINED]["ranges"]]
        _relative(under, part["difference"]["ranges"], base)
        given = part["compared"]
        upper.set_title(
            f"{domain}: {_short(part['data'])}\n{part['images']:,} images, both given {given}", fontsize="medium"
        )
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_minor_formatter("")
        upper.legend(fontsize="small")
        under.set_xlabel("timestep t (more noise to the right)")
        under.axhline(0.0, color="black", linewidth=0.8)
        for axes in (upper, under):
            axes.grid(alpha=0.3)
            axes.margins(x=0.01)
    panels[0][0].set_ylabel("held-out loss (lower is better)")
    panels[1][0].set_ylabel("change of the loss by fine-tuning, %")
    figure.suptitle(
        "held-out loss by timestep, the same noise for both models: above 0 % fine-tuning made it worse"
        " (on the source: forgetting)",
        fontsize="medium",
    )
    _save(figure, folder / "loss-by-timestep.png")


def _steps(axes: Any, ranges: Sequence[Result], colour: str, label: str, *, dashed: bool = False) -> None:
    """Draw one stepped line with its interval."""
    drawn = [part for part in ranges if part["terms"]]
    edges = [edge for part in drawn for edge in (part["first"], part["last"] + 1)]
    values = [part["loss"] for part in drawn for _ in range(2)]
    axes.plot(
        edges, values, color=colour, linewidth=1.2 if dashed else 1.8, linestyle="--" if dashed else "-", label=label
    )
    if not dashed:
        lows, highs = ([part["interval"][end] for part in drawn for _ in range(2)] for end in (0, 1))
        axes.fill_between(edges, lows, highs, color=colour, alpha=0.15, linewidth=0)


def _relative(axes: Any, ranges: Sequence[Result], base: Sequence[float | None]) -> None:
    """Draw the paired difference in each range, in percent of the pre-trained model's loss, with its interval."""
    for part, loss in zip(ranges, base, strict=True):
        if not part["terms"] or not loss:
            continue
        middle, value = (part["first"] + part["last"] + 1) / 2, 100 * part["loss"] / loss
        low, high = (100 * end / loss for end in part["interval"])
        axes.bar(
            middle, value, width=0.8 * (part["last"] + 1 - part["first"]), color=RED if value > 0 else GREEN, alpha=0.75
        )
        axes.plot([middle, middle], [low, high], color="black", linewidth=1.0)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _short(name: str) -> str:
    cut = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-LONGEST // 2 :]}"
    return cut.replace("$", r"\$")


PLOT_OF: dict[str, Callable[[Path, Result], None]] = {CHAIN: plot_chain, EWC: plot_ewc, LOSS: plot_losses}
