"""The tables of a report: values by updates, the prediction against every other start, and seconds. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from finectl.metrics.pairs.names import BETTER, DECIMALS
from finectl.metrics.report import Table
from finectl.metrics.starts import Starts
from finectl.metrics.units import MISSING, seconds_text
from finectl.stages.gen_weights.report.config import BASELINE, PIX2PIX, PREDICTION

ROLES = {
    "test": "held-out concept with words that training saw elsewhere",
    "val": "validation concept, of those that chose checkpoint and t*",
    "unseen": "concept with a word that training never saw (no win is expected)",
}
NOUN = re.compile("concept|seed")
UNTIMED = ("noised", "shuffled", "oracle")
"""Starts that nobody would take, or that cost what they are to save."""


def plural(count: int, what: str) -> str:
    """Return a count and what is counted, whose first noun is made plural where there are several."""
    if count == 1:
        return f"1 {what}"
    return f"{count} {NOUN.sub(lambda found: found[0] + 's', what, count=1)}"


def said_in_words(starts: Starts, metric: str) -> str:
    """Return what the prediction saves, in one line."""
    last, better = starts.steps(metric)[-1], BETTER[metric]
    reached = starts.reached(metric, PREDICTION, BASELINE, better)
    wins = [starts.against(metric, PREDICTION, BASELINE, step, better).wins for step in starts.steps(metric)]
    won = ", ".join(map(str, wins))
    at = ", ".join(map(str, starts.steps(metric)))
    better_on = f"it is better on {won} of {len(starts.concepts)} after {at}"
    if reached.updates is None:
        return f"the prediction does not reach LoRA start's {metric} after {last} updates; {better_on}"
    return (
        f"the prediction reaches LoRA start's {metric} after {last} updates with {number(reached.updates, 1)}: "
        f"{times(reached.speed_up)} fewer, {times(reached.speed_up_total)} in seconds with its own; {better_on}"
    )


def values_table(starts: Starts, metric: str) -> Table:
    """Return the means after each number of updates, and when LoRA start's last value is reached."""
    steps, better, last = starts.steps(metric), BETTER[metric], starts.steps(metric)[-1]
    columns = ["start", *(f"{step} updates" for step in steps)]
    columns += [f"updates to {BASELINE}'s {last}", "speed-up", "concepts there"]
    cells, raw = [], []
    raw_columns = ["start", *(f"{metric}_{step}{end}" for step in steps for end in ("", "_low", "_high"))]
    raw_columns += ["updates_to_threshold", "speed_up", "concepts_there"]
    for start in starts.starts:
        curve = starts.curve(metric, start)
        reached = starts.reached(metric, start, BASELINE, better)
        texts = [value_text(metric, *point[1:]) for point in curve]
        cells.append(
            (
                start,
                *texts,
                number(reached.updates, 1),
                times(reached.speed_up),
                f"{reached.concepts} of {_count(starts)}",
            )
        )
        numbers = [end for point in curve for end in point[1:]]
        raw.append((start, *numbers, reached.updates, reached.speed_up, reached.concepts))
    return Table(
        tuple(columns),
        tuple(cells),
        best_cells(starts, metric),
        (),
        tuple(raw_columns),
        tuple(raw),
        _rows(raw_columns, raw),
    )


def best_cells(starts: Starts, metric: str) -> frozenset[tuple[int, int]]:
    """Return the best start of each column; the concepts' own weights, which nobody has, are out of competition."""
    competing = [index for index, start in enumerate(starts.starts) if start != "oracle"]
    sign = 1 if BETTER[metric] == "lower" else -1
    return frozenset(
        (min(competing, key=lambda index: sign * starts.mean(metric, starts.starts[index], step)), column)
        for column, step in enumerate(starts.steps(metric), start=1)
    )


def against_table(starts: Starts, metric: str, one: str = PREDICTION) -> Table:
    """Return what the prediction has more or less than every other start, paired, and on how many concepts it wins."""
    steps, cells, raw = starts.steps(metric), [], []
    raw_columns = ["against"]
    for step in steps:
        raw_columns += [f"{name}_{step}" for name in ("difference", "low", "high", "wins")]
    for other in starts.starts:
        if other == one:
            continue
        found = [starts.against(metric, one, other, step, BETTER[metric]) for step in steps]
        texts = [
            f"{value_text(metric, a.difference, a.low, a.high, sign=True)}, {a.wins} of {a.concepts}" for a in found
        ]
        cells.append((other, *texts))
        raw.append((other, *(value for a in found for value in (a.difference, a.low, a.high, a.wins))))
    columns = (f"{one} against", *(f"{step} updates" for step in steps))
    return Table(columns, tuple(cells), frozenset(), (), tuple(raw_columns), tuple(raw), _rows(raw_columns, raw))


