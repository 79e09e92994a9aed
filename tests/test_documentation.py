"""The README's commands, and the shell recipes, mean something to the program that is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finectl.cli.commands import COMMANDS, CommandGroup
from finectl.cli.main import build_command
from finectl.errors import FinectlError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted([*ROOT.glob("recipes/**/*.sh"), ROOT / "tests/run.sh", ROOT / ".ci/run"])
PLACEHOLDERS = {"STAGE", "ARTIFACT/manifest.yaml", "FILE"}


def readme_commands() -> list[str]:
    """Every finectl call in an indented block or between backticks, cut at pipes; without those of placeholders."""
    texts = re.findall(r"^ {4}(finectl .*)$", README, re.M) + re.findall(r"`(finectl [^`]+)`", README)
    calls = [call.split("#")[0].strip() for text in texts for call in text.split("|")]
    return sorted({call for call in calls if call.startswith("finectl ") and not PLACEHOLDERS & set(call.split())})


def parse(call: str) -> Any:
    """Parse a call as the command line would, without running it."""
    name, *arguments = shlex.split(call)[1:]
    if name.startswith("-"):
        return None
    command = build_command(name)
    if isinstance(group := COMMANDS.load(name), CommandGroup):
        if not group.default and (not arguments or arguments[0].startswith("-")):
            return None
        if not group.default or (arguments[:1] and arguments[0] in group.steps):
            name, *arguments = arguments
            command = build_command(name, group.steps)
    return command.make_context(name, arguments, resilient_parsing=False)


def test_the_readme_has_commands() -> None:
    assert len(readme_commands()) >= 5
    with pytest.raises(Exception, match="No such option"):
        parse("finectl train --no-such-option 3")


@pytest.mark.parametrize("call", readme_commands())
def test_a_command_of_the_readme_parses(call: str) -> None:
    try:
        parse(call)
    except FinectlError as error:
        pytest.fail(f"{call}: {error.what}")


def test_the_readme_names_every_command_and_exit_code() -> None:
    for name in COMMANDS:
        assert f"`{name}`" in README, name
    for code in (0, 1, 2, 3, 4, 5, 6, 75, 130):
        assert re.search(rf"^\| {code} \|", README, re.M), code


def test_files_that_the_readme_names_are_there() -> None:
    named = set(re.findall(r"(?:recipes|tests|completions|\.ci)/[\w./-]+\w", README))
    assert {"recipes/quickstart.sh", "tests/run.sh"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shell_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_finectl_calls_of_a_script_have_known_options(script: Path) -> None:
    lines = script.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"\bfinectl ([a-z-]+)\b([^|)\n]*)", lines):
        if name not in COMMANDS:
            continue
        command = build_command(name)
        group = COMMANDS.load(name)
        if isinstance(group, CommandGroup) and (
            not group.default or (rest.split()[:1] and rest.split()[0] in group.steps)
        ):
            command = build_command(rest.split()[0], group.steps)
        known = {option for parameter in command.params for option in parameter.opts}
        used = set(re.findall(r"(?<=\s)--[a-z-]+", rest))
        assert used <= known, f"{script.name}: finectl {name} does not know {used - known}"
