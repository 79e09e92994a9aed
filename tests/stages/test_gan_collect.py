"""`finectl gen-weights collect`: end to end, in parts, by several processes, killed and resumed, diverging."""

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
import torch
from small_pairs import make_pairs
from support import child_environment, command_line, run_cli, weights, whole

from finectl.adapters.lora import attach_lora, load_lora
from finectl.adapters.weight_dataset import WeightDataset, open_weights
from finectl.artifacts.store import open_artifact
from finectl.errors import Interrupted
from finectl.models.gan.io import load_generator

QUICK = ("--batch-size", 4, "--steps", 10, "--checkpoints", 2, "--workers", 1)


@pytest.fixture
def made(workspace: Path) -> Iterator[Path]:
    """A workspace with small pairs and a base."""
    pairs = make_pairs(workspace)
    run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 3).path  # noqa: B018
    yield workspace


def collect(*more: object) -> Path:
    return run_cli("gen-weights", "collect", *QUICK, *more).path


def opened(path: Path) -> WeightDataset:
    return open_weights(whole(path))


def names(found: WeightDataset) -> list[str]:
    return [concept.name for concept in found.concepts]


def test_all_concepts_start_from_one_and_end_apart(made: Path) -> None:
    path = collect()
    found = opened(path)
    assert found.artifact.kind == "weight-dataset"
    assert names(found) == ["dark", "bright", "red", "flat", "pale"]  # inverted is reserved
    assert found.kept == (9, 10) and found.artifact.manifest.metrics["diverged"] == []
    start, dark, bright = found.initial, found.checkpoints("dark"), found.last("bright")
    assert list(start) == list(dark)
    for name, value in dark.items():
        assert value.shape == (2, *start[name].shape)
        assert torch.equal(start[name], torch.zeros_like(start[name])) == name.endswith("lora_B.weight")
    assert not torch.equal(dark["head.conv.lora_B.weight"][0], dark["head.conv.lora_B.weight"][1])
    assert not torch.equal(dark["head.conv.lora_B.weight"][1], bright["head.conv.lora_B.weight"])
    course = found.record("red")["losses"]
    assert found.record("red")["role"] == "train" and [step for step, _ in course["heldout_l1"]] == list(range(11))
    assert course["heldout_l1"][-1][1] < course["heldout_l1"][0][1]
    lines = [json.loads(line) for line in (path / "losses.jsonl").read_text().splitlines()]
    assert [line["concept"] for line in lines] == names(found)


