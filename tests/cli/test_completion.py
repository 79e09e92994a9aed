"""Completion scripts: generated from the command table, committed, and really completing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, run_cli

from finectl.artifacts.kinds import KINDS
from finectl.cli.commands import COMMANDS
from finectl.cli.completion import Command, read_table, script
from finectl.initializers import METHODS

FILES = {"bash": "finectl.bash", "zsh": "_finectl", "fish": "finectl.fish"}


@pytest.mark.parametrize("shell", FILES)
def test_the_committed_file_is_what_the_generator_writes(shell: str) -> None:
    committed = (ROOT / "completions" / FILES[shell]).read_text(encoding="utf-8")
    assert committed == script(shell), f"run: finectl completion {shell} > completions/{FILES[shell]}"
    assert run_cli("completion", shell).out == committed


def every_command() -> list[Command]:
    return [each for command in read_table() for each in (command, *command.steps)]


@pytest.mark.parametrize("shell", FILES)
def test_every_command_and_option_is_in_the_script(shell: str) -> None:
    text = script(shell)
    for command in every_command():
        assert command.last in text
        for option in command.options:
            for name in option.names:
                flag = name if shell != "fish" else f"-{'l' if name.startswith('--') else 's'} {name.lstrip('-')}"
                assert flag in text, f"{command.name} {name}"


def test_the_table_is_that_of_the_parser() -> None:
    for command in every_command():
        text = run_cli(*command.name.split(), "--help").out
        for option in command.options:
            assert all(name in text for name in option.names), f"{command.name} {option.names}"
    assert [command.name for command in read_table()] == list(COMMANDS)


def complete(*words: str, workspace: Path | None = None) -> list[str]:
    """Return what bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in ("finectl", *words))
    code = f"""
        source '{ROOT / "completions" / "finectl.bash"}'
        {f"export FINECTL_WORKSPACE='{workspace}'" if workspace else "unset FINECTL_WORKSPACE"}
        COMP_WORDS=({quoted}); COMP_CWORD={len(words)}
        _finectl
        printf '%s\\n' "${{COMPREPLY[@]}}"
        complete -p finectl >&2
    """
    done = subprocess.run(["bash", "-u", "-c", code], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0 and "-F _finectl finectl" in done.stderr, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_and_values() -> None:
    assert complete("cond") == ["condense"]
    assert set(complete("")) == {*COMMANDS, "--help", "--version"}
    assert "--rank" in complete("condense", "--ra")
    assert complete("condense", "--dep") == ["--depth"]
    assert {"--resume", "--no-resume"} <= set(complete("train", "--"))
    assert "--rank" not in complete("train", "--")
    assert complete("condense", "--model", "dit-n") == ["dit-nano"]
    assert complete("sample", "--scheduler", "dd") == ["ddpm", "ddim"]
    assert sorted(complete("init", "--method", "")) == sorted([*METHODS, "all"])
    assert complete("condense", "--dtype", "b") == ["bfloat16"]
    assert set(complete("ls", "")) == {*KINDS, "methods"}
    assert complete("completion", "b") == ["bash"]
    assert complete("condense", "--depth", "") == []
    assert "etc" in complete("condense", "--workspace", "et")


def test_bash_completes_artifacts(chain: Any) -> None:
    names = complete("train", "model/", workspace=chain.root)
    assert set(names) == {f"model/{chain.init.name}", f"model/{chain.model.name}"}
    everything = complete("show", "", workspace=chain.root)
    assert f"learngene/{chain.learngene.name}" in everything and "latest" in everything
    assert complete("train", "", workspace=chain.root / "none") == ["latest"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_take_their_scripts(shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run(
        [program, "-n", ROOT / "completions" / FILES[shell]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
