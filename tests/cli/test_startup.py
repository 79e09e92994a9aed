"""Start-up: help answers at once, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from typing import Any

import pytest
from support import TINY_DATA, child_environment

from finectl.cli.commands import COMMANDS

HEAVY = ("torch", "numpy", "diffusers", "rich", "sklearn", "PIL", "safetensors", "scipy", "pydantic", "matplotlib")
ALLOWED_S = 0.15
RUNS = 5
ATTEMPTS = 4


def modules_after(code: str, stdin: str = "") -> list[str]:
    """Return which heavy modules a process has imported at its end."""
    script = f"import sys\ntry:\n    {code}\nfinally:\n    print('HEAVY', *(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(),
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("HEAVY")]
    assert len(lines) == 1, done.stderr
    return lines[0].split()[1:]


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_imports_nothing_heavy(command: tuple[str, ...]) -> None:
    assert modules_after(f"from finectl.cli.main import main; main([*{command}, '--help'])") == []


def test_what_counts_as_heavy_would_be_seen() -> None:
    assert modules_after("import rich") == ["rich"]


@pytest.mark.parametrize("command", ["init", "train", "extract", "sample", "evaluate", "show", "verify"])
def test_stdin_is_read_before_anything_heavy_is_imported(command: str) -> None:
    """In a pipe all stages start together; each waits for the one before without a copy of torch in memory."""
    assert modules_after(f"from finectl.cli.main import main; main(['{command}', '-'])") == []


def test_planning_and_finding_a_finished_artifact_need_no_torch(chain: Any) -> None:
    condense = ["condense", "--depth", "2", *map(str, TINY_DATA)]
    for arguments in (["extract", "--dry-run"], condense, ["extract", str(chain.condensed)]):
        assert modules_after(f"from finectl.cli.main import main; main({arguments})") == []


def cpu_seconds(command: list[str]) -> float:
    """Return user and system seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=child_environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("command", [[], ["condense"], ["evaluate"]])
def test_help_costs_little_more_than_a_bare_start(command: list[str]) -> None:
    if os.environ.get("COVERAGE_PROCESS_START"):
        pytest.skip("measured processes are slower")
    measured = []
    for _ in range(ATTEMPTS):
        bare = statistics.median(cpu_seconds([sys.executable, "-c", "pass"]) for _ in range(RUNS))
        help_s = statistics.median(
            cpu_seconds([sys.executable, "-m", "finectl", *command, "--help"]) for _ in range(RUNS)
        )
        measured.append(help_s - bare)
        if measured[-1] < ALLOWED_S:
            return
    raise AssertionError(
        f"--help takes {min(measured):.3f} s of CPU time above a bare start; {ALLOWED_S} s are allowed"
    )
