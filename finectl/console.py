"""Everything that people read: notes, tables, errors and progress, all of it on stderr.

stdout belongs to the artifact's path. Rich is imported when a terminal is there to use it, never before.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any, TextIO

from finectl.errors import FinectlError

PLAIN_INTERVAL_S = 30.0
TABLE_EDGES = 4  # what rich draws around the first column: two borders, two spaces
COLUMN_EDGES = 3


class Console:
    """Writes for people.

    Args:
        quiet: Leave out notes, tables and progress; errors are still printed.
        stream: Where to write; stderr by default.
    """

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self.stream = stream or sys.stderr
        self.bar: Any = None  # the rich progress that owns the terminal's last lines, while there is one

    @property
    def is_terminal(self) -> bool:
        """Whether a capable terminal reads what is written (`TERM=dumb` is not one)."""
        return self.stream.isatty() and os.environ.get("TERM") != "dumb"

    def line(self, text: str) -> None:
        """Write one line unless quiet."""
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)  # above the bar, not into it
            return
        self.stream.write(f"{text}\n")
        self.stream.flush()

    def note(self, text: str) -> None:
        """Write one line that says what finectl decided by itself."""
        self.line(f"finectl: {text}")

    def fields(self, event: str, **values: Any) -> None:
        """Write one `key=value` line, the form that logs of clusters are searched by."""
        self.line(" ".join(["finectl", f"event={event}", *(f"{key}={_plain(value)}" for key, value in values.items())]))

    def error(self, error: FinectlError) -> None:
        """Write the one block that every error is printed as."""
        lines = [f"error: {error.what}"]
        if error.expected:
            lines.append(f"  expected: {error.expected}")
        if error.fix:
            lines.append(f"  try:      {error.fix}")
        self.stream.write("\n".join(lines) + "\n")
        self.stream.flush()

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        best: Collection[tuple[int, int]] = (),
        notes: Sequence[str] = (),
    ) -> None:
        """Write a table: drawn by rich on a terminal, aligned plain text elsewhere. The first column is text.

        Args:
            title: The line above it.
            columns: Titles of the columns.
            rows: Cells; nothing in them is markup.
            best: (row, column) of the cells in bold.
            notes: Lines below it.
        """
        if self.quiet:
            return
        if self.is_terminal:
            self._draw_table(title, columns, rows, best)
        else:
            self.line(f"{title}\n{format_table(columns, marked(rows, best))}")
        for note in notes:
            self.line(f"  {note}")

    def _draw_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], best: Collection[tuple[int, int]]
    ) -> None:
        """Draw a table; where the terminal is too narrow, as several below one another, each with the first column."""
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        terminal = RichConsole(file=self.stream)
        first, *widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        first = min(first, terminal.width // 2)
        for number, part in enumerate(_fitting(widths, terminal.width - first - TABLE_EDGES)):
            drawn = Table(title=Text(title) if number == 0 else None, title_justify="left")
            drawn.add_column(Text(columns[0]), justify="left", overflow="fold")
            for index in part:
                drawn.add_column(
                    Text(columns[index]), justify="right", min_width=min(widths[index - 1], terminal.width)
                )
            for place, row in enumerate(rows):
                shown = [0, *part]
                drawn.add_row(*(Text(row[index], style="bold" if (place, index) in best else "") for index in shown))
            terminal.print(drawn)

    def progress(self, stage: str, total: int, unit: str = "step", done: int = 0) -> Progress:
        """Return the progress of `total` units of work, `done` of which an earlier run did already."""
        return Progress(self, stage, total, unit, done)


class Progress:
    """A bar with ETA, loss and samples/s on a terminal; elsewhere a line at the start, every 30 s and at the end."""

    def __init__(self, console: Console, stage: str, total: int, unit: str, done: int) -> None:
        self.console = console
        self.stage = stage
        self.total = total
        self.unit = unit
        self.done = self.started_at = done
        self._start_s = self._last_line_s = time.monotonic()
        self._values: dict[str, Any] = {}
        self._samples = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.console.quiet:
            return self
        if self.console.is_terminal:
            self._open_bar()
        else:
            self.console.fields("start", stage=self.stage, **{self.unit: self.done, f"{self.unit}s": self.total})
        return self

    def _open_bar(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=RichConsole(file=self.console.stream),
            refresh_per_second=4,
        )
        self._bar.start()
        self.console.bar = self._bar
        self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done, shown="")

    def advance(self, units: int = 1, samples: int = 0, **values: Any) -> None:
        """Count work done; `values` (a loss, say) are shown beside it."""
        self.done += units
        self._samples += samples
        self._values.update(values)
        if self.console.quiet:
            return
        if self._bar is not None:
            parts = [f"{key} {_plain(value)}" for key, value in self._values.items()]
            parts += [f"{self._rate():.0f} samples/s"] if self._samples else []
            self._bar.update(self._task, completed=self.done, shown=", ".join(parts))
        elif time.monotonic() - self._last_line_s >= PLAIN_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._write("progress", eta_s=self._eta_s())

    def _rate(self) -> float:
        return self._samples / max(time.monotonic() - self._start_s, 1e-9)

    def _measured(self) -> dict[str, Any]:
        return {**self._values, **({"samples_per_s": round(self._rate(), 1)} if self._samples else {})}

    def _eta_s(self) -> int:
        elapsed_s = time.monotonic() - self._start_s
        return round(elapsed_s / max(self.done - self.started_at, 1) * (self.total - self.done))

    def _write(self, event: str, **more: Any) -> None:
        counts = {self.unit: self.done, f"{self.unit}s": self.total}
        self.console.fields(event, stage=self.stage, **counts, **self._measured(), **more)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self.console.bar = None
        elif not self.console.quiet:
            event = "end" if kind is None else "stopped"
            self._write(event, seconds=round(time.monotonic() - self._start_s, 1))


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as a Markdown table whose columns are aligned, readable as plain text too."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(columns), rule, *(line(row) for row in rows)])


def marked(rows: Sequence[Sequence[str]], best: Collection[tuple[int, int]]) -> list[list[str]]:
    """Return the cells of a table with those of `best`, (row, column), in Markdown's bold."""
    return [
        [f"**{cell}**" if (place, index) in best else cell for index, cell in enumerate(row)]
        for place, row in enumerate(rows)
    ]


def _fitting(widths: Sequence[int], room: int) -> list[list[int]]:
    """Divide columns 1, 2, ... into runs that fit into `room` characters; a column too wide for it stands alone."""
    parts: list[list[int]] = [[]]
    left = room
    for index, width in enumerate(widths, start=1):
        left -= width + COLUMN_EDGES
        if left < 0 and parts[-1]:
            parts.append([])
            left = room - width - COLUMN_EDGES
        parts[-1].append(index)
    return parts


def _plain(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f'"{text}"' if " " in text else text
