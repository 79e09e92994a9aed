"""The comparison as a table: for people, for Markdown, for spreadsheets and for programs.

Values whose protocol differs are never in one column, and a value is only called the best when its interval lies
apart from all others.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finectl.console import format_table, marked
from finectl.metrics import METRICS
from finectl.metrics.units import UNKNOWN, count_text, interval_of, measured_texts, one_line, seconds_text, si_text

Measurement = Mapping[str, Any]

SHORT_DIGEST = 8
DIGEST = re.compile(r"[0-9a-f]{16,}")
MARKUP = re.compile(r"[\\|*`]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)")
MARK_NOTE = "bold: the best of its column, with an interval apart from all others"


# Key of the row, title of the column, how its values are written.
BOOKKEEPING: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("checkpoint", "updates", count_text),
    ("method", "method", one_line),
    ("depth", "depth", one_line),
    ("parameters", "parameters", count_text),
    ("transferred", "transferred", count_text),
    ("transferred_with_embedders", "with embedders", count_text),
    ("stored_bytes", "stored", lambda value: si_text(value, "B")),
    ("steps", "steps", count_text),
    ("seconds", "seconds", seconds_text),
    ("flops", "compute", lambda value: si_text(value, "FLOP")),
)


@dataclass(frozen=True)
class Table:
    """A table that knows its raw numbers.

    Args:
        columns: Titles.
        cells: One row a model, as text.
        best: (row, column) of the cells that are the best of their column beyond doubt.
        notes: What the reader must know: why values are apart, what ± and bold mean.
        raw_columns: Titles of the raw numbers.
        raw: The same rows as raw numbers; None where there is no value.
        rows: What the table was made from.
    """

    columns: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()
    raw_columns: tuple[str, ...] = ()
    raw: tuple[tuple[Any, ...], ...] = ()
    rows: tuple[Mapping[str, Any], ...] = ()

    def to_markdown(self) -> str:
        """Return it as Markdown that reads well as plain text too, with the notes below."""
        columns = [_escaped(column) for column in self.columns]
        cells = marked([[_escaped(cell) for cell in row] for row in self.cells], self.best)
        notes = "".join(f"- {_escaped(note)}\n" for note in self.notes)
        return format_table(columns, cells) + "\n" + (f"\n{notes}" if notes else "")

    def to_csv(self) -> str:
        """Return the raw numbers as RFC 4180 has them: no units, no marks, empty where there is no value."""
        stream = io.StringIO(newline="")
        writer = csv.writer(stream)
        writer.writerow(self.raw_columns)
        writer.writerows(self.raw)
        return stream.getvalue()

    def content(self) -> dict[str, Any]:
        """Return rows and notes for JSON; what it has no number for is "Infinity", "-Infinity" or "NaN"."""
        return {"rows": _plain(self.rows), "notes": list(self.notes)}

    def to_json(self) -> str:
        """Return `content` as JSON text."""
        return json.dumps(self.content(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass
class _Column:
    """One column on its way into the table, with the raw columns behind it."""

    title: str
    texts: list[str]
    raw: dict[str, list[Any]]
    best: int | None = None
    count: Any = None  # the n that all its values have


@dataclass
class _Builder:
    columns: list[_Column] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)  # reason -> columns

    def notes(self, measured: Sequence[_Column]) -> list[str]:
        """Return one note a reason to be apart, one on ± and n, one on the mark."""
        notes = [
            f"{', '.join(titles)} {'is' if len(titles) == 1 else 'are'} apart: {reason}"
            for reason, titles in self.apart.items()
        ]
        if measured:
            notes.append("± is half of the 95 % interval" + _counts_note(measured))
        if any(column.best is not None for column in measured):
            notes.append(MARK_NOTE)
        return notes


def row_names(names: Sequence[str]) -> list[str]:
    """Name each model by its slug, or by its whole name where two slugs are the same."""
    slugs = [name.rsplit("-", 1)[0] for name in names]
    return [slug if slugs.count(slug) == 1 else name for slug, name in zip(slugs, names, strict=True)]


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of a comparison: what each model is, what it cost, what was measured.

    Columns of which nothing is known are left out. Values of a metric are in one column only when their protocols are
    the same; the others get columns of their own and a note that says what differs.

    Args:
        rows: One a model, or one a checkpoint, with the values that `evaluate` stores: `name`, the keys of
            `BOOKKEEPING`, and for each metric `{"value", "interval", "n", "protocol", ...}`.
    """
    builder = _Builder([_Column("model", [one_line(row.get("name")) for row in rows], {"name": _raw(rows, "name")})])
    for key, title, write in BOOKKEEPING:
        values = _raw(rows, key)
        if any(value is not None for value in values):
            builder.columns.append(_Column(title, [write(value) for value in values], {key: values}))
    described = len(builder.columns)
    for metric in METRICS:
        _add_metric(builder, metric, [row.get(metric) for row in rows])
    columns = builder.columns
    raw = {key: values for column in columns for key, values in column.raw.items()}
    return Table(
        columns=tuple(column.title for column in columns),
        cells=tuple(zip(*(column.texts for column in columns), strict=True)),
        best=frozenset((column.best, index) for index, column in enumerate(columns) if column.best is not None),
        notes=tuple(builder.notes(columns[described:])),
        raw_columns=tuple(raw),
        raw=tuple(zip(*raw.values(), strict=True)),
        rows=tuple(rows),
    )


