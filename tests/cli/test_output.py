"""What finectl prints and where: stdout for programs, stderr for people, exit codes for both."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, TINY_DATA, child_environment, command_line, finectl, run_cli, weights

from finectl.cli.main import main
from finectl.errors import EXIT_BUG, EXIT_INPUT, EXIT_SAVED, EXIT_USAGE

ESCAPE = "\x1b"
CONDENSE = ("condense", "--depth", 1, *TINY_DATA)


def test_stdout_is_the_path_and_nothing_else(workspace: Path) -> None:
    ran = run_cli(*CONDENSE)
    assert ran.out == f"{ran.path}\n" and ran.path.is_dir()
    assert ran.path.parent == workspace / "condensed"
    assert "event=start stage=training step=0 steps=3" in ran.err
    assert "event=end stage=training step=3 steps=3 loss=" in ran.err
    assert ESCAPE not in ran.err


def test_the_second_time_the_path_is_printed_at_once(workspace: Path) -> None:
    first = run_cli(*CONDENSE)
    stamps = {path: path.stat().st_mtime_ns for path in first.path.iterdir()}
    second = run_cli(*CONDENSE)
    assert second.out == first.out and "already there" in second.err and "event=" not in second.err
    assert {path: path.stat().st_mtime_ns for path in first.path.iterdir()} == stamps


def test_force_makes_it_anew_with_the_same_weights(workspace: Path) -> None:
    first = run_cli(*CONDENSE).path
    before, created = weights(first), (first / "manifest.yaml").stat().st_mtime_ns
    again = run_cli(*CONDENSE, "--force")
    assert again.path == first and "event=start" in again.err
    assert weights(first) == before and (first / "manifest.yaml").stat().st_mtime_ns > created


def test_json_is_one_object_on_one_line(workspace: Path) -> None:
    for cached in (False, True):
        ran = run_cli(*CONDENSE, "--json")
        answer = json.loads(ran.out)
        assert ran.out.count("\n") == 1 and Path(answer["path"]).is_dir()
        assert answer["cached"] is cached and answer["kind"] == "condensed" and len(answer["recipe"]) == 64
        assert answer["cost"]["steps"] == 3


def test_a_json_line_is_read_by_the_next_stage(workspace: Path) -> None:
    ran = run_cli("extract", "-", stdin=run_cli(*CONDENSE, "--json").out)
    assert ran.path.parent.name == "learngene"


def test_quiet_prints_nothing_for_people_but_errors(workspace: Path) -> None:
    ran = run_cli(*CONDENSE, "--quiet")
    assert ran.err == "" and ran.path.is_dir()
    assert run_cli(*CONDENSE, "--depth", 0, "-q").err.startswith("error: ")


def test_dry_run_leaves_nothing_and_says_what_would_be(workspace: Path) -> None:
    ran = run_cli(*CONDENSE, "--dry-run")
    assert ran.code == 0 and ran.out == "" and not workspace.exists()
    for word in ("steps: 3", "depth: 1", "parameters:", "memory_bytes:", "disk_bytes:", "exists: false", "lr: "):
        assert word in ran.err
    plan = json.loads(run_cli(*CONDENSE, "--dry-run", "--json").out)
    assert not workspace.exists()
    made = run_cli(*CONDENSE)
    assert plan["path"] == str(made.path)
    assert json.loads(run_cli(*CONDENSE, "--dry-run", "--json").out)["exists"] is True


def test_out_is_a_place_of_the_users_choice(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    assert run_cli(*CONDENSE, "--out", tmp_path / "empty").path == tmp_path / "empty"
    assert run_cli(*CONDENSE, "--out", tmp_path / "empty").path == tmp_path / "empty"
    other = run_cli(*CONDENSE, "--seed", 1, "--out", tmp_path / "empty")
    assert other.code == 4 and "another recipe" in other.err
    assert run_cli(*CONDENSE, "--seed", 1, "--out", tmp_path / "empty", "--force").code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_cli(*CONDENSE, "--out", ".").code == 0
    assert (tmp_path / "here" / "manifest.yaml").is_file()
    assert not list(workspace.glob("*/*"))


@pytest.mark.parametrize("text", ["", "\n", "  \n\n"])
def test_an_empty_stdin_is_the_failure_of_the_stage_before(text: str, workspace: Path) -> None:
    ran = run_cli("extract", "-", stdin=text)
    assert ran.code == EXIT_INPUT and ran.out == ""
    assert "nothing arrived on standard input" in ran.err and ran.err.count("error:") == 1


@pytest.mark.parametrize("text", ["{broken\n", '{"a": 1}\n', "{}\n"])
def test_a_stdin_that_is_no_answer_of_finectl(text: str, workspace: Path) -> None:
    ran = run_cli("extract", "-", stdin=text)
    assert ran.code == EXIT_INPUT and text.strip() in ran.err and "--json" in ran.err


def test_a_closed_stdin(workspace: Path) -> None:
    assert run_cli("extract", "-", stdin=None).code == EXIT_INPUT


def test_a_pipe_of_stages_and_a_pipe_whose_first_stage_fails(workspace: Path) -> None:
    script = (
        '"$0" -m finectl condense --depth 1 --steps 2 --batch-size 4 -q'
        ' | "$0" -m finectl extract - -q | "$0" -m finectl init - --depth 2 --tune-steps 1 --batch-size 4 -q'
    )
    good = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, sys.executable],
        capture_output=True, text=True, check=False, env=child_environment(),
    )  # fmt: skip
    assert good.returncode == 0 and good.stderr == ""
    assert Path(good.stdout.strip()).parent == workspace / "model"
    bad = subprocess.run(
        ["bash", "-c", f'{script.replace("--depth 1", "--depth 0")}; echo "${{PIPESTATUS[@]}}"', sys.executable],
        capture_output=True, text=True, check=False, env=child_environment(),
    )  # fmt: skip
    assert bad.stdout == f"{EXIT_USAGE} {EXIT_INPUT} {EXIT_INPUT}\n"
    assert bad.stderr.count("error: ") == 3


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = '"$0" -m finectl completion bash | true; echo "${PIPESTATUS[0]}"'
    for _ in range(3):
        done = subprocess.run(
            ["bash", "-c", script, sys.executable], capture_output=True, text=True, check=False, env=child_environment()
        )
        assert done.stdout == "0\n" and done.stderr == ""


def test_a_bug_says_that_it_is_one(monkeypatch: pytest.MonkeyPatch, workspace: Path) -> None:
    import finectl.data.sources as sources

    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(sources, "parse_spec", fail)
    ran = run_cli("condense")
    assert ran.code == EXIT_BUG and "this is a bug in finectl: ZeroDivisionError: of the test" in ran.err
    assert "Traceback" not in ran.err
    assert "Traceback" in run_cli("condense", "-v").err
    monkeypatch.setenv("FINECTL_DEBUG", "1")
    assert "Traceback" in run_cli("condense").err


def test_version_and_help(workspace: Path) -> None:
    import finectl as package

    assert run_cli("--version").out == f"finectl {package.__version__}\n"
    text = run_cli("--help").out
    for name in ("condense", "extract", "init", "train", "sample", "evaluate", "ls", "show", "verify"):
        assert f"  {name} " in text
    assert run_cli("condense", "-h").out == run_cli("condense", "--help").out
    assert run_cli().code == EXIT_USAGE


def test_every_option_of_the_contract_is_there_in_every_stage() -> None:
    shared = ("--out", "--recipe", "--dry-run", "--json", "--quiet", "--force", "--resume", "--no-resume", "--device")
    for stage in ("condense", "extract", "init", "train", "sample", "evaluate"):
        text = run_cli(stage, "--help").out
        for option in (*shared, "--dtype", "--workspace"):
            assert option in text, f"{stage} lacks {option}"
    for stage in ("condense", "train"):
        for option in ("--data", "--steps", "--batch-size", "--lr", "--seed"):
            assert option in run_cli(stage, "--help").out


def test_the_module_and_the_script_are_the_same_program() -> None:
    assert finectl("--version").out == run_cli("--version").out
    assert main(["--version"]) == 0
    assert "finectl.cli.main:entry_point" in (ROOT / "pyproject.toml").read_text()


def on_terminal(arguments: tuple[object, ...], interrupt_at: str = "", **environment: str) -> tuple[int, str, str]:
    """Run finectl with stderr on a terminal; return exit code, stdout and what the terminal got.

    Args:
        arguments: The command line.
        interrupt_at: Send SIGINT when the terminal has shown this.
        environment: More variables.
    """
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command_line(*arguments),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal,
        env=child_environment(**{"TERM": "xterm-256color", "COLUMNS": "120", **environment}),
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:  # the last writer closed the terminal
            break
        if not part:
            break
        shown += part
        if interrupt_at and interrupt_at.encode() in shown:
            process.send_signal(signal.SIGINT)
            interrupt_at = ""
    os.close(controller)
    out = process.communicate()[0]
    return process.returncode, out.decode(), shown.decode()


COLOUR = tuple(f"{ESCAPE}[{code}" for code in ("3", "9", "1;3", "38"))


def test_a_terminal_shows_a_bar(workspace: Path) -> None:
    code, out, shown = on_terminal(CONDENSE)
    assert code == 0 and ESCAPE not in out and out.count("\n") == 1
    assert "3/3" in shown and "loss" in shown and "samples/s" in shown and "\u2501" in shown
    assert "event=" not in shown and any(colour in shown for colour in COLOUR)


def test_an_interruption_on_a_terminal_is_said_above_the_bar(workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--steps", 100_000, "--batch-size", 8, "--eval-every", 0)
    code, out, shown = on_terminal(arguments, interrupt_at="samples/s")
    assert code == EXIT_SAVED and out == ""
    assert "SIGINT: finishing this step and saving" in shown and "run the same command again" in shown
    assert "Traceback" not in shown


def test_no_color_is_kept_on_a_terminal(workspace: Path) -> None:
    code, _, shown = on_terminal(CONDENSE, NO_COLOR="1")
    assert code == 0 and "3/3" in shown
    assert not any(colour in shown for colour in COLOUR)


def test_a_dumb_terminal_gets_plain_lines(workspace: Path) -> None:
    code, _, shown = on_terminal(CONDENSE, TERM="dumb")
    assert code == 0 and ESCAPE not in shown and "event=start" in shown


def test_an_error_on_a_terminal_is_plain_text(workspace: Path) -> None:
    code, out, shown = on_terminal(("train",))
    assert code == EXIT_INPUT and out == "" and shown.startswith("error: ") and ESCAPE not in shown


def test_list_show_and_verify(chain: Any) -> None:
    listed = run_cli("ls")
    assert [Path(line).parent.name for line in listed.out.splitlines()] == ["condensed", "learngene", "model", "model"]
    assert run_cli("ls", "learngene").path == chain.learngene
    lines = [json.loads(line) for line in run_cli("ls", "--json").out.splitlines()]
    assert {line["kind"] for line in lines} == {"condensed", "learngene", "model"} and lines[0]["bytes"] > 0
    shown = run_cli("show", chain.model).out
    for artifact in (chain.condensed, chain.learngene, chain.init, chain.model):
        assert artifact.name in shown, "the lineage is not whole"
    assert json.loads(run_cli("show", "--json", "-", stdin=f"{chain.model}\n").out)["stage"] == "train"
    assert run_cli("show").out == shown, "the newest artifact is the trained model"
    assert len(run_cli("verify").out.splitlines()) == 4
    assert run_cli("verify", "-", stdin=listed.out).out == listed.out


def test_inputs_by_path_kind_name_and_latest(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = json.loads(run_cli("show", chain.model, "--json").out)["recipe"]
    monkeypatch.chdir(chain.model)
    texts = (
        f"model/{chain.model.name}",
        chain.model.name,
        "latest",
        "model/latest",
        f"{chain.model}/",
        ".",
        "..//latest",
    )
    for text in (*texts, chain.model / "manifest.yaml", chain.root / "model" / "latest"):
        answer = json.loads(run_cli("show", text, "--json").out)
        assert answer["recipe"] == wanted and Path(answer["path"]).name == chain.model.name, text