def test_each_order_of_the_data_gives_weights_of_its_own(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.training.gan import adapting

    first, second = opened(collect("--only", "red")), opened(collect("--only", "red", "--seed", 1))
    trained: list[int] = []
    usual = adapting.Adapter.train

    def stopped(self: Any, concept: Any, start: Any, place: Any, order: int = 0) -> Any:
        trained.append(order)
        if len(trained) == 2:
            raise Interrupted("interrupted; the state is saved", saved=True)
        return usual(self, concept, start, place, order)

    monkeypatch.setattr(adapting.Adapter, "train", stopped)
    command = ("gen-weights", "collect", *QUICK, "--only", "red", "--orders", 2)
    assert run_cli(*command).code == 75
    both = opened(run_cli(*command).path)
    assert trained == [0, 1, 1], "the order that was finished is not trained again"
    assert both.kept == (9, 10, 9, 10) and both.artifact.manifest.cost["steps"] == 20
    for name, value in both.checkpoints("red").items():
        assert torch.equal(value, torch.cat([each.checkpoints("red")[name] for each in (first, second)]))
    record = both.record("red")
    assert [record["losses"], *record["further_losses"]] == [each.record("red")["losses"] for each in (first, second)]


def test_the_weights_are_of_the_base_and_answer_as_measured(made: Path) -> None:
    """In a fresh copy of the base, with statistics of its own, the last weights give the L1 that was logged."""
    from finectl.data.pairs import open_pairs
    from finectl.models.text import load_text
    from finectl.training.gan.pairs import PairStream, Texts, heldout_l1, recompute_on

    found = opened(collect("--only", "red"))
    base = found.artifact.manifest.parents[0]
    base_artifact = open_artifact((found.artifact.path / base.path).resolve())
    assert found.base == base.digest == base_artifact.manifest.digest
    pairs = open_pairs(open_artifact(next(made.glob("pairs/small-*"))))
    generator = attach_lora(load_generator(base_artifact), found.layers)
    load_lora(generator, found.layers, found.last("red"))
    assert found.text is not None
    concept = next(concept for concept in found.concepts if concept.name == "red")
    texts, cpu = Texts.of(load_text(found.text), [concept.texts]), torch.device("cpu")
    batch = int(found.artifact.manifest.config["batch_size"])
    recompute_on(generator, PairStream(pairs, pairs.rows("train"), ("red",), texts, batch, 0, cpu))
    measured = heldout_l1(pairs, pairs.rows("val"), ("red",), texts, torch.device("cpu"))(generator)
    assert measured == found.record("red")["losses"]["heldout_l1"][-1][1]


def test_parts_are_put_together_and_nothing_is_trained_twice(made: Path) -> None:
    first, second = collect("--shard", "1/2"), collect("--shard", "2/2")
    assert open_artifact(first).kind == "weight-shard"
    assert (names(opened(first)), names(opened(second))) == (["dark", "red", "pale"], ["bright", "flat"])
    ran = run_cli("gen-weights", "collect", *QUICK)
    assert "5 concepts are taken" in ran.err and "at a time" not in ran.err
    found = opened(ran.path)
    assert names(found) == ["dark", "bright", "red", "flat", "pale"]
    for part in (first, second):
        for name, content in weights(part).items():
            assert (ran.path / name).read_bytes() == content
    # Other settings are another collection, which takes nothing from these.
    assert "are taken" not in run_cli("gen-weights", "collect", *QUICK, "--only", "red", "--lora-seed", 1).err
    extra = run_cli("gen-weights", "collect", *QUICK, "--roles", "test,train")
    assert "4 concepts are taken" in extra.err and names(opened(extra.path))[-1] == "inverted"


def test_the_number_of_processes_changes_no_bit(made: Path) -> None:
    alone = collect("--out", made / "alone", "--roles", "val,test")
    two = run_cli(
        *("gen-weights", "collect", *QUICK[:-1], 2, "--force", "--roles", "val,test", "--out", made / "two"),
        *("--workspace", made),
    ).path
    assert weights(alone) == weights(two)


def test_a_concept_that_diverges_is_left_out(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.training.gan import adapting

    usual = adapting.PairStream.__call__

    def broken(self: adapting.PairStream, step: int) -> object:
        batch = usual(self, step)
        if self.concepts == ("red",) and step > 3:
            batch.x.fill_(float("nan"))
        return batch

    monkeypatch.setattr(adapting.PairStream, "__call__", broken)
    ran = run_cli("gen-weights", "collect", *QUICK, "--roles", "train")
    found = opened(ran.path)
    assert found.artifact.manifest.metrics["diverged"] == ["red"] and "red diverged" in ran.err
    assert names(found) == ["dark", "bright", "flat"]
    alone = run_cli("gen-weights", "collect", *QUICK, "--only", "red")
    assert alone.code == 5 and "every concept diverged" in alone.err


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_interrupted_equals_unbroken(made: Path, workers: int) -> None:
    options = ("--batch-size", 4, "--steps", 40, "--checkpoints", 2, "--roles", "train,test", "--eval-every", 0)
    command = ("gen-weights", "collect", *options, "--save-every", 5, "--workers", workers)
    unbroken = run_cli(*command, "--out", made / "unbroken").path
    out, staging = made / "parts", made / ".parts.partial"

    def run_until(number: int, seen: object) -> int:
        process = subprocess.Popen(
            command_line(*command, "--out", out, "--workspace", made / "elsewhere", *inputs),
            env=child_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        limit = time.monotonic() + 120
        while not seen() and time.monotonic() < limit:  # type: ignore[operator]
            time.sleep(0.005)
        os.kill(process.pid, number)
        return process.wait(timeout=60)

    inputs = (next(made.glob("gan/nano-*")), "--pairs", next(made.glob("pairs/small-*")))
    finished = staging / "concepts"
    assert run_until(signal.SIGKILL, lambda: list(staging.glob("state/*/0/gan.safetensors"))) == -signal.SIGKILL
    assert run_until(signal.SIGINT, lambda: list(finished.glob("[a-z]*.safetensors"))) == 75
    done = {file.name: file.stat().st_mtime_ns for file in finished.glob("[a-z]*.safetensors")}
    assert done
    resumed = run_cli(*command, "--out", out, "--workspace", made / "elsewhere", *inputs).path
    assert weights(resumed) == weights(unbroken)
    assert all((resumed / "concepts" / name).stat().st_mtime_ns == when for name, when in done.items())


def test_what_it_refuses(made: Path) -> None:
    for more, word in (
        (("--shard", "3/2"), "such as 1/4"),
        (("--shard", "1/2", "--only", "red"), "both given"),
        (("--only", "rde"), "did you mean 'red'"),
        (("--roles", "trian"), "did you mean 'train'"),
        (("--ranks", "2,stam=1"), "did you mean 'stem'"),
        (("--checkpoints", 5), "at most 2"),
    ):
        refused = run_cli("gen-weights", "collect", *QUICK, *more)
        assert refused.code == 2 and word in refused.err, refused.err
    other = make_pairs(made, size=32)
    assert "images of 16 pixels" in run_cli("gen-weights", "collect", *QUICK, "--pairs", other).err


def test_a_subset_stands_for_all(made: Path) -> None:
    plan = json.loads(run_cli("gen-weights", "collect", *QUICK, "--subset", 3, "--dry-run", "--json").out)
    assert plan["training_pairs"] == 3 and plan["updates"] == 50
    found = opened(collect("--subset", 3, "--only", "red"))
    assert len(found.config["rows"]) == 3 and set(found.config["rows"]) <= set(range(8))
