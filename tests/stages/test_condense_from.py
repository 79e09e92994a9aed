"""`condense --from`: the learngene of an existing dense model."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import child_environment, command_line, run_cli, weights, whole
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.errors import EXIT_USAGE, FinectlError
from finectl.models.io import load_model, read_config
from finectl.models.presets import LAYER_TYPES
from finectl.training.log import read_log

FAST = ("--cp-iterations", 5)
SMALL = ("--batch-size", 8, "--eval-every", 0)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weigh by the inputs of a few images."""
    from finectl.training import moments

    monkeypatch.setattr(moments.input_moments, "__kwdefaults__", {"images": 64, "between": None})


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 8, 8, generator=random), torch.tensor([0, 300, 600, 999]), torch.tensor([1, 2, 3, 10])


@pytest.mark.parametrize("weighting", ["inputs", "none"])
def test_with_rank_enough_the_model_comes_back(chain: Any, few_images: None, weighting: str) -> None:
    """Three layers of width 64 have 192 singular vectors at most."""
    # A rate at which the gates of all layers open within a few updates.
    options = ("--steps", 20, "--lr", 2e-2, "--warmup-steps", 0, "--ema", 0, *SMALL)
    ancestor = run_cli("train", chain.model, *options).path
    models = []
    for rank in (192, 4):
        options = ("--rank", rank, "--overcomplete", "--cp-weighting", weighting, *FAST)
        condensed = whole(run_cli("condense", "--from", ancestor, "--steps", 0, *options).path)
        assert condensed.kind == "condensed" and condensed.name.startswith(f"dit-nano-l3-r{rank}-cp-")
        learngene = run_cli("extract", condensed.path).path
        models.append(run_cli("init", learngene, "--tune-steps", 0).path)
    with torch.no_grad():
        before, enough, little = (load_model(open_artifact(p)).eval()(*inputs()) for p in (ancestor, *models))
    assert float((enough - before).norm() / before.norm()) < 1e-4
    assert float((little - before).norm() / before.norm()) > 1e-2
    source, result = load_tensors(ancestor / "ema.safetensors"), load_tensors(condensed.path / "model.safetensors")
    for name, value in source.items():  # what is no matrix of a block is copied
        if name in result:
            assert torch.equal(result[name], value), name


def test_what_is_reported(chain: Any, few_images: None) -> None:
    ran = run_cli("condense", "--from", chain.model, "--rank", 8, *FAST)
    manifest = read_manifest(ran.path)
    assert manifest.cost.items() >= {"steps": 0, "samples": 0}.items()
    assert [(p.role, Path(ran.path, p.path).resolve().name) for p in manifest.parents] == [
        ("ancestor", chain.model.name)
    ]
    fit = manifest.metrics["fit"]
    assert set(fit) == set(LAYER_TYPES) and all(len(row["layers"]) == 3 for row in fit.values())
    assert "Relative error of the fit" in ran.err
    for kind, row in fit.items():
        assert 0 < row["error"] < row["weights"] and row["sweeps"] <= 5
        assert f"| {kind} " in ran.err and f"{row['error']:.3f}" in ran.err
    plain = read_manifest(run_cli("condense", "--from", chain.model, "--rank", 8, "--cp-weighting", "none", *FAST).path)
    for kind, row in plain.metrics["fit"].items():
        assert row["error"] == pytest.approx(row["weights"], rel=1e-6)
        assert row["weights"] < fit[kind]["weights"], "unweighted, the error of the weights is what is minimised"
    assert manifest.config["model"] == "dit-nano" and manifest.config["depth"] == 3
    assert not (ran.path / "log.jsonl").exists() and not (ran.path / "ema.safetensors").exists()


