"""Convergence: a metric against optimiser updates, and how many updates a model needs to reach a score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finectl.metrics import METRICS
from finectl.metrics.report import Table, by_protocol
from finectl.metrics.units import MISSING, count_text, interval_of, one_line

Better = Literal["lower", "higher"]
# (updates, value, low, high)
Point = tuple[float, float, float, float]


@dataclass(frozen=True)
class Reach:
    """When a model reached a score.

    Args:
        name: The model's name.
        updates: Optimiser updates until the score was reached; None when it never was.
        measured: Updates at which it was measured last.
        speed_up: The baseline's updates divided by the model's; None when the model never reached the score.
        at_least: Whether the baseline never reached it, so that `speed_up` is only a lower bound.
    """

    name: str
    updates: float | None
    measured: float
    speed_up: float | None = None
    at_least: bool = False


def updates_of(row: Mapping[str, Any]) -> int | None:
    """Return the optimiser updates of a row: those of its checkpoint, else all that the model had."""
    steps = row["checkpoint"] if row.get("checkpoint") is not None else row.get("steps")
    return steps if isinstance(steps, int) else None


def curves_of(rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, list[Point]]:
    """Return the curve of a metric for every model.

    Only values of one protocol, that of the first row that has the metric, are taken: others do not compare.

    Args:
        rows: The rows of a comparison; those of one name are the checkpoints of one model.
        metric: The metric's name.

    Returns:
        Name to points (updates, value, low, high) in the order of updates; a model without points is not in it.
    """
    curves: dict[str, dict[int, Point]] = {}
    groups = by_protocol([row.get(metric) for row in rows])
    for row, value in zip(rows, groups[0] if groups else (), strict=False):
        updates = updates_of(row)
        if value is not None and updates is not None:
            curves.setdefault(row["name"], {})[updates] = (updates, value["value"], *interval_of(value))
    return {name: [points[updates] for updates in sorted(points)] for name, points in curves.items()}


def steps_to_reach(points: Sequence[tuple[float, float]], bound: float, better: Better = "lower") -> float | None:
    """Return the number of updates after which a curve first reaches a bound.

    Between two measured points the curve is taken to be straight. A curve that is there from its first point on has
    that point's updates: what lies before was not measured.

    Args:
        points: (updates, value), in any order; values that are not numbers are left out.
        bound: The score, in the metric's units.
        better: Which values are better; a value equal to the bound reaches it.

    Returns:
        The updates, or None when the curve never reaches the bound.
    """
    sign = 1.0 if better == "lower" else -1.0
    before: tuple[float, float] | None = None
    for updates, value in sorted(point for point in points if not math.isnan(point[1])):
        excess = sign * (value - bound) if value != bound else 0.0
        if excess <= 0:
            if before is None or not math.isfinite(before[1]) or not math.isfinite(excess):
                return updates
            earlier, above = before
            return earlier + (updates - earlier) * above / (above - excess)
        before = (updates, excess)
    return None


def reaches(
    curves: Mapping[str, Sequence[tuple[float, ...]]], bound: float, better: Better, baseline: str | None = None
) -> list[Reach]:
    """Return when each model reaches a score, and how much faster than the baseline.

    Args:
        curves: Name to points (updates, value, ...), at least one each.
        bound: The score.
        better: Which values are better.
        baseline: The model to compare with; by default the slowest. A name that has no curve gives no speed-ups.
    """
    found = [
        Reach(name, steps_to_reach([(p[0], p[1]) for p in points], bound, better), max(p[0] for p in points))
        for name, points in curves.items()
    ]
    base = next((reach for reach in found if reach.name == (baseline or slowest(found))), None)
    if base is None:
        return found
    reference = base.measured if base.updates is None else base.updates
    return [
        replace(reach, speed_up=reference / reach.updates, at_least=base.updates is None) if reach.updates else reach
        for reach in found
    ]


def slowest(found: Sequence[Reach]) -> str | None:
    """Return the model that needs the most updates: one that never reaches the score, where there is one."""
    if not found:
        return None
    return max(found, key=lambda reach: (reach.updates is None, reach.updates or reach.measured)).name


def reach_table(rows: Sequence[Mapping[str, Any]], metric: str, bound: float, baseline: str | None = None) -> Table:
    """Return the table of the updates at which each model reaches a score.

    Args:
        rows: The rows of a comparison, with checkpoints.
        metric: The metric's name.
        bound: The score, in the metric's own units.
        baseline: The name of the model that speed-ups are against; the slowest by default.
    """
    better = METRICS[metric].better
    curves = curves_of(rows, metric)
    found = {reach.name: reach for reach in reaches(curves, bound, better, baseline)}
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    base = baseline or slowest(list(found.values()))
    records = [
        {
            "name": name,
            "updates": reach.updates if reach else None,
            "speed_up": reach.speed_up if reach else None,
            "measured": reach.measured if reach else None,
        }
        for name in names
        for reach in [found.get(name)]
    ]
    return Table(
        columns=("model", f"updates to {metric} {'<=' if better == 'lower' else '>='} {bound:g}", "speed-up"),
        cells=tuple((one_line(name), *_reach_texts(found.get(name))) for name in names),
        notes=tuple(_reach_notes(names, found, curves, base if base in found else None)),
        raw_columns=("name", "updates", "speed_up", "measured"),
        raw=tuple(tuple(record.values()) for record in records),
        rows=tuple(records),
    )


def _reach_texts(reach: Reach | None) -> tuple[str, str]:
    if reach is None:
        return MISSING, MISSING
    factor = MISSING if reach.speed_up is None else f"{'> ' if reach.at_least else ''}{reach.speed_up:.2f}x"
    return count_text(reach.updates), factor


def _reach_notes(
    names: Sequence[str], found: Mapping[str, Reach], curves: Mapping[str, Sequence[Point]], base: str | None
) -> list[str]:
    """Return what a reader must know about the numbers: the baseline, and who is not there or was there at once."""
    notes = []
    if base is not None and any(reach.speed_up is not None for reach in found.values()):
        bounds = ", which never reaches it: the true ones are greater" if found[base].updates is None else ""
        notes.append(f"speed-ups are against {one_line(base)}{bounds}")
    for name in names:
        reach, shown = found.get(name), one_line(name)
        if reach is None:
            notes.append(f"{shown} has no value that compares with the others")
        elif reach.updates is None:
            notes.append(f"{shown} does not reach it in {count_text(reach.measured)} updates")
        elif reach.updates == curves[name][0][0]:
            notes.append(f"{shown} is there at its first measurement; it may have been earlier")
    return notes
