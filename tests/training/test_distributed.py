"""Several processes and one: the same run, whatever the number, also when processes come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import (
    Pair,
    assert_agree,
    ranks_of,
    saved_step,
    start_both,
    started,
    torchrun,
    wait_until,
)
from support import ROOT, command_line, run_cli, whole

from finectl.artifacts.manifest import read_manifest
from finectl.errors import EXIT_COMPUTATION, EXIT_INPUT, EXIT_USAGE

# The rate is that of the first steps of a warm-up: later, Adam turns rounding in gradients of nearly 0 into real steps.
TINY = ("condense", "--depth", 2, "--steps", 20, "--batch-size", 16, "--eval-every", 5)
LONG = ("condense", "--depth", 2, "--steps", 20, "--batch-size", 256, "--eval-every", 10, "--save-every", 1)
STOPPED_S = 50.0
VARIANTS: dict[str, tuple[tuple[object, ...], tuple[object, ...]]] = {
    "plain": ((), ()),
    "fsdp": (("--eval-every", 2, "--keep-every", 8), ("--fsdp",)),
    "accumulate": ((), ("--accumulate", 2)),
    "fsdp accumulate": ((), ("--fsdp", "--accumulate", 3)),
    "clip": (("--clip-grad", 0.05), ()),
    "fsdp clip": (("--clip-grad", 0.05), ("--fsdp",)),
    "uneven": (("--batch-size", 13), ("--accumulate", 3)),
    "checkpointing": ((), ("--fsdp", "--grad-checkpointing")),
}


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two processes that run one command after another."""
    both = Pair()
    yield both
    both.close()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The artifact of a command that one process ran, made once for each command."""
    root = tmp_path_factory.mktemp("alone")
    made: dict[tuple[object, ...], Path] = {}

    def make(*arguments: object) -> Path:
        if arguments not in made:
            made[arguments] = run_cli(*arguments, "--workspace", root).path
        return made[arguments]

    return make


def only_error(err: str) -> str:
    """Return the one error block of a run, which shows no traceback of finectl's."""
    blocks = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(blocks) == 1, err
    assert f'File "{ROOT}/finectl/' not in err, err
    return blocks[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_and_one_are_the_same_run(variant: str, pair: Pair, alone: Any, workspace: Path) -> None:
    recipe, execution = VARIANTS[variant]
    lead, follow = pair(*TINY, *recipe, *execution, workspace=workspace)
    assert (follow.code, follow.out, follow.err) == (0, "", ""), "one process writes and prints"
    expected = alone(*TINY, *recipe)
    assert lead.path.name == expected.name, "the number of processes is no part of the recipe"
    assert_agree(whole(lead.path).path, expected)
    manifest = read_manifest(lead.path)
    assert manifest.execution["world_size"] == 2 and manifest.cost["samples"] == 20 * manifest.config["batch_size"]


def test_what_is_compared_would_differ(alone: Any) -> None:
    """Other images, another clipping or no averaging over the processes would be seen."""
    one = alone(*TINY)
    for change in (("--seed", 1), ("--batch-size", 13), ("--clip-grad", 0.05)):
        with pytest.raises(AssertionError, match="differ"):
            assert_agree(one, alone(*TINY, *change))


def test_as_a_user_starts_it(workspace: Path, alone: Any) -> None:
    with started(torchrun(*TINY)) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1, "the path is printed once"
    assert "Traceback" not in err and "error:" not in err
    assert err.count("event=start") == 1
    assert_agree(whole(Path(out.strip())).path, alone(*TINY))
    assert run_cli(*TINY).out == out, "and found by any number of processes"


def test_the_second_time_the_path_is_found_by_the_pair(pair: Pair, workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--steps", 2, "--batch-size", 4)
    first = pair(*arguments, workspace=workspace)
    for _ in range(5):
        second = pair(*arguments, workspace=workspace)
        assert second[0].out == first[0].out and "already there" in second[0].err
        assert (second[1].code, second[1].out, second[1].err) == (0, "", "")


def test_init_and_train_on_two_processes(pair: Pair, chain: Any, workspace: Path, tmp_path: Path) -> None:
    other = tmp_path / "one"
    tune = ("init", chain.learngene, "--depth", 3, "--tune-steps", 10, "--batch-size", 8)
    train = ("train", chain.init, "--steps", 10, "--batch-size", 8, "--warmup-steps", 0, "--lr", 1e-3)
    for arguments in (tune, train):
        lead, follow = pair(*arguments, workspace=workspace)
        assert follow.code == 0 and follow.out == "", follow.err
        assert_agree(whole(lead.path).path, run_cli(*arguments, "--workspace", other).path)


def test_stages_that_are_not_shared_are_done_by_one_process(pair: Pair, chain: Any, workspace: Path) -> None:
    """The others leave at once, and nothing waits for them."""
    start_s = time.monotonic()
    lead, follow = pair("extract", chain.condensed, "--depths", "2,3", workspace=workspace)
    assert lead.path.parent.name == "learngene" and (follow.code, follow.out, follow.err) == (0, "", "")
    assert time.monotonic() - start_s < STOPPED_S
    control = pair("init", "--method", "he", "--model", "dit-nano", "--depth", 1, workspace=workspace)
    assert control[0].path.parent.name == "model" and control[1].out == ""


def test_extract_under_torchrun(chain: Any) -> None:
    with started(torchrun("extract", chain.condensed, "--depths", "2,4")) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len(out.splitlines()) == 1 and Path(out.strip()).parent.name == "learngene"


def test_a_dry_run_of_two_processes(pair: Pair, workspace: Path) -> None:
    lead, follow = pair(*TINY, "--dry-run", "--json", workspace=workspace)
    plan = json.loads(lead.out)
    assert plan["processes"] == 2 and plan["memory_per"] == "device" and plan["step_s"] > 0
    assert (follow.code, follow.out, follow.err) == (0, "", "") and not workspace.exists()


def test_an_error_in_planning_ends_both(pair: Pair, workspace: Path) -> None:
    lead, follow = pair("condense", "--data", "folder:/no/such/place", workspace=workspace)
    assert lead.code == EXIT_INPUT and "does not exist" in only_error(lead.err) and lead.out == ""
    assert (follow.out, follow.err) == ("", "")
    lead, follow = pair("train", workspace=workspace)
    assert lead.code == EXIT_INPUT and "finectl init" in lead.err and follow.err == ""


def test_a_batch_that_is_smaller_than_the_shares(pair: Pair, workspace: Path) -> None:
    arguments = ("condense", "--depth", 1, "--steps", 2, "--batch-size", 3, "--accumulate", 2)
    lead, follow = pair(*arguments, workspace=workspace)
    assert lead.code == follow.code == EXIT_USAGE and "at least 4" in lead.err
    assert not [path for path in workspace.glob("*/*") if not path.name.startswith(".")]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_and_one_process_finishes(victim: int, workspace: Path, alone: Any) -> None:
    """Nobody looks after these two: each has to notice by itself."""
    both = start_both(*LONG)
    try:
        wait_until(lambda: saved_step(workspace) >= 4, *both)
        both[victim].kill()
        start_s = time.monotonic()
        try:
            out, err = both[1 - victim].communicate(timeout=STOPPED_S)
        except subprocess.TimeoutExpired:
            both[1 - victim].send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER it says where it hangs
            pytest.fail(f"it does not notice: {both[1 - victim].communicate()[1][-4000:]}")
        assert time.monotonic() - start_s < STOPPED_S
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1 - victim].returncode == EXIT_COMPUTATION and out == ""
    assert "another process of this run is gone" in only_error(err) and "Traceback" not in err
    assert "run the same command again" in err
    reached = saved_step(workspace)
    assert reached >= 4, "the state is whole"
    resumed = run_cli(*LONG)
    assert f"step={reached} steps=20" in resumed.err
    assert_agree(whole(resumed.path).path, alone(*LONG))


def test_a_killed_process_under_torchrun(workspace: Path) -> None:
    with started(torchrun(*LONG[:3], "--steps", 100_000, *LONG[5:])) as process:
        wait_until(lambda: saved_step(workspace) >= 5, process)
        os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
        start_s = time.monotonic()
        out, err = process.communicate(timeout=STOPPED_S)
    assert time.monotonic() - start_s < STOPPED_S and process.returncode != 0 and out == ""
    only_error(err)
    assert saved_step(workspace) >= 5


def test_begun_on_one_finished_on_two(pair: Pair, workspace: Path, alone: Any) -> None:
    with started(command_line(*LONG)) as process:
        wait_until(lambda: saved_step(workspace) >= 4, process)
        process.kill()
        process.communicate()
    reached = saved_step(workspace)
    lead, _ = pair(*LONG, "--fsdp", workspace=workspace)
    assert f"step={reached} steps=20" in lead.err, "it went on from the state"
    assert_agree(whole(lead.path).path, alone(*LONG))


def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(workspace: Path, alone: Any, pair: Pair) -> None:
    arguments = (*LONG[:-1], 1000)
    with started(torchrun(*arguments)) as process:
        wait_until(lambda: any(workspace.glob("*/.*.partial/state/training.safetensors")), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=STOPPED_S)
    assert process.returncode != 0 and out == ""
    reached = saved_step(workspace)
    assert 0 < reached < 20, f"the signal saved the state: {err}"
    assert only_error(err) == "error: interrupted; the state is saved" and "run the same command again" in err
    lead, _ = pair(*arguments, workspace=workspace)
    assert f"step={reached} steps=20" in lead.err
    assert_agree(lead.path, alone(*arguments))


def test_fine_tuning_with_a_bank_that_two_processes_make(pair: Pair, workspace: Path, tmp_path: Path) -> None:
    """Retained and new images of a batch are cut up among the processes as one batch."""
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1).path
    model = run_cli("train", start, "--steps", 2, "--batch-size", 8, "--eval-every", 0, "--lr", 1e-2).path
    common = ("--data", "digits#5,6", "--steps", 3, "--batch-size", 11, "--lr", 1e-4, "--eval-every", 0)
    command = ("finetune", model, *common, "--retention-share", 0.6, "--bank-samples", 8)
    lead, follow = pair(*command, workspace=workspace)
    assert (follow.code, follow.out, follow.err) == (0, "", ""), "one process writes and prints"
    made = whole(lead.path).manifest
    assert made.execution["world_size"] == 2 and made.metrics["batch"] == {"retained": 6, "target": 5}
    bank = lead.path / made.parents[1].path
    again = run_cli("finetune", model, *common, "--retention-share", 0.6, "--bank", bank, "--workspace", tmp_path)
    assert_agree(lead.path, again.path)
    assert run_cli(*command).path == lead.path
    for wrong in (("finetune", model, "--retention", "kd", "--bank-samples", 3), ("finetune", tmp_path / "none")):
        lead, follow = pair(*wrong, workspace=workspace)
        assert lead.code != 0 and only_error(lead.err) and (follow.out, follow.err) == ("", "")
