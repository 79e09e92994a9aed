"""What `evaluate` writes and shows: the comparison as tables, curves, and samples side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.job import Job
from finectl.console import Console
from finectl.metrics import METRICS
from finectl.metrics.convergence import curves_of, reach_table
from finectl.metrics.plots import (
    available,
    draw_samples,
    plot_by_depth,
    plot_convergence,
    plot_curves,
    plot_loss_by_timestep,
)
from finectl.metrics.report import Table, comparison_table
from finectl.metrics.units import count_text, seconds_text, si_text
from finectl.stages.evaluate.config import Condition, Config

ROWS = "metrics.json"
FORMATS = {"md": "table.md", "csv": "table.csv", "json": "table.json"}
PLOTS = "plots"
PICTURES = "samples.png"
UNDIGESTED_KEYS = ("seconds", "shared_cost")


def write_report(
    job: Job[Config],
    rows: Sequence[Mapping[str, Any]],
    logs: Mapping[str, Sequence[tuple[int, float]]],
    pictures: Mapping[str, Tensor],
) -> None:
    """Write the comparison as tables and pictures, and show it.

    Args:
        job: The run.
        rows: One a model, checkpoint or set of images.
        logs: Held-out losses of the training logs, by the models' names.
        pictures: The first images of each row, uint8 (N, C, H, W).
    """
    comparison = comparison_table(rows)
    tables = [("Comparison", replace(comparison, notes=(*comparison.notes, *shared_costs(rows))))]
    if job.config.reach is not None:
        tables += [
            (f"Updates until {name} of {bound:g}", reach_table(rows, name, bound, baseline))
            for name, bound, baseline in bounds_of(job.config.reach, rows)
        ]
    for title, table in tables:
        job.console.table(title, table.columns, table.cells, table.best, table.notes)
    first, *more = [table for _, table in tables]
    write_tables(job.directory, first, more)
    # Seconds differ from run to run, and what is hashed must not.
    plain = first.content()["rows"]
    write_json(job.directory / ROWS, [{k: v for k, v in row.items() if k not in UNDIGESTED_KEYS} for row in plain])
    plot(job.directory / PLOTS, rows, logs, job.console)
    if pictures:
        draw_samples(job.directory / PICTURES, list(pictures.values()), list(pictures))


def shared_costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note for what was spent once on the ancestor of several models, which their own rows do not count."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        cost = row.get("shared_cost") or {}
        if cost.get("steps") and row["name"] not in found.setdefault(tuple(cost.values()), []):
            found[tuple(cost.values())].append(row["name"])
    return [
        f"{', '.join(names)}: what they were made from cost {count_text(steps)} updates, {seconds_text(wall_s)} s"
        f"{'' if flops is None else ' and ' + si_text(flops, 'FLOP')}, once for all models that are made from it"
        for (steps, wall_s, _, flops), names in found.items()
    ]


def bounds_of(reach: str, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str | None]]:
    """Return what `--reach` asks for: a metric, its bound, and the model that speed-ups are against.

    A model's name stands for its score after all its updates, in every metric.
    """
    names = [name for name in METRICS if any(name in row for row in rows)]
    scores = {row["name"]: row for row in rows}
    if reach in scores:
        return [(name, float(scores[reach][name]["value"]), reach) for name in names if name in scores[reach]]
    condition = Condition.parse("--reach", reach, names)
    return [(condition.metric, condition.bound, None)]


def write_tables(directory: Path, comparison: Table, reached: Sequence[Table]) -> None:
    """Write the tables in every format that `--format` prints."""
    content = comparison.content()
    if reached:
        content["reach"] = [table.content() for table in reached]
    texts = {
        "md": "\n".join(table.to_markdown() for table in (comparison, *reached)),
        "csv": "\r\n".join(table.to_csv() for table in (comparison, *reached)),
        "json": json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for kind, text in texts.items():
        write_atomic(directory / FORMATS[kind], text.encode())


def plot(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    logs: Mapping[str, Sequence[tuple[int, float]]],
    console: Console,
) -> None:
    """Draw what there is to draw: curves over updates, metrics over depth, the loss over timesteps."""
    names = [name for name in METRICS if any(name in row for row in rows)]
    if not available():
        console.note("no plots: matplotlib is not installed (pip install 'finectl[plots]')")
        return
    plot_convergence(folder / "convergence.png", logs)
    final = list({row["name"]: row for row in rows}.values())  # each model after all its updates
    depths = {row.get("depth") for row in final if row.get("depth") is not None}
    for name in names:
        curves = {key: points for key, points in curves_of(rows, name).items() if len(points) > 1}
        if curves:
            plot_curves(folder / f"{name}-by-updates.png", name, curves)
        if len(depths) > 1:
            plot_by_depth(folder / f"{name}-by-depth.png", name, final)
    plot_loss_by_timestep(folder / "loss-by-timestep.png", final)
