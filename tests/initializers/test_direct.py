"""Direct pre-training: the same as he and train, the budget of the ancestor, and going on after a kill."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from support import run_cli, weights

from finectl.artifacts.manifest import read_manifest
from finectl.errors import EXIT_USAGE
from finectl.stages import init as init_stage
from finectl.stages import train as train_stage
from finectl.training import loop

MODEL = ("--model", "dit-nano", "--depth", 2)
SHORT = ("--tune-steps", 4, "--batch-size", 8)


def direct(workspace: Path, *options: object) -> Any:
    return run_cli("init", *options, "--method", "direct", "--workspace", workspace)


def test_it_is_he_and_train(workspace: Path) -> None:
    made = direct(workspace, *MODEL, *SHORT, "--seed", 3).path
    start = run_cli("init", "--method", "he", *MODEL, "--seed", 3).path
    trained = run_cli("train", start, "--steps", 4, "--batch-size", 8, "--seed", 3).path
    assert weights(made)["model.safetensors"] == weights(trained)["ema.safetensors"]
    metrics, cost = read_manifest(made).metrics, read_manifest(made).cost
    assert metrics["parameters_transferred"] == metrics["parameters_transferred_with_embedders"] == 0
    assert cost["steps"] == 4 and cost["samples"] == 32 and cost["flops"] == read_manifest(trained).cost["flops"]


def planned(workspace: Path, *options: object) -> int:
    """The updates that a run would make."""
    ran = direct(workspace, *options, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    import json

    found = json.loads(ran.out)["config"]["tune_steps"]
    assert isinstance(found, int)
    return found


def test_its_budget_is_what_the_ancestor_cost(chain: Any) -> None:
    steps = {path: read_manifest(path).cost["steps"] for path in (chain.condensed, chain.init, chain.model)}
    assert steps == {chain.condensed: 3, chain.init: 2, chain.model: 3}
    assert planned(chain.root, chain.condensed) == 3
    assert planned(chain.root, chain.learngene) == 3, "that of the model it was taken from"
    assert planned(chain.root, chain.model) == 8, "with all that it was made from"
    control = run_cli("init", chain.learngene, "--method", "he", "--depth", 2).path
    again = run_cli("train", control, "--steps", 5, "--batch-size", 8).path
    assert planned(chain.root, again) == 5, "the control took nothing from the learngene"
    assert planned(chain.root, chain.model, "--tune-steps", 4) == 4


def test_its_budget_without_an_ancestor_is_that_of_train(workspace: Path) -> None:
    assert planned(workspace, *MODEL) == train_stage.SMALL["steps"] == init_stage.SMALL_WHOLE_STEPS
    assert init_stage.PAPER_WHOLE_STEPS == train_stage.PAPER["steps"]


def test_a_lost_parent_leaves_the_updates_of_its_own(chain: Any) -> None:
    import shutil

    shutil.rmtree(chain.condensed)
    assert planned(chain.root, chain.model) == 3
    assert planned(chain.root, chain.learngene) == init_stage.SMALL_WHOLE_STEPS


def test_no_updates_are_refused(workspace: Path) -> None:
    ran = direct(workspace, *MODEL, "--tune-steps", 0)
    assert ran.code == EXIT_USAGE and "--tune-steps is 0" in ran.err and "--method he" in ran.err


def test_a_killed_run_goes_on_to_the_same_bytes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = direct(workspace / "whole", *MODEL, *SHORT).path
    step = loop.train_step

    def stopped(run: Any, number: int) -> Any:
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(run, number)

    monkeypatch.setattr(loop, "train_step", stopped)
    assert direct(workspace / "killed", *MODEL, *SHORT).code == 75
    monkeypatch.undo()
    assert weights(direct(workspace / "killed", *MODEL, *SHORT).path) == weights(whole)


def test_what_it_does_not_read_makes_no_other_artifact(workspace: Path) -> None:
    made = direct(workspace, *MODEL, *SHORT).path
    assert direct(workspace, *MODEL, *SHORT, "--tune-samples", 16, "--tune-lr", 0.5).path == made
    assert direct(workspace, *MODEL, *SHORT, "--flip").path != made