def _raw(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [None if row.get(key) in UNKNOWN else row[key] for row in rows]


def _add_metric(builder: _Builder, metric: str, values: Sequence[Measurement | None]) -> None:
    """Add the columns of one metric: one a protocol."""
    groups = by_protocol(values)
    for number, group in enumerate(groups, start=1):
        title, key = (metric, metric) if number == 1 else (f"{metric} ({number})", f"{metric}_{number}")
        builder.columns.append(_metric_column(metric, title, key, group))
        if number > 1:
            reason = protocol_difference(_protocol(group), _protocol(groups[0]))
            builder.apart.setdefault(reason, []).append(title)


def _metric_column(metric: str, title: str, key: str, values: Sequence[Measurement | None]) -> _Column:
    texts = measured_texts(metric, values)
    counts = [None if value is None else count_of(value) for value in values]
    present = {count for count, value in zip(counts, values, strict=True) if value is not None}
    if len(present) > 1:
        texts = [
            text if count is None else f"{text} (n {count_text(count)})"
            for text, count in zip(texts, counts, strict=True)
        ]
    intervals = [(value or {}).get("interval") or (None, None) for value in values]
    raw = {
        key: [None if value is None else value["value"] for value in values],
        f"{key}_low": [low for low, _ in intervals],
        f"{key}_high": [high for _, high in intervals],
        f"{key}_n": counts,
    }
    return _Column(title, texts, raw, best_of(metric, values), present.pop() if len(present) == 1 else None)


def _counts_note(columns: Sequence[_Column]) -> str:
    """Return the part of the note on ± that says n, where all values of a column have the same."""
    titles: dict[Any, list[str]] = {}
    for column in columns:
        titles.setdefault(column.count, []).append(column.title)
    known = [f"{count_text(count)} ({', '.join(names)})" for count, names in titles.items() if count is not None]
    if len(titles) == 1 and known:
        return f"; n {count_text(next(iter(titles)))}"
    return f"; n {', '.join(known)}" if known else ""


def count_of(measured: Measurement) -> int | None:
    """Return over how many images a value was measured, None when that is not recorded."""
    for place in (measured, measured.get("protocol") or {}):
        for key in ("n", "images"):
            if place.get(key) is not None:
                return int(place[key])
    return None


def by_protocol(values: Sequence[Measurement | None]) -> list[list[Measurement | None]]:
    """Sort the values of a metric by how they were measured.

    Args:
        values: One a row; None where a row has none.

    Returns:
        One list a protocol, in the order of the rows, each as long as `values` with None for all that is not of it.
    """
    groups: list[list[Measurement | None]] = []
    for index, value in enumerate(values):
        if value is None:
            continue
        group = next((group for group in groups if _protocol(group) == _known(value)), None)
        if group is None:
            group = [None] * len(values)
            groups.append(group)
        group[index] = value
    return groups


def _known(measured: Measurement) -> dict[str, Any]:
    """Return a protocol without what it does not say."""
    return {key: value for key, value in (measured.get("protocol") or {}).items() if value is not None}


def _protocol(group: Sequence[Measurement | None]) -> dict[str, Any]:
    return next(_known(value) for value in group if value is not None)


def protocol_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in words what differs between two protocols, such as `n 500 instead of 1,000`."""
    keys = [*other, *(key for key in one if key not in other)]
    parts = []
    for key in keys:
        here, there = one.get(key), other.get(key)
        if here != there:
            here_text, there_text = _shortened(_protocol_text(here), _protocol_text(there))
            parts.append(f"{key.replace('_', ' ')} {here_text} instead of {there_text}")
    return ", ".join(parts)


def _protocol_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return one_line(value if isinstance(value, str) else json.dumps(value))


def _shortened(one: str, other: str) -> tuple[str, str]:
    """Cut digests to the first 8 characters, or to as many as tell them apart."""
    for length in range(SHORT_DIGEST, max(len(one), len(other)) + 1):
        short = [DIGEST.sub(lambda match, end=length: match[0][:end], text) for text in (one, other)]  # type: ignore[misc]
        if short[0] != short[1]:
            return short[0], short[1]
    return one, other


def best_of(metric: str, values: Sequence[Measurement | None]) -> int | None:
    """Return which value is the best beyond doubt: its interval lies apart from those of all others.

    Args:
        metric: Its name, which decides on which end is better.
        values: The values of one column, of one protocol; None where there is none.

    Returns:
        The index, or None when there are fewer than two values or the best one's interval meets another.
    """
    sign = 1.0 if METRICS[metric].better == "lower" else -1.0
    ends = {
        index: sorted(sign * end for end in interval_of(value))
        for index, value in enumerate(values)
        if value is not None and not math.isnan(value["value"])
    }
    if len(ends) < 2:
        return None
    first = min(ends, key=lambda index: ends[index][1])
    return first if all(ends[first][1] < low for index, (low, _) in ends.items() if index != first) else None


def _escaped(text: str) -> str:
    """Return text that Markdown shows as it is, inside a table too."""
    return MARKUP.sub(lambda match: f"\\{match[0]}", text)


def _plain(value: Any) -> Any:
    """Return a value with words in the place of the numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
