"""One data set after another: `finectl finetune --data A --then B`."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file
from support import Ran, child_environment, command_line, run_cli, weights

from finectl.artifacts.manifest import read_manifest
from finectl.errors import Interrupted
from finectl.stages import evaluate
from finectl.stages.finetune.continual import CHANGE, table_of

FEW = ("--steps", 2, "--batch-size", 8, "--eval-every", 0)
MEASURED = ("--samples", 20, "--allow-few")
SETS = ("--data", "digits#3,4", "--then", "digits#5,6")


@pytest.fixture
def model(workspace: Path) -> Path:
    """A model of two of the ten digits."""
    made = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", "digits#0,1").path
    return run_cli("train", made, *FEW).path


def then(model: Path, *more: object, sets: tuple[str, ...] = SETS, method: str = "full") -> Ran:
    return run_cli("finetune", model, *sets, "--method", method, *FEW, *MEASURED, *more)


def tables(workspace: Path) -> list[Path]:
    found = [path for path in (workspace / "evaluation").glob("*-then-*") if not path.name.startswith(".")]
    return sorted(found, key=lambda path: path.name)


def without_sampling(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name in ("loss", "frechet", "accuracy")}


def test_the_table_is_what_separate_evaluations_say(model: Path, workspace: Path) -> None:
    said = then(model, "--metrics", "loss,frechet,accuracy")
    last = said.path
    assert read_manifest(last).data["name"] == "digits#5,6"
    middle = (last / read_manifest(last).parents[0].path).resolve()
    assert read_manifest(middle).data["name"] == "digits#3,4"
    assert (middle / read_manifest(middle).parents[0].path).resolve() == model.resolve()
    (table,) = tables(workspace)
    rows = json.loads((table / "metrics.json").read_text())
    assert [(row["after"], list(row["on"])) for row in rows] == [
        ("digits#3,4", ["digits#3,4"]),
        ("digits#5,6", ["digits#3,4", "digits#5,6"]),
    ]
    for row, tuned in zip(rows, (middle, last), strict=True):
        for on, found in row["on"].items():
            before = len(list((workspace / "evaluation").iterdir()))
            alone = run_cli("evaluate", tuned, "--data", on, *MEASURED, "--metrics", "loss,frechet,accuracy").path
            assert len(list((workspace / "evaluation").iterdir())) == before  # the very same artifact
            (measured,) = json.loads((alone / "metrics.json").read_text())
            assert without_sampling(measured) == found
    assert rows[1]["on"]["digits#3,4"]["frechet"]["protocol"]["labels"] == "3,4"
    assert CHANGE in said.err and "digits#5,6" in (table / "table.md").read_text()
    assert (table / "plots" / "frechet.png").is_file()
    # Again: nothing is made, and the table is shown.
    count = len(list(workspace.glob("*/*")))
    again = then(model, "--metrics", "loss,frechet,accuracy")
    assert again.path == last and CHANGE in again.err and len(list(workspace.glob("*/*"))) == count
    # The table's own manifest is a recipe of all of it.
    assert run_cli("finetune", "--recipe", table / "manifest.yaml").path == last


def test_the_bank_of_each_model_is_of_all_that_it_has_seen(model: Path, workspace: Path) -> None:
    said = then(model, "--bank-samples", 6, "--metrics", "loss", "--json", method="diff-tuning")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["kind"] for line in lines] == ["model", "model"]
    assert lines[1]["continual"][1]["after"] == "digits#5,6" and Path(lines[1]["evaluation"]) == tables(workspace)[0]
    drawn = []
    for line in lines:
        (bank,) = (parent for parent in read_manifest(Path(line["path"])).parents if parent.role == "bank")
        images = load_file((Path(line["path"]) / bank.path).resolve() / "images-00000.safetensors")
        drawn.append(sorted(set(images["labels"].tolist())))
    assert drawn == [[0, 1], [0, 1, 3, 4]]


def test_what_was_learned_before_may_be_retained_in_its_classes(model: Path, workspace: Path) -> None:
    options = ("--bank-samples", 6, "--metrics", "loss", "--json")
    said = then(model, *options, "--bank-labels", "own", method="diff-tuning")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [line["metrics"]["bank"]["labels"] for line in lines] == ["own", "own"]
    assert "--bank-labels own keeps classes" not in said.err
    assert "--bank-labels own keeps classes" in then(model, *options, method="diff-tuning").err
    assert "--bank-labels own keeps classes" not in then(model, "--metrics", "loss", method="full").err


def test_a_dry_run_shows_the_steps_and_makes_nothing(model: Path, workspace: Path) -> None:
    there = sorted(workspace.glob("*/*"))
    said = then(model, "--dry-run", "--json", "--then", "digits#3,4", method="diff-tuning")
    steps = [json.loads(line) for line in said.out.splitlines()]
    assert [step["on"] for step in steps] == ["digits#3,4", "digits#5,6", "digits#3,4"]
    assert [step["then_measured_on"] for step in steps] == [
        ["digits#3,4"],
        ["digits#3,4", "digits#5,6"],
        ["digits#3,4", "digits#5,6"],
    ]
    assert steps[0]["from"] == str(model) and steps[1]["from"] == "the model of step 1"
    assert all(step["config"]["steps"] == 2 for step in steps)
    assert sorted(workspace.glob("*/*")) == there


@pytest.mark.parametrize(
    ("wrong", "code", "said"),
    [
        ("digits#5,x", 2, "no class 'x'"),
        ("photos", 3, "3x"),
        ("folder:/nowhere", 3, "/nowhere"),
    ],
)
def test_a_wrong_set_is_named_before_anything_runs(
    wrong: str, code: int, said: str, model: Path, workspace: Path
) -> None:
    there = sorted(workspace.glob("*/*"))
    refused = then(model, sets=("--data", "digits#3,4", "--then", wrong), method="diff-tuning")
    assert refused.code == code and said in refused.err and refused.out == ""
    assert sorted(workspace.glob("*/*")) == there


def test_options_that_do_not_go_together(model: Path) -> None:
    refused = run_cli("finetune", model, "--data", "digits#3", "--samples", 20)
    assert refused.code == 2 and "--samples goes with --then" in refused.err
    refused = run_cli("finetune", model, "--then", "digits#3")
    assert refused.code == 2 and "--data" in refused.err
    refused = then(model, "--control", "edge")
    assert refused.code == 2 and "--control" in refused.err


def test_sets_of_other_classes_are_not_asked_for(model: Path, tmp_path: Path, workspace: Path) -> None:
    for place, names in (("one", ("apple", "pear")), ("two", ("cat", "dog"))):
        for name in names:
            for number in range(5):
                (tmp_path / place / name).mkdir(exist_ok=True, parents=True)
                PIL.Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(
                    tmp_path / place / name / f"{number}.png"
                )
    one, two = (f"folder:{tmp_path / place}" for place in ("one", "two"))
    said = then(model, "--metrics", "loss", sets=("--data", one, "--then", two, "--then", one))
    assert said.code == 0 and f"not measured on {one}: its classes are others" in said.err
    rows = json.loads((tables(workspace)[0] / "metrics.json").read_text())
    assert [list(row["on"]) for row in rows] == [[one], [two], [one]]


def test_interrupted_between_two_measurements(model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = evaluate.STAGE.run

    def stopped(job: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted("interrupted", saved=True)
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "STAGE", __import__("dataclasses").replace(evaluate.STAGE, run=stopped))
        first = then(model, "--metrics", "loss")
        assert first.code == 75 and first.out == "" and tables(workspace) == []
    assert then(model, "--metrics", "loss").code == 0
    assert len(tables(workspace)) == 1


@pytest.mark.slow
def test_killed_in_the_middle_and_run_again(model: Path, workspace: Path, tmp_path: Path) -> None:
    """The last model and the table are those of a run that nothing disturbs."""
    command = ("finetune", model, *SETS, "--method", "diff-tuning", "--bank-samples", 6, *MEASURED, "--metrics", "loss")
    command += ("--steps", 40, "--batch-size", 8, "--eval-every", 0, "--save-every", 2)
    process = subprocess.Popen(
        command_line(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    )
    deadline_s = time.monotonic() + 180
    while not list(workspace.glob("model/.*diff-tuning*diff-tuning*.partial")):  # the second one has begun
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = run_cli(*command)
    unbroken = run_cli(*command, "--workspace", tmp_path / "other")
    assert weights(resumed.path) == weights(unbroken.path)
    mine, theirs = (
        json.loads((tables(root)[0] / "metrics.json").read_text()) for root in (workspace, tmp_path / "other")
    )
    assert mine == theirs


def test_the_change_is_of_the_last_value() -> None:
    def of(value: float) -> dict[str, dict[str, Any]]:
        return {"loss": {"value": value, "interval": [value - 0.01, value + 0.01]}}

    columns, lines = table_of("loss", ["a", "b", "a"], [{"a": of(0.5)}, {"a": of(0.75), "b": of(0.3)}, {"a": of(0.25)}])
    assert columns == ["after", "a", "b"]
    assert [line[0] for line in lines] == ["1. a", "2. b", "3. a", CHANGE]
    assert lines[3][1].startswith("-0.25") and lines[3][2] == "-"
    assert lines[0][2] == "-" and lines[1][2].startswith("0.3")


def test_photographs_by_their_loss(workspace: Path) -> None:
    made = run_cli("init", "--method", "he", "--model", "dit-nano/8", "--depth", 1, "--data", "photos#cat").path
    few = ("--steps", 1, "--batch-size", 4, "--eval-every", 0)
    sets = ("--data", "photos#cat", "--then", "photos#rocket")
    said = run_cli("finetune", made, *sets, "--method", "full", *few)
    assert said.code == 0
    rows = json.loads((tables(workspace)[0] / "metrics.json").read_text())
    assert [list(row["on"]) for row in rows] == [["photos#cat"], ["photos#cat", "photos#rocket"]]
    assert all(list(found) == ["loss"] for row in rows for found in row["on"].values())
