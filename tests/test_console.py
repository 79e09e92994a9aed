"""What people read: notes, tables, errors and progress."""

from __future__ import annotations

import io

import pytest

from finectl import console as module
from finectl.console import Console, format_table
from finectl.errors import InputError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_quiet_leaves_out_everything_but_errors() -> None:
    stream = io.StringIO()
    console = Console(quiet=True, stream=stream)
    console.note("a")
    console.line("b")
    console.fields("c", d=1)
    console.table("e", ["f"], [["g"]])
    with console.progress("h", 2) as progress:
        progress.advance(2, loss=1.0)
    assert stream.getvalue() == ""
    console.error(InputError("what"))
    assert stream.getvalue() == "error: what\n"


def test_an_error_is_one_block_and_leaves_out_what_is_empty() -> None:
    stream = io.StringIO()
    Console(stream=stream).error(InputError("what", expected="this", fix="do that"))
    assert stream.getvalue() == "error: what\n  expected: this\n  try:      do that\n"


def test_fields_are_key_value_pairs_that_split_at_spaces() -> None:
    stream = io.StringIO()
    Console(stream=stream).fields("start", step=3, loss=0.123456789, name="two words")
    assert stream.getvalue() == 'finectl event=start step=3 loss=0.1235 name="two words"\n'


def test_plain_progress_writes_at_the_start_every_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Console(stream=stream).progress("training", 100, done=40) as progress:
        for _ in range(60):
            now[0] += 1.5
            progress.advance(samples=8, loss=0.5)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "finectl event=start stage=training step=40 steps=100"
    assert lines[1] == ("finectl event=progress stage=training step=60 steps=100 loss=0.5 samples_per_s=5.3 eta_s=60")
    assert len([line for line in lines if "event=progress" in line]) == 3
    assert lines[-1] == "finectl event=end stage=training step=100 steps=100 loss=0.5 samples_per_s=5.3 seconds=90"


def test_progress_that_fails_says_stopped() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with Console(stream=stream).progress("training", 3) as progress:
            progress.advance()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert "event=stopped stage=training step=1 steps=3" in stream.getvalue()
    assert "event=end" not in stream.getvalue()


def test_a_terminal_is_one_unless_it_is_dumb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert Console(stream=Terminal()).is_terminal
    assert not Console(stream=io.StringIO()).is_terminal
    monkeypatch.setenv("TERM", "dumb")
    assert not Console(stream=Terminal()).is_terminal


def test_tables_are_aligned_markdown_where_no_terminal_is() -> None:
    text = format_table(["model", "loss"], [["a", "1.5"], ["long name", "10"]])
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert (
        lines[0] == "| model     | loss |" and lines[1] == "|-----------|-----:|" and lines[3] == "| long name |   10 |"
    )
    stream = io.StringIO()
    Console(stream=stream).table("Title", ["model", "loss"], [["a", "1.5"]])
    assert stream.getvalue().startswith("Title\n| model |")


def test_tables_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    Console(stream=stream).table("Title", ["model", "loss"], [["a", "1.5"]])
    assert "Title" in stream.getvalue() and "| model |" not in stream.getvalue()
