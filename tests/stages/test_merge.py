"""`merge`: weights that are given, searches, controls, models that are no experts, refusals, interruptions."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CHEAP, Family
from support import run_cli, weights
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.candidates import Candidates
from finectl.models.io import load_model, load_weights, read_config
from finectl.stages.merge.searching import settled


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.made(tmp_path_factory.mktemp("merge"))


def state(path: Path) -> dict[str, Tensor]:
    return load_weights(open_artifact(path), "ema")


def expert(family: Family, index: int) -> dict[str, Tensor]:
    return load_tensors(family.experts / "experts" / str(index) / "ema.safetensors")


def test_weights_of_zero_are_the_base_around_identity_projections(family: Family) -> None:
    merged = state(family.merge(family.experts, "--weights", "0,0").path)
    base = state(family.base)
    for name, value in merged.items():
        wanted = base[name] if name in base else torch.eye(len(value)).view(value.shape)
        assert torch.equal(value, wanted), name
    assert any(name.startswith("projections.") for name in merged)


@pytest.mark.parametrize("index", [0, 1])
def test_one_hot_weights_are_that_expert(family: Family, index: int) -> None:
    merged = state(family.merge(family.experts, "--weights", ["1,0", "0,1"][index]).path)
    for name, value in expert(family, index).items():
        assert torch.equal(merged[name], value), name


def test_it_is_linear_in_the_weights(family: Family) -> None:
    merged = state(family.merge(family.experts, "--weights", "0.3,0.6").path)
    base, one, two = state(family.base), expert(family, 0), expert(family, 1)
    for name in base:
        wanted = base[name].double() + 0.3 * (one[name].double() - base[name]) + 0.6 * (two[name].double() - base[name])
        assert torch.allclose(merged[name].double(), wanted, atol=1e-6), name


def test_candidates_in_memory_equal_the_merged_file(family: Family) -> None:
    from finectl.adapters.projection import identity_state
    from finectl.models.io import build_model

    merged = open_artifact(family.merge(family.experts, "--weights", "0.3,0.6").path)
    config = read_config(merged)
    base = {**identity_state(config), **state(family.base)}
    candidates = Candidates(build_model(config), base, [expert(family, 0), expert(family, 1)], torch.device("cpu"))
    candidates.at((1.0, 1.0))  # what was asked before plays no part
    made = candidates.at((0.3, 0.6)).state_dict()
    for name, value in load_weights(merged, "raw").items():
        assert torch.allclose(made[name], value, atol=1e-6), name
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([1, 900]), torch.tensor([0, 10])
    assert torch.allclose(candidates.model(x, t, y), load_model(merged).eval()(x, t, y), atol=1e-5)


def test_without_arguments_the_newest_experts_are_searched_and_said(family: Family) -> None:
    ran = family.merge("--ranges", 2, *CHEAP)
    assert ran.code == 0, ran.err
    assert str(family.experts) in ran.err and str(family.base) in ran.err and "9 candidates" in ran.err
    manifest = read_manifest(ran.path)
    assert manifest.config["search"] == "grid" and manifest.config["objective"] == "frechet"
    metrics = manifest.metrics
    assert metrics["candidates_measured"] == 9 and metrics["samples_measured"] == 24 * (9 + 5)
    assert manifest.cost["samples"] == 0, "images that are generated are none that a model has seen"
    lines = [json.loads(line) for line in (ran.path / "search.jsonl").read_text().splitlines()]
    values = [line for line in lines if "value" in line]
    assert len([line for line in values if line["noise"] == 0]) == 9
    assert len([line for line in values if line["noise"] == 1]) == 5
    rows = {row["name"]: row for row in metrics["controls"]}
    assert {"merged", "theta_0", "equal shares", "sum", "ensemble"} <= set(rows)
    assert len([name for name in rows if name.startswith("expert ")]) == 2
    assert rows["merged"]["weights"] == metrics["weights"]
    assert rows["merged"]["value"] == pytest.approx(metrics["value"])
    assert len(metrics["task_vector_cosines"]) == 2
    again = family.merge("--ranges", 2, *CHEAP)
    assert again.path == ran.path and "already there" in again.err


@pytest.mark.parametrize("search", ["coarse-to-fine", "surrogate"])
def test_other_searches(family: Family, search: str) -> None:
    ran = family.merge(family.experts, "--search", search, "--objective", "loss", *CHEAP)
    assert ran.code == 0, ran.err
    metrics = read_manifest(ran.path).metrics
    assert metrics["objective"] == "loss" and 0 < metrics["candidates_measured"] <= 9


def test_an_interrupted_search_goes_on(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.metrics import measuring

    calls: list[int] = []
    real = measuring.Measuring.__call__

    def failing(self: Any, model: Any, samples: int, noise: int) -> Any:
        calls.append(noise)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, model, samples, noise)

    options = (family.experts, *CHEAP, "--objective", "loss", "--seed", 7)
    whole = tmp_path / "whole"
    shutil.copytree(family.root, whole, symlinks=True)
    wanted = run_cli("merge", *options, "--workspace", whole).path
    monkeypatch.setattr(measuring.Measuring, "__call__", failing)
    with pytest.raises((KeyboardInterrupt, SystemExit, AssertionError)):
        assert run_cli("merge", *options, "--workspace", family.root).code == 0
    monkeypatch.setattr(measuring.Measuring, "__call__", real)
    before = len(calls)
    made = run_cli("merge", *options, "--workspace", family.root).path
    assert before == 4
    assert weights(made)["model.safetensors"] == weights(wanted)["model.safetensors"]
    lines = [json.loads(line) for line in (made / "search.jsonl").read_text().splitlines()]
    values = [(tuple(line["candidate"]), line["noise"]) for line in lines if "value" in line]
    assert len(values) == len(set(values)), "nothing is measured twice"


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "dare"])
def test_any_models_of_one_base(family: Family, method: str) -> None:
    options = ("--base", family.base, "--method", method, "--density", 0.5, "--weights", "0.5,0.5")
    made = family.merge(*family.models, *options).path
    manifest = read_manifest(made)
    assert [parent.role for parent in manifest.parents] == ["model", "model", "base"]
    merged, base = state(made), state(family.base)
    moved = torch.cat([(merged[name] - base[name]).flatten() for name in base])
    assert bool(moved.any())
    if method != "task-arithmetic":
        assert float((moved == 0).double().mean()) > 0.1
    again = family.merge("--recipe", made)
    assert again.path == made, again.err


def test_a_mean_needs_no_base(family: Family) -> None:
    merged = state(family.merge(*family.models, "--method", "linear", "--weights", "1,3").path)
    one, two = map(state, family.models)
    for name in merged:
        assert torch.allclose(merged[name], 0.25 * one[name] + 0.75 * two[name], atol=1e-6), name


def test_blocks_with_weights_of_their_own_and_another_type(family: Family) -> None:
    options = ("--base", family.base, "--weights", "0,0", "--block-weights", "blocks.1=1,0")
    made = family.merge(*family.models, *options, "--output-dtype", "bfloat16").path
    merged, base, one = load_tensors(made / "model.safetensors"), state(family.base), state(family.models[0])
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, (one if name.startswith("blocks.1.") else base)[name].bfloat16()), name


def test_the_cost_counts_all_that_was_merged_and_the_base_once(family: Family) -> None:
    merged = family.merge(*family.models, "--base", family.base, "--weights", "1,1").path
    ran = run_cli("evaluate", merged, "--metrics", "loss", "--draws", 1, "--workspace", family.root)
    assert read_manifest(ran.path).metrics["models"][0]["steps"] == 9


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--weights", "1"), EXIT_USAGE, "2 models"),
        (("--weights", "1,nan"), EXIT_USAGE, "not finite"),
        (("--weights", "1,x"), EXIT_USAGE, "no list of numbers"),
        (("--ranges", 4), EXIT_USAGE, "finetune-ranges --ranges 4"),
        (("--method", "ties"), EXIT_INPUT, "kind"),
        (("--weights", "1,1", "--block-weights", "block.1=1,1"), EXIT_USAGE, "did you mean 'blocks.1'"),
        (("--block-weights", "blocks.1=1,1"), EXIT_USAGE, "--weights"),
        (("--objective", "fidd"), EXIT_USAGE, "did you mean 'fid'"),
        (("--objective", "psnr"), EXIT_USAGE, "pair"),
        (("--grid-min", 1, "--grid-max", 0), EXIT_USAGE, "between"),
    ],
)
def test_what_is_wrong_is_refused(family: Family, options: tuple[object, ...], code: int, words: str) -> None:
    source = family.models[0] if "ties" in options else family.experts
    ran = family.merge(source, *options)
    assert ran.code == code and ran.out == "" and words in ran.err, ran.err


def test_experts_whose_base_is_gone_are_refused(family: Family, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(family.root, root, symlinks=True)
    shutil.rmtree(root / family.base.relative_to(family.root))
    ran = run_cli("merge", root / family.experts.relative_to(family.root), "--weights", "1,1", "--workspace", root)
    assert ran.code == EXIT_INPUT and "gone" in ran.err


def test_models_of_two_architectures_are_refused(family: Family) -> None:
    place = ("--workspace", family.root)
    other = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 3, *place).path
    ran = family.merge(family.models[0], other, "--base", family.base, "--weights", "1,1")
    assert ran.code == EXIT_INPUT and "depth 2 and 3" in ran.err


def test_a_full_disk_leaves_nothing(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    ran = family.merge(family.experts, "--weights", "0.7,0.7")
    assert ran.code == 6, ran.err
    monkeypatch.undo()
    assert family.merge(family.experts, "--weights", "0.7,0.7").code == 0


def test_nothing_to_fold_is_said(family: Family) -> None:
    ran = family.merge(*family.models, "--base", family.base, "--weights", "1,1", "--fold")
    assert ran.code == EXIT_USAGE and "no projections" in ran.err


def test_a_control_that_is_better_than_what_the_search_found_is_the_merged_model() -> None:
    def row(name: str, weights: list[float] | None, value: float) -> dict[str, Any]:
        return {"name": name, "weights": weights, "value": value}

    found, theta_0 = row("merged", [0.3, 0.1], 2.0), row("theta_0", [0.0, 0.0], 1.5)
    rows = [found, theta_0, row("sum", [1.0, 1.0], math.nan), row("ensemble", None, 1.0)]
    less = settled(rows, 1)
    assert less[0] == {**theta_0, "name": "merged"}, "the ensemble is no merged model"
    assert less[1] == {**found, "name": "best of the search"} and less[2:] == rows[1:]
    assert settled(rows, -1) == rows, "where more is better"