def seconds_table(starts: Starts, scratch: Starts | None, metric: str) -> Table:
    """Return seconds, with the making of the start: of all updates, and until LoRA start's last value is reached."""
    columns = ("method", "updates", "start, s", "tuning, s", "total, s", metric, "speed-up, total")
    last = starts.steps(metric)[-1]
    one = starts.seconds_of_update()
    base = starts.start_seconds(BASELINE) + last * one
    rows: list[tuple[Any, ...]] = []
    if scratch is not None and scratch.runs:
        updates = scratch.steps(metric)[-1]
        tuning = updates * scratch.seconds_of_update()
        rows.append((f"{PIX2PIX} from scratch", updates, 0.0, tuning, tuning, scratch.mean(metric, PIX2PIX, updates)))
    for start in (name for name in starts.starts if name not in UNTIMED):
        made = starts.start_seconds(start)
        rows.append((start, last, made, last * one, made + last * one, starts.mean(metric, start, last)))
        reached = starts.reached(metric, start, BASELINE, BETTER[metric])
        if start != BASELINE and reached.updates is not None and reached.updates < last:
            bound, total = starts.mean(metric, BASELINE, last), made + reached.updates * one
            rows.append(
                (f"{start}, until {BASELINE}'s last", reached.updates, made, reached.updates * one, total, bound)
            )
    raw = [(*row, base / row[4] if row[4] else math.inf) for row in rows]
    cells = tuple(
        (
            name,
            number(updates, 1),
            small(made),
            seconds_text(tuning),
            seconds_text(total),
            value_text(metric, v),
            times(up),
        )
        for name, updates, made, tuning, total, v, up in raw
    )
    names = ("method", "updates", "start_s", "tuning_s", "total_s", metric, "speed_up_total")
    return Table(columns, cells, frozenset(), (), names, tuple(raw), _rows(names, raw))


def headline(starts: Starts, metric: str) -> dict[str, Any]:
    """Return what the report says in one line, as numbers without seconds."""
    steps, found = starts.steps(metric), starts.starts
    said: dict[str, Any] = {"metric": metric, "concepts": _count(starts), "seeds": len(starts.seeds)}
    if PREDICTION not in found:
        return said
    reached = starts.reached(metric, PREDICTION, BASELINE, BETTER[metric])
    said |= {"updates_to_threshold": reached.updates, "speed_up": known(reached.speed_up), "threshold_at": steps[-1]}
    for other in (name for name in found if name != PREDICTION):
        at = {step: starts.against(metric, PREDICTION, other, step, BETTER[metric]) for step in steps}
        said[f"against_{other}"] = {
            str(step): {"difference": a.difference, "interval": [a.low, a.high], "wins": a.wins}
            for step, a in at.items()
        }
    return said


def _count(starts: Starts) -> int:
    return len(starts.concepts)


def _rows(columns: Sequence[str], raw: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(columns, row, strict=True)) for row in raw)


def value_text(metric: str, value: float, low: float = math.nan, high: float = math.nan, *, sign: bool = False) -> str:
    """Return a value with half of its interval, if that is known, in the metric's digits."""
    decimals = DECIMALS[metric]
    text = f"{value:+.{decimals}f}" if sign else f"{value:.{decimals}f}"
    half = (high - low) / 2
    return f"{text} ±{half:.{decimals}f}" if math.isfinite(half) else text


def known(value: float | None) -> float | None:
    """Return a number for JSON, which has no infinite ones: None for these."""
    return value if value is not None and math.isfinite(value) else None


def number(value: float | None, decimals: int) -> str:
    """Return a number, whole ones without digits behind the point."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.{decimals}f}"


def times(value: float | None) -> str:
    """Return a ratio."""
    if value is None:
        return MISSING
    return f"{value:.1f}x" if math.isfinite(value) else "at once"


def small(seconds: float) -> str:
    """Return a time that may be thousandths of a second."""
    return f"{seconds:.3f}" if 0 < seconds < 1 else seconds_text(seconds)