def test_distillation_and_training_are_one_run(chain: Any, few_images: None) -> None:
    steps = ("--distill-steps", 4, "--steps", 3)
    ran = run_cli("condense", "--from", chain.model, *steps, "--batch-size", 8, *FAST)
    manifest = read_manifest(ran.path)
    assert manifest.cost.items() >= {"steps": 7, "samples": 56}.items()
    assert manifest.config["distill_steps"] == 4 and manifest.config["steps"] == 3
    entries = read_log(ran.path / "log.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 8))
    assert (ran.path / "ema.safetensors").exists()
    loss = {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
    assert loss[2] < 0.5 < loss[6], "a hardly trained ancestor is soon matched, the noise is not"


def test_it_repeats_bit_for_bit(chain: Any, few_images: None, fast_disk: Path) -> None:
    arguments = ("condense", "--from", chain.model, "--rank", 80, "--overcomplete", "--distill-steps", 2, *SMALL, *FAST)
    first = run_cli(*arguments).path
    assert weights(first) == weights(run_cli(*arguments, "--workspace", fast_disk / "other").path)
    moved = chain.model.rename(chain.model.with_name("moved"))
    again = run_cli(*[moved if argument == chain.model else argument for argument in arguments])
    assert again.path == first and "already there" in again.err, "where the ancestor lies does not matter"


def test_init_takes_whole_layers(chain: Any, few_images: None) -> None:
    condensed = run_cli("condense", "--from", chain.model, *FAST).path
    learngene = run_cli("extract", condensed).path
    for options, rule in (((), "nearest"), (("--sigma", "interpolated"), "interpolated")):
        made = run_cli("init", learngene, "--depth", 2, "--tune-steps", 0, *options).path
        assert read_manifest(made).config["sigma"] == rule
    state, curves = (
        load_tensors(run_cli("init", learngene, "--depth", 2, "--tune-steps", 0).path / "model.safetensors"),
        load_tensors(learngene / "curves.safetensors"),
    )
    factors = load_tensors(learngene / "learngene.safetensors")
    for target, layer in ((0, 0), (1, 2)):
        built = (factors["qkv.U"] * curves["sigma.qkv"][layer]) @ factors["qkv.V"].t()
        torch.testing.assert_close(state[f"blocks.{target}.attn.qkv.weight"], built)
        assert torch.equal(state[f"blocks.{target}.attn.qkv.bias"], curves["bias.qkv"][layer])
    assert read_manifest(run_cli("init", chain.learngene, "--tune-steps", 0).path).config["sigma"] == "interpolated"


def test_part_of_the_types_can_be_fitted(chain: Any) -> None:
    options = ("--factorize", "qkv,out", "--cp-weighting", "none", *FAST)
    path = run_cli("condense", "--from", chain.model, *options).path
    state, source = load_tensors(path / "model.safetensors"), load_tensors(chain.model / "ema.safetensors")
    assert "factors.qkv.U" in state and "blocks.0.attn.qkv.weight" not in state
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], source["blocks.1.mlp.fc1.weight"])
    factors = read_config(open_artifact(path)).factorized  # type: ignore[union-attr]
    assert factors is not None and factors.types == ("qkv", "out")


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--from", "CONDENSED"), 3, "condensed"),
        (("--from", "LEARNGENE"), 3, "learngene"),
        (("--from", "nowhere"), 3, "nowhere"),
        (("--from", "MODEL", "--rank", 65), 2, "--overcomplete"),
        (("--from", "MODEL", "--model", "dit-s"), 2, "dit-nano, which comes from the model"),
        (("--from", "MODEL", "--depth", 4), 2, "leave --depth out"),
        (("--from", "MODEL", "--sigma-sharing", 2), 2, "--sigma-sharing"),
        (("--from", "MODEL", "--factorize", "qvk"), 2, "did you mean"),
        (("--from", "MODEL", "--data", "photos"), 3, "expected"),
        (("--distill-steps", 5), 2, "--from MODEL"),
        (("--steps", 0), 2, "--from"),
    ],
)
def test_what_does_not_go_together(chain: Any, options: tuple[Any, ...], code: int, said: str) -> None:
    places = {"MODEL": chain.model, "CONDENSED": chain.condensed, "LEARNGENE": chain.learngene}
    ran = run_cli("condense", *(places.get(option, option) for option in options))
    assert ran.code == code, ran.err
    assert said in ran.err and ran.out == "" and "Traceback" not in ran.err


