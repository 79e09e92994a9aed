"""Processes that are killed or interrupted at random steps: the finished weights are those of an unbroken run."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import child_environment, command_line, finectl, run_cli, weights, whole

from finectl.artifacts.tensors import read_metadata
from finectl.errors import EXIT_INTERRUPTED, EXIT_SAVED, FinectlError

DEADLINE_S = 180.0
TRAINING = ("--steps", 50, "--batch-size", 8, "--save-every", 2)
STAGES = {
    "condense": ("condense", "--depth", 2, "--eval-every", 30, "--lr-schedule", "cosine", "--keep-every", 7, *TRAINING),
    "init": ("init", "--depth", 3, "--tune-steps", 50, "--batch-size", 8, "--save-every", 2),
    "train": ("train", "--eval-every", 30, "--keep-every", 10, *TRAINING),
}


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command_line(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """Wait until the process got somewhere; it must not end before."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline_s, "it never got there"
        time.sleep(0.002)


def saved_step(workspace: Path) -> int:
    """Return the step of the resume state that lies in the workspace, 0 without one."""
    for state in workspace.glob("*/.*.partial/state/training.safetensors"):
        try:
            return int(read_metadata(state)["step"])
        except FinectlError:  # replaced or published at this very moment
            return 0
    return 0


def unbroken(chain: Any, arguments: tuple[object, ...], source: list[Path], place: Path) -> dict[str, bytes]:
    """Return the weights of a run that nothing disturbs, in another workspace."""
    return weights(run_cli(arguments[0], *source, *arguments[1:], "--workspace", place, "--quiet").path)


def source_of(chain: Any, stage: str) -> list[Path]:
    return {"condense": [], "init": [chain.learngene], "train": [chain.init]}[stage]


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_killed_at_a_random_step_and_run_again(stage: str, chain: Any, fast_disk: Path) -> None:
    arguments, source = STAGES[stage], source_of(chain, stage)
    before = {path for path in chain.root.glob("*/*") if path.name != "latest"}
    step = random.randrange(1, 36)
    process = start(arguments[0], *source, *arguments[1:])
    wait_for(process, lambda: saved_step(chain.root) >= step)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = saved_step(chain.root)
    assert step <= reached < 50
    assert {p for p in chain.root.glob("*/*") if p.name != "latest" and p.name[0] != "."} <= before
    resumed = run_cli(arguments[0], *source, *arguments[1:])
    assert f"step={reached} steps=50" in resumed.err, "it did not go on from the saved state"
    again = weights(whole(resumed.path).path)
    assert again == unbroken(chain, arguments, source, fast_disk / "unbroken"), f"killed after step {reached}"
    kept = sorted(int(Path(name).stem) for name in again if name.startswith("checkpoints/"))
    assert kept == {"condense": [7, 14, 21, 28, 35, 42, 49], "init": [], "train": [10, 20, 30, 40]}[stage]
    log = (resumed.path / "log.jsonl").read_text().splitlines()
    assert len(log) == len(set(log)), "an entry was logged twice"


def test_an_interrupted_run_saves_exits_75_and_goes_on(chain: Any, fast_disk: Path) -> None:
    arguments = ("condense", "--depth", 2, "--steps", 100, "--batch-size", 8, "--save-every", 1, "--eval-every", 0)
    process = start(*arguments)
    wait_for(process, lambda: saved_step(chain.root) >= 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == EXIT_SAVED, err
    assert out == "" and "Traceback" not in err
    assert "run the same command again" in err
    reached = saved_step(chain.root)
    resumed = run_cli(*arguments)
    assert f"step={reached} steps=100" in resumed.err
    assert weights(resumed.path) == unbroken(chain, arguments, [], fast_disk / "unbroken")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number: signal.Signals, workspace: Path) -> None:
    # One step on so many images takes many seconds; the second signal does not wait for its end.
    process = start("condense", "--steps", 5, "--batch-size", 4096, "--eval-every", 0)
    assert process.stderr is not None
    line = ""
    while "event=start" not in line:
        line = process.stderr.readline()
        assert line, "ended too early"
    process.send_signal(number)
    line = process.stderr.readline()
    assert "finishing this step" in line and number.name in line
    process.send_signal(number)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == (EXIT_INTERRUPTED if number == signal.SIGINT else -signal.SIGTERM), err
    assert out == "" and "Traceback" not in err
    assert not [path for path in workspace.glob("*/*") if not path.name.startswith(".")]


def test_an_interruption_before_any_work_exits_130_or_75_and_leaves_no_artifact(workspace: Path) -> None:
    process = start("condense", "--depth", 1, "--steps", 100_000, "--batch-size", 8)
    wait_for(process, lambda: any(workspace.glob("condensed/.*.partial/owner.json")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode in (EXIT_INTERRUPTED, EXIT_SAVED)
    assert out == "" and "Traceback" not in err and "bug" not in err
    assert not [path for path in workspace.glob("*/*") if not path.name.startswith(".")]


def test_no_resume_drops_the_state(workspace: Path, fast_disk: Path) -> None:
    arguments = ("condense", "--depth", 1, "--batch-size", 8, "--save-every", 1, "--eval-every", 0, "--steps", 100)
    process = start(*arguments)
    wait_for(process, lambda: saved_step(workspace) >= 3)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == EXIT_SAVED
    anew = run_cli(*arguments, "--no-resume")
    assert "step=0 steps=100" in anew.err
    assert weights(anew.path) == weights(run_cli(*arguments, "--workspace", fast_disk / "other").path)


def test_two_processes_with_one_recipe(workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--batch-size", 8, "--save-every", 1, "--eval-every", 0, "--steps", 150)
    first = start(*arguments)
    wait_for(first, lambda: saved_step(workspace) >= 1)
    second = finectl(*arguments)
    assert second.code == 4 and second.out == ""
    assert f"process {first.pid} on" in second.err and "wait until it is done" in second.err
    out, err = first.communicate(timeout=DEADLINE_S)
    assert first.returncode == 0, err
    third = run_cli(*arguments)
    assert third.out == out and "already there" in third.err
