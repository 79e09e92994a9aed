"""`init --method NAME --help` and `ls methods`: what the table of methods says, in words."""

from __future__ import annotations

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from dataclasses import fields
from fcntl import ioctl

import pytest
from support import child_environment, command_line, run_cli

from finectl.cli.method_help import constants, explain, updates
from finectl.errors import EXIT_USAGE
from finectl.initializers import METHODS, Method

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def help_of(*arguments: str) -> str:
    ran = run_cli("init", *arguments)
    assert ran.code == 0, ran.err
    return " ".join(ran.out.split())


@pytest.mark.parametrize("name", METHODS)
def test_help_explains_a_method_in_three_lines(name: str) -> None:
    method, lines = METHODS[name], explain(name)
    assert len(lines) == 3
    text = help_of("--method", name, "--help")
    for line in lines:
        assert line in text.replace("- ", "-") or line in text, "as it stands, up to how it wraps"
    assert method.help in lines[0] and method.reference in lines[2]
    assert "Needs " in lines[1] and "Updates" in lines[1]
    for variant in method.variants:
        assert variant in lines[2]
    for constant, usual in method.constants.items():
        assert f"{constant}={usual:g}" in lines[2]
    assert "--tune-steps" in text and "--workspace" in text, "the options as usual"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help", "--method", "svd"),
        ("--method", "svd", "-h"),
        ("--help", "--method=svd"),
        ("--method=svd", "--depth", "3", "--help"),
        ("latest", "--help", "--depth", "3", "--method", "svd", "model/x"),
        ("--method", "fine", "--help", "--method", "svd"),
    ],
)
def test_help_sees_the_method_wherever_it_stands(arguments: tuple[str, ...]) -> None:
    assert explain("svd")[0] in help_of(*arguments)


def test_help_without_a_method_is_about_all_of_them() -> None:
    text = help_of("--help")
    assert "finectl init --method NAME --help" in text and "finectl ls methods" in text
    assert text == help_of("--method", "all", "--help") == help_of("--help", "--out", "--method=svd")
    assert not any(explain(name)[0] in text for name in METHODS)


def test_help_of_several_methods() -> None:
    text = help_of("--method", "he,svd", "--help")
    assert explain("he")[0] in text and explain("svd")[0] in text


@pytest.mark.parametrize("arguments", [("--method", "svdd", "--help"), ("--help", "--method=svdd")])
def test_help_of_an_unknown_method(arguments: tuple[str, ...]) -> None:
    ran = run_cli("init", *arguments)
    assert ran.code == EXIT_USAGE and ran.out == "" and "did you mean 'svd'" in ran.err


def test_help_of_a_method_imports_nothing_heavy() -> None:
    code = (
        "import sys; from finectl.cli.main import main; main(['init', '--method', sys.argv[1], '--help']); "
        "print('HEAVY', *(m for m in ('torch', 'numpy', 'rich', 'sklearn', 'PIL', 'safetensors') if m in sys.modules))"
    )
    for name in ("fine", "he"):
        done = subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, check=True, env=child_environment()
        )
        assert done.stdout.splitlines()[-1] == "HEAVY"


def test_what_a_model_costs() -> None:
    assert updates(Method("", "")) == "0"
    assert updates(METHODS["fine"]) == "50 / 300"
    pre_trained = Method("", "", options=("tune_steps",), tune_share=1.0)
    assert updates(pre_trained) == "a pre-training"
    mixed = Method("", "", variants=("a", "b"), variant_options={"b": ("tune_steps",)}, tune_share=0.5)
    assert updates(mixed) == "a 0, b 50% of a pre-training"
    assert constants(Method("", "", constants={"x": 0.5, "y": 1e-4})) == "x=0.5, y=0.0001"


def test_the_table_as_json_has_every_field() -> None:
    lines = [json.loads(line) for line in run_cli("ls", "methods", "--json").out.splitlines()]
    assert [line["method"] for line in lines] == list(METHODS)
    wanted = {field.name for field in fields(Method)} | {"method", "needs", "updates"}
    assert all(set(line) == wanted for line in lines)
    assert {line["method"]: line["needs"] for line in lines}["he"] == "nothing"


def test_the_table_in_a_pipe() -> None:
    text = run_cli("ls", "methods").out
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    assert titles == ["method", "what it does", "needs", "width", "updates", "variants", "--set", "reference"]
    for row, (name, method) in zip(rows, METHODS.items(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == name and cells[1] == method.help and cells[-1] == method.reference
        assert cells[3] == (method.width_range if method.widths else "same")


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_on_a_terminal_fits(width: int) -> None:
    controller, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    with subprocess.Popen(
        command_line("ls", "methods"), stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL,
        env=child_environment(TERM="xterm-256color"),
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        while True:
            try:
                part = os.read(controller, 65536)
            except OSError:  # the last writer closed the terminal
                break
            shown += part
    os.close(controller)
    assert process.returncode == 0
    lines = ESCAPES.sub("", shown.decode()).splitlines()
    assert max(map(len, lines)) <= width
    titles = [line for line in lines if line.startswith("method ")]
    assert len(titles) == 2
    firsts = [line.split()[0] for line in lines if line[:1].strip()]
    for name, method in METHODS.items():
        assert firsts.count(name) == 2, "a name is never broken"
        for words in (*method.variants, *(f"{key}={value:g}" for key, value in method.constants.items())):
            assert any(words in line for line in lines), f"{words} is broken"
