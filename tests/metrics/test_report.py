"""The comparison as a table: which values share a column, which one is the best, and what every format says."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from finectl.console import Console
from finectl.metrics.report import Table, best_of, comparison_table, protocol_difference, row_names
from finectl.metrics.units import measured_texts, si_text

DIGEST = "0123456789abcdef" * 4
PROTOCOL = {"n": 1000, "resize": "clean", "extractor_digest": DIGEST}


def measured(value: float, half: float = 0.1, n: int | None = 1000, **protocol: Any) -> dict[str, Any]:
    known = {**PROTOCOL, "n": n, **protocol}
    return {"value": value, "interval": [value - half, value + half], "n": n, "protocol": known}


def row(name: str, **values: Any) -> dict[str, Any]:
    return {
        "name": name,
        "method": "fine",
        "depth": 2,
        "parameters": 179_588,
        "transferred": 101_888,
        "transferred_with_embedders": None,
        "stored_bytes": 1_440_000,
        "steps": 600,
        "seconds": 12.4,
        "flops": 3.12e14,
        "checkpoint": None,
        **values,
    }


def shown(table: Table, index: int = 0) -> dict[str, str]:
    return dict(zip(table.columns, table.cells[index], strict=True))


def test_names_are_slugs_unless_two_are_the_same() -> None:
    assert row_names(["dit-fine-l2-00000001", "dit-he-l2-00000002"]) == ["dit-fine-l2", "dit-he-l2"]
    assert row_names(["a-1", "a-2", "b-3"]) == ["a-1", "a-2", "b"]


def test_the_table_shows_costs_and_values_in_units_that_people_read() -> None:
    accuracy, loss = measured(0.875, 0.025), measured(0.09123, 0.0012, n=360)
    table = comparison_table([row("a", accuracy=accuracy, loss=loss, psnr=measured(23.456, 0.12), fid=None)])
    assert shown(table) == {
        "model": "a",
        "method": "fine",
        "depth": "2",
        "parameters": "179,588",
        "transferred": "101,888",
        "stored": "1.44 MB",
        "steps": "600",
        "seconds": "12",
        "compute": "312 TFLOP",
        "loss": "0.0912 ±0.0012",
        "accuracy": "87.5 % ±2.5",
        "psnr": "23.46 dB ±0.12",
    }
    assert table.notes == ("± is half of the 95 % interval; n 360 (loss), 1,000 (accuracy, psnr)",)


def test_a_cost_column_is_left_out_when_nothing_is_known_and_has_a_dash_when_something_is() -> None:
    unknown = {"transferred_with_embedders": "?", "flops": None}
    columns = comparison_table([row("a", **unknown), row("b", **unknown)]).columns
    assert not {"with embedders", "compute", "updates"} & set(columns)
    table = comparison_table([row("a"), row("b", transferred_with_embedders=0)])
    assert [shown(table, index)["with embedders"] for index in (0, 1)] == ["-", "0"]


def test_checkpoints_of_a_run_have_their_updates() -> None:
    table = comparison_table([row("a", checkpoint=1000, fid=measured(9)), row("a", checkpoint=2000)])
    assert table.columns[:2] == ("model", "updates")
    assert [cells[:2] for cells in table.cells] == [("a", "1,000"), ("a", "2,000")]
    assert shown(table, 1)["fid"] == "-"


@pytest.mark.parametrize(
    ("value", "prefix"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (999_499, "999 kB"), (999_600, "1.00 MB"), (2.5e21, "2500 EB")],
)
def test_prefixes_are_si(value: float | None, prefix: str) -> None:
    assert si_text(value, "B") == prefix


def test_digits_are_the_same_in_a_column_and_enough_for_its_narrowest_interval() -> None:
    assert measured_texts("fid", [measured(23.4, 0.351), measured(5.0, 0.004), None]) == [
        "23.400 ±0.351",
        "5.000 ±0.004",
        "-",
    ]
    assert measured_texts("fid", [measured(5.0, 1e-9)]) == ["5.0000 ±0.0000"], "but not without end"


def test_numbers_without_end_and_values_without_interval_are_said_so() -> None:
    values = [
        {"value": math.inf, "interval": [math.inf, math.inf]},
        {"value": math.nan, "interval": [math.nan, math.nan]},
        {"value": 1.5, "interval": [-math.inf, math.inf]},
        {"value": 1.5},
        {"value": -3e9, "interval": [-4e9, -2e9]},
    ]
    assert measured_texts("kid", values) == ["inf", "nan", "1.50000 ±inf", "1.50000", "-3.000e+09 ±1.000e+09"]


def test_the_best_value_is_marked_when_its_interval_is_apart_from_all_others() -> None:
    rows = [row("a", fid=measured(3.0, 0.5)), row("b", fid=measured(4.1, 0.5)), row("c", fid=measured(9.0, 3))]
    table = comparison_table(rows)
    assert table.best == {(0, table.columns.index("fid"))}
    assert table.notes[-1].startswith("bold: ")
    assert "**3.00 ±0.50**" in table.to_markdown() and table.to_markdown().count("**") == 2


def test_the_best_value_is_not_marked_when_its_interval_meets_another_or_there_is_no_other() -> None:
    meeting = comparison_table([row("a", fid=measured(3.0, 0.5)), row("b", fid=measured(4.0, 0.5))])
    for table in (meeting, comparison_table([row("a", fid=measured(3.0, 0.5))])):
        assert not table.best and "**" not in table.to_markdown()
        assert not any(note.startswith("bold") for note in table.notes)


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("accuracy", [measured(0.2), measured(0.9), measured(0.5)], 1),
        ("loss", [measured(0.2), measured(0.9), measured(0.5)], 0),
        ("loss", [measured(1.0, 0.9), None, measured(3.0, 0.1), measured(1.95, 0.1)], None),
        ("loss", [measured(1.0), measured(math.nan)], None),
        ("loss", [measured(math.nan), measured(1.0), measured(2.0)], 1),
        ("loss", [measured(1.0), {"value": 2.0}], None),
        ("loss", [measured(1.0), {"value": 2.0, "interval": [math.nan, math.nan]}], None),
        ("psnr", [measured(30.0), measured(math.inf, math.inf)], 1),
        ("loss", [measured(1.0), measured(math.inf, math.nan)], 0),
        ("psnr", [measured(math.inf, math.inf), measured(math.inf, math.inf)], None),
    ],
)
def test_which_value_is_the_best(metric: str, values: Sequence[dict[str, Any] | None], best: int | None) -> None:
    assert best_of(metric, values) == best


def test_values_of_another_protocol_stand_in_a_column_of_their_own_and_a_note_says_why() -> None:
    rows = [
        row("a", fid=measured(3.0)),
        row("b", fid=measured(1.0, n=500)),
        row("c", fid=measured(4.0)),
        row("d", fid=measured(0.5, extractor_digest="f" * 64)),
    ]
    table = comparison_table(rows)
    assert [cells[-3:] for cells in table.cells] == [
        ("3.00 ±0.10", "-", "-"),
        ("-", "1.00 ±0.10", "-"),
        ("4.00 ±0.10", "-", "-"),
        ("-", "-", "0.50 ±0.10"),
    ]
    assert table.columns[-3:] == ("fid", "fid (2)", "fid (3)")
    assert table.best == {(0, len(table.columns) - 3)}, "a value that stands alone is the best of nothing"
    assert table.notes[:3] == (
        "fid (2) is apart: n 500 instead of 1,000",
        "fid (3) is apart: extractor digest ffffffff instead of 01234567",
        "± is half of the 95 % interval; n 1,000 (fid, fid (3)), 500 (fid (2))",
    )


def test_metrics_that_are_apart_for_one_reason_share_its_note() -> None:
    other = {"fid": measured(1.0, resize="legacy_tensorflow"), "kid": measured(1.0, resize="legacy_tensorflow")}
    notes = comparison_table([row("a", fid=measured(1.0), kid=measured(1.0)), row("b", **other)]).notes
    assert notes[0] == "fid (2), kid (2) are apart: resize legacy_tensorflow instead of clean"


def test_differences_name_what_only_one_side_has_and_enough_of_digests_to_tell_them_apart() -> None:
    here, there = {"digest": f"{'a' * 12}{'0' * 52}", "flip": True}, {"digest": f"{'a' * 12}{'1' * 52}", "prompts": "x"}
    difference = protocol_difference(here, there)
    assert (
        difference == f"digest {'a' * 12}0 instead of {'a' * 12}1, prompts none instead of x, flip yes instead of none"
    )
    table = comparison_table([row("a", fid=measured(1, crop=None)), row("b", fid=measured(1))])
    assert "fid (2)" not in table.columns, "what is not said does not differ"


def test_counts_that_differ_in_a_column_stand_in_its_cells() -> None:
    rows = [
        row("a", loss={"value": 0.5, "interval": [0.4, 0.6], "n": 1360}),
        row("b", loss={"value": 0.5, "interval": [0.4, 0.6], "n": 20}),
    ]
    table = comparison_table(rows)
    assert [cells[-1] for cells in table.cells] == ["0.5000 ±0.1000 (n 1,360)", "0.5000 ±0.1000 (n 20)"]
    assert table.notes == ("± is half of the 95 % interval",)


def test_csv_has_the_raw_numbers_and_reads_back() -> None:
    name = 'a, "quoted"\nname'
    rows = [row(name, fid=measured(1 / 3), psnr=measured(math.inf)), row("b", fid=measured(2.0, n=500), psnr=None)]
    text = comparison_table(rows).to_csv()
    assert text.endswith("\r\n") and text.count("\r\n") == 3 and text.count("\n") == 4
    first, second = csv.DictReader(io.StringIO(text, newline=""))
    assert first["name"] == name and first["stored_bytes"] == "1440000" and "checkpoint" not in first
    assert float(first["fid"]) == 1 / 3 and float(first["fid_low"]) == 1 / 3 - 0.1 and first["fid_n"] == "1000"
    assert (first["fid_2"], second["fid"], second["fid_2"], second["fid_2_n"]) == ("", "", "2.0", "500")
    assert float(first["psnr"]) == math.inf and second["psnr"] == ""
    assert all(None not in line and None not in line.values() for line in (first, second)), "as many fields as titles"


def test_json_has_rows_and_notes_and_is_json_with_numbers_without_end_too() -> None:
    rows = [row("a", fid=measured(1.5), psnr=measured(math.inf, math.nan)), row("b", fid=measured(2.0, n=500))]
    content = json.loads(
        comparison_table(rows).to_json(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert content["rows"][0]["fid"] == rows[0]["fid"]
    assert content["rows"][0]["psnr"]["value"] == "Infinity" and content["rows"][0]["psnr"]["interval"][0] == "NaN"
    assert content["notes"][0] == "fid (2) is apart: n 500 instead of 1,000"


def test_markdown_shows_names_as_they_are() -> None:
    table = comparison_table([row("[bold]a|b*c*_d_ e_f\x1b[31m\n<b>", fid=measured(3.0))])
    lines = table.to_markdown().splitlines()
    assert r"| [bold]a\|b\*c\*\_d\_ e_f[31m \<b> |" in lines[2]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3] == "" and lines[4].startswith("- ± is half")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def draw(table: Table, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    Console(stream=stream).table("Title [red]", table.columns, table.cells, table.best, table.notes)
    return stream.getvalue()


def test_a_terminal_shows_markup_as_text_and_the_best_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("[bold]x[/bold]", fid=measured(3.0)), row("[/red]", fid=measured(9.0))]
    text = draw(comparison_table(rows), 200, monkeypatch)
    assert "[bold]x[/bold]" in text and "[/red]" in text and "Title [red]" in text
    assert "\x1b[1m3.00 ±0.10\x1b[0m" in text and "\x1b[1m9.00" not in text
    assert "bold: the best of its column" in text


def test_a_table_wider_than_the_terminal_is_divided_between_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    table = comparison_table([row("a-model-with-a-long-name", fid=measured(3.0)), row("b", fid=measured(9.0))])
    text = draw(table, 60, monkeypatch)
    assert text.count("a-model-with-a-long-name") > 1
    for cell in (*table.columns, *table.cells[0], *table.cells[1]):
        assert cell in text, "no cell is cut or broken"
    assert draw(table, 200, monkeypatch).count("a-model-with-a-long-name") == 1


def test_a_log_shows_the_marks_and_the_notes() -> None:
    table = comparison_table([row("a", fid=measured(3.0)), row("b", fid=measured(9.0))])
    stream = io.StringIO()
    Console(stream=stream).table("Title", table.columns, table.cells, table.best, table.notes)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Title" and "**3.00 ±0.10**" in lines[3] and len({len(line) for line in lines[1:5]}) == 1
    assert lines[5] == "  ± is half of the 95 % interval; n 1,000"