def test_the_same_model_named_is_no_contradiction(chain: Any) -> None:
    options = ("--model", "DiT-nano/2", "--depth", 3, "--dry-run", "--json")
    assert run_cli("condense", "--from", chain.model, *options).code == 0


def test_finished_types_are_not_fitted_again(chain: Any, few_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.training import ancestor

    arguments = ("condense", "--from", chain.model, "--rank", 8, *FAST)
    real, calls = ancestor.decompose, []

    def fail_in_the_third(*given: Any, **options: Any) -> Any:
        calls.append(given[0].shape)
        if len(calls) == 3:
            raise MemoryError("of the test")
        return real(*given, **options)

    monkeypatch.setattr(ancestor, "decompose", fail_in_the_third)
    assert run_cli(*arguments).code == 6
    resumed = run_cli(*arguments).path
    assert len(calls) == 6, "three types were left, after one that failed"
    monkeypatch.undo()
    monkeypatch.setenv("FINECTL_WORKSPACE", str(chain.root))
    assert not (resumed / "state").exists()


def saved_step(workspace: Path) -> int:
    for state in workspace.glob("condensed/.*.partial/state/training.safetensors"):
        try:
            return int(read_metadata(state)["step"])
        except FinectlError:  # replaced or published at this very moment
            return 0
    return 0


# In the distillation, and in the training after it.
@pytest.mark.parametrize("step", [pytest.param(8, marks=pytest.mark.slow), 26])
def test_killed_and_run_again(chain: Any, fast_disk: Path, step: int) -> None:
    import subprocess
    import time

    steps = ("--distill-steps", 20, "--steps", 20, "--save-every", 2, "--batch-size", 16, "--lr-schedule", "cosine")
    arguments = ("condense", "--from", chain.model, "--rank", 16, "--eval-every", 15, *steps, *FAST)
    process = subprocess.Popen(
        command_line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    )
    deadline_s = time.monotonic() + 180
    while saved_step(chain.root) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = saved_step(chain.root)
    assert step <= reached < 40
    resumed = run_cli(*arguments)
    assert f"step={reached} steps=40" in resumed.err
    assert "stage=fitting" not in resumed.err, "the fit was done again"
    unbroken = run_cli(*arguments, "--workspace", fast_disk / "unbroken")
    assert "stage=fitting" in unbroken.err
    assert weights(whole(resumed.path).path) == weights(unbroken.path)


def test_repeated_layers_share_their_update() -> None:
    from finectl.initializers.expansion import place_curves
    from finectl.models.learngene import Learngene
    from finectl.models.presets import preset

    config = preset("dit-nano", image_size=8, channels=1, num_classes=10, depth=2)
    curve = torch.tensor([[1.0], [2.0]])
    learngene = Learngene(config, {}, {}, {"sigma.o": curve, "sigma.qkv": curve})
    placed = place_curves(learngene, 3, "nearest", 1.0)
    assert [float(placed[f"blocks.{i}.attn.qkv.sigma"]) for i in range(3)] == [1.0, 1.0, 2.0]
    assert [float(placed[f"blocks.{i}.attn.proj.sigma"]) for i in range(3)] == [0.5, 0.5, 2.0]
    shallower = place_curves(learngene, 1, "nearest", 1.0)
    assert float(shallower["blocks.0.attn.proj.sigma"]) == 1.0, "layers that are kept are kept as they are"


def test_weights_of_updates_that_distil_are_kept_too(chain: Any) -> None:
    arguments = ("condense", "--from", chain.model, "--rank", 8, "--cp-weighting", "none", "--cp-iterations", 1, *SMALL)
    path = run_cli(*arguments, "--distill-steps", 3, "--steps", 2, "--keep-every", 2).path
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == [
        "000002.safetensors",
        "000004.safetensors",
    ]
    refused = run_cli(*arguments, "--keep-every", 2)
    assert refused.code == EXIT_USAGE and "--keep-every" in refused.err
