"""What a model still knows of each data set after each of several that it was fine-tuned on, one after another.

The evaluations are artifacts of their own; this collects them in one table: a row after each data set, a column for
each set so far. What is forgotten is the difference down a column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import total_cost
from finectl.artifacts.store import Artifact
from finectl.console import format_table
from finectl.errors import InputError
from finectl.metrics import METRICS
from finectl.metrics.units import MISSING, interval_of, measured_texts
from finectl.stages.finetune.config import LOCATIONS, UNCHANGED
from finectl.stages.finetune.config import Config as FinetuneConfig

FILE, TABLE, PLOTS = "metrics.json", "table.md", "plots"
CHANGE = "change since it was learned"


@dataclass(frozen=True)
class Config(FinetuneConfig):
    """The options of `finectl finetune --then`."""

    then: Sequence[str] = ()
    metrics: str | None = None
    samples: int = 0
    allow_few: bool = False


@dataclass(frozen=True)
class Cell:
    """One evaluation of the table.

    Args:
        after: After which data set, counted from 0.
        on: The data set that it measures.
        path: The evaluation.
    """

    after: int
    on: str
    path: Path


Measured = Mapping[str, Mapping[str, Any]]
"""Metric -> `{"value", "interval", "n", "protocol"}`."""


def collecting(models: Sequence[Path], sets: Sequence[str], cells: Sequence[Cell]) -> Stage[Config]:
    """Return the stage that puts the evaluations together.

    Args:
        models: The model after each data set.
        sets: Those data sets.
        cells: The evaluations there are.
    """
    read = [Reads("finetuned", ("model",), named=(str(path),)) for path in models]
    read += [Reads("evaluation", ("evaluation",), named=(str(cell.path),)) for cell in cells]
    return Stage(
        name="finetune",
        version=1,
        makes="evaluation",
        config=Config,
        reads=lambda config: Reads("model", ("model",), also=tuple(read)),
        plan=_planning(len(models), cells),
        run=_running(sets, cells),
        locations=LOCATIONS,
        unchanged_at=UNCHANGED,
    )


def _planning(count: int, cells: Sequence[Cell]) -> Callable[[Config, Sequence[Artifact]], Plan[Config]]:
    def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
        """Check that each evaluation is of the model and the data set of its place in the table.

        Raises:
            InputError: one is not.
        """
        models, evaluations = parents[1 : 1 + count], parents[1 + count :]
        for cell, evaluation in zip(cells, evaluations, strict=True):
            model = models[cell.after]
            found = ([parent.digest for parent in evaluation.manifest.parents], evaluation.manifest.data.get("name"))
            if found != ([model.manifest.digest], cell.on):
                raise InputError(
                    f"{evaluation.path} is of {found[1]} and of another model than {model.path}",
                    expected=f"an evaluation of that model on {cell.on}",
                )
        return Plan(
            config,
            slug=f"{parents[0].name.rsplit('-', 1)[0]}-then-{count}",
            data=InheritedData.of(models[-1]),
            summary={"models": count, "evaluations": len(cells)},
        )

    return plan


def _running(sets: Sequence[str], cells: Sequence[Cell]) -> Callable[[Job[Config]], Outcome]:
    def run(job: Job[Config]) -> Outcome:
        """Write the table as numbers, as text and as pictures, and show it."""
        models, evaluations = job.parents[1 : 1 + len(sets)], job.parents[1 + len(sets) :]
        table: list[dict[str, Measured]] = [{} for _ in sets]
        for cell, evaluation in zip(cells, evaluations, strict=True):
            table[cell.after][cell.on] = _measured(evaluation)
        rows = [
            {"after": name, "model": model.manifest.digest, "on": dict(found)}
            for name, model, found in zip(sets, models, table, strict=True)
        ]
        write_json(job.directory / FILE, rows)
        names = [name for name in METRICS if any(name in one for found in table for one in found.values())]
        texts = []
        for name in names:
            columns, lines = table_of(name, sets, table)
            job.console.table(f"{name}: a row after each data set, a column for what is measured", columns, lines)
            texts.append(f"{name}\n\n{format_table(columns, lines)}\n")
            _plot(job.directory / PLOTS / f"{name}.png", name, sets, table)
        write_atomic(job.directory / TABLE, "\n".join(texts).encode())
        return Outcome(metrics={"continual": json.loads(json.dumps(rows))}, cost=total_cost(models))

    return run


def _measured(evaluation: Artifact) -> Measured:
    """Return the metrics of the one model that an evaluation measured."""
    (row,) = evaluation.manifest.metrics["models"]
    return {name: row[name] for name in METRICS if name in row}


def table_of(
    metric: str, sets: Sequence[str], table: Sequence[Mapping[str, Measured]]
) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of one metric, and below it what changed since each set was learned.

    Args:
        metric: A key of `METRICS`.
        sets: The data sets in the order of training.
        table: After each of them, what was measured on each set.
    """
    columns = list(dict.fromkeys(sets))
    texts = {on: measured_texts(metric, [found.get(on, {}).get(metric) for found in table]) for on in columns}
    lines = [
        [f"{place}. {name}", *(texts[on][place - 1] for on in columns)] for place, name in enumerate(sets, start=1)
    ]
    return ["after", *columns], [*lines, [CHANGE, *(_change(metric, on, table) for on in columns)]]


def _change(metric: str, on: str, table: Sequence[Mapping[str, Measured]]) -> str:
    """Return the last value on a set minus the first, in the units of the table."""
    there = [found[on][metric] for found in table if metric in found.get(on, {})]
    if len(there) < 2 or metric not in table[-1].get(on, {}):
        return MISSING
    moved = there[-1]["value"] - there[0]["value"]
    (text,) = measured_texts(metric, [{**there[-1], "value": moved, "interval": [moved, moved]}])
    text = text.partition(" ±")[0]
    return text if moved < 0 else f"+{text}"


def _plot(path: Path, metric: str, sets: Sequence[str], table: Sequence[Mapping[str, Measured]]) -> None:
    """Draw a metric after each data set, one line a set that is measured."""
    from finectl.metrics.plots import plot_bands

    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for place, found in enumerate(table, start=1):
        for on, measured in found.items():
            if metric in measured:
                low, high = interval_of(measured[metric])
                curves.setdefault(on, []).append((place, measured[metric]["value"], low, high))
    plot_bands(
        path,
        curves,
        x_label="data sets so far: " + ", ".join(f"{place} {name}" for place, name in enumerate(sets, start=1)),
        y_label=metric,
        better=METRICS[metric].better,
    )


def settled(config: Config, sets: Sequence[str]) -> Config:
    """Return the options with the data sets under the names by which they are found from anywhere."""
    return replace(config, data=sets[0], then=tuple(sets[1:]))
