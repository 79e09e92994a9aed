"""How a comparison is shown: the table that people read, the convergence plot and the samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.data.images import make_grid
from finectl.metrics import METRICS


def row_names(names: Sequence[str]) -> list[str]:
    """Name each model by its slug, or by its whole name where two slugs are the same."""
    slugs = [name.rsplit("-", 1)[0] for name in names]
    return [slug if slugs.count(slug) == 1 else name for slug, name in zip(slugs, names, strict=True)]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the cells of the table: what each model is, what it cost, what was measured.

    Args:
        rows: One a model, with the values that `evaluate` stores.
    """
    measured = [name for name in METRICS if name in rows[0]]
    columns = ["model", "method", "depth", "parameters", "transferred", "with embedders", "steps", "seconds", *measured]
    cells = [
        [
            row["name"],
            row["method"],
            str(row["depth"]),
            *(_count(row[key]) for key in ("parameters", "transferred", "transferred_with_embedders", "steps")),
            f"{row['seconds']:.0f}",
            *(_metric(name, row[name]) for name in measured),
        ]
        for row in rows
    ]
    return columns, cells


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _metric(name: str, measured: Mapping[str, Any]) -> str:
    """Return a value with half the width of its interval."""
    value, (low, high) = measured["value"], measured["interval"]
    half = (high - low) / 2
    if name == "accuracy":
        return f"{100 * value:.1f} % ±{100 * half:.1f}"
    return f"{value:.4f} ±{half:.4f}" if name == "loss" else f"{value:.3f} ±{half:.3f}"


def draw_samples(path: Path, pictures: Sequence[Tensor]) -> None:
    """Draw the first images of every model from the same noise, one row a model.

    Args:
        path: The PNG file.
        pictures: For each model, the same number of images (N, C, H, W) as uint8 levels.
    """
    make_grid(torch.cat(list(pictures)), columns=len(pictures[0])).save(path)


def plot_convergence(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Draw held-out loss against optimiser updates, one line a model.

    Args:
        path: The PNG file.
        curves: Model's name to (updates so far, held-out loss), tuning counted.

    Returns:
        Whether it was drawn: matplotlib may not be installed, and there may be nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    drawn = {name: points for name, points in curves.items() if points}
    if not drawn:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in drawn.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, marker="o", markersize=3, linewidth=1.5, label=name)
    values = sorted(loss for points in drawn.values() for _, loss in points)
    lowest, typical = values[0], values[len(values) // 2]
    axes.set_ylim(0.95 * lowest, min(values[-1], 2.5 * typical) * 1.05)
    axes.set_xlabel("optimiser updates, tuning counted")
    axes.set_ylabel("held-out denoising loss (EMA weights)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return True
