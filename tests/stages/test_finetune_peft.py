"""Fine-tuning of few parameters, end to end: every method, what takes its result, resumption, and the export."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Ran, run_cli, weights, whole

from finectl.artifacts.tensors import load_tensors
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.io import load_any_model, read_config
from finectl.models.presets import DiTConfig
from finectl.training import run as training_run

OTHERS = ("--data", "digits#5,6,7,8,9")
RUN = (*OTHERS, "--retention", "none", "--steps", 2, "--batch-size", 8, "--eval-every", 0)
METHODS = ("lora", "difffit", "bitfit", "adaptformer", "vpt")
STAY = {"adaptformer": "bottleneck", "vpt": "prompts"}


@pytest.fixture(scope="session")
def _model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("peft") / "artifacts"
    place = ("--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, *place).path
    model = run_cli("train", start, "--steps", 3, "--lr", 1e-2, "--batch-size", 8, "--eval-every", 0, *place).path
    tuned = {method: run_cli("finetune", model, *RUN, "--peft", method, *place).path for method in METHODS}
    return root, model, tuned


@pytest.fixture
def made(_model: tuple[Path, Path, dict[str, Path]], workspace: Path) -> Iterator[tuple[Path, dict[str, Path]]]:
    """A workspace of the test's own with a model, and what each method makes of it."""
    root, model, tuned = _model
    shutil.copytree(root, workspace, symlinks=True)
    yield (
        workspace / model.relative_to(root),
        {name: workspace / path.relative_to(root) for name, path in tuned.items()},
    )


def finetune(*options: object, code: int = 0) -> Ran:
    ran = run_cli("finetune", *options)
    assert ran.code == code, ran.err
    return ran


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_a_model_like_any_other(method: str, made: tuple[Path, dict[str, Path]]) -> None:
    model, tuned = made
    artifact = whole(tuned[method])
    config = read_config(artifact)
    assert isinstance(config, DiTConfig)
    assert bool(config.extras) == (method in STAY)
    network = load_any_model(artifact)
    metrics = artifact.manifest.metrics
    assert metrics["parameters"] == sum(value.numel() for value in network.parameters())
    assert 0 < metrics["trainable_parameters"] < metrics["parameters"] / 4
    before, after = load_tensors(model / "ema.safetensors"), load_tensors(tuned[method] / "ema.safetensors")
    assert set(before) <= set(after)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(before["x_embedder.proj.weight"], after["x_embedder.proj.weight"])
    assert after["blocks.0.attn.qkv.weight"].dtype == torch.float32
    assert run_cli("sample", artifact.path, "--samples", 2, "--sampling-steps", 2).code == 0


@pytest.mark.parametrize("method", STAY)
def test_parts_that_stay_are_measured_and_merged_and_else_refused(
    method: str, made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    _, tuned = made
    path = tuned[method]
    evaluated = run_cli("evaluate", path, "--metrics", "loss", "--draws", 1)
    assert evaluated.code == 0, evaluated.err
    other = finetune(path, *RUN, "--peft", method, "--seed", 1).path
    merged = run_cli("merge", path, other, "--method", "linear", "--weights", "0.5,0.5").path
    assert read_config(whole(merged)) == read_config(whole(path))
    for command in (
        ("condense", "--from", path),
        ("convert", path, "--to", "dit"),
        ("convert", path, "--to", "diffusers"),
    ):
        refused = run_cli(*command, "--out", tmp_path / "out")
        assert refused.code == EXIT_INPUT, refused.err
        assert "beside its layers" in refused.err
        assert "--peft lora or difffit" in refused.err


@pytest.mark.parametrize("method", ["lora", "vpt"])
def test_killed_and_resumed_it_is_the_same(
    method: str, made: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: Any
) -> None:
    command = (made[0], *RUN, "--peft", method, "--steps", 4, "--save-every", 1, "--workspace")
    unbroken = weights(finetune(*command, tmp_path / "a").path)
    step_of = training_run.train_step

    def broken(run: Any, step: int) -> Any:
        if step == 2:
            raise RuntimeError("power cut")
        return step_of(run, step)

    with monkeypatch.context() as patched:
        patched.setattr("finectl.training.loop.train_step", broken)
        assert run_cli("finetune", *command, tmp_path / "b").code == 1
    (state,) = (tmp_path / "b").rglob("training.safetensors")
    saved = load_tensors(state)
    assert not any("x_embedder" in name for name in saved)
    resumed = finetune(*command, tmp_path / "b")
    assert "step=2 steps=4" in resumed.err
    assert weights(resumed.path) == unbroken


def test_lora_goes_with_checkpointing_and_parts_of_a_batch(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    command = (made[0], *RUN, "--peft", "lora", "--method", "full")
    options = [option for option in command if option not in ("--retention", "none")]
    plain = load_tensors(finetune(*options, "--workspace", tmp_path / "a").path / "model.safetensors")
    ran = finetune(*options, "--workspace", tmp_path / "b", "--grad-checkpointing", "--accumulate", 2)
    other = load_tensors(ran.path / "model.safetensors")
    assert all(torch.allclose(value, other[name], atol=2e-5) for name, value in plain.items())


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_lora_is_compiled(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    ran = finetune(made[0], *RUN, "--peft", "lora", "--compile", "--workspace", tmp_path)
    assert sum(counters["stats"].values()) > 0, "nothing was compiled"
    compiled, plain = (load_tensors(path / "model.safetensors") for path in (ran.path, made[1]["lora"]))
    assert plain.keys() == compiled.keys()
    assert all(torch.allclose(value, compiled[name], atol=1e-4) for name, value in plain.items())


def test_the_adapter_is_exported(made: tuple[Path, dict[str, Path]]) -> None:
    model, tuned = made
    exported = run_cli("convert", tuned["lora"], "--to", "peft").path
    assert whole(exported).kind == "export"
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (exported / name).read_bytes() == (tuned["lora"] / "adapter" / name).read_bytes()
    for path, options, code, says in (
        (model, (), EXIT_INPUT, "no adapter apart from its weights"),
        (tuned["lora"], ("--weights", "raw"), EXIT_USAGE, "--weights raw"),
    ):
        refused = run_cli("convert", path, "--to", "peft", *options)
        assert refused.code == code, refused.err
        assert says in refused.err


def test_parts_that_stay_are_trained_on_and_go_with_other_methods(made: tuple[Path, dict[str, Path]]) -> None:
    path = made[1]["vpt"]
    both = read_config(whole(finetune(path, *RUN, "--peft", "adaptformer", "--peft-set", "dim=8").path))
    assert isinstance(both, DiTConfig)
    assert (both.extras.prompts, both.extras.bottleneck) == (10, 8)
    again = whole(finetune(path, *RUN, "--peft", "vpt", "--peft-set", "labels=no").path)
    assert again.manifest.metrics["trainable_parameters"] == 2 * 10 * 64
    refused = finetune(path, *RUN, "--peft", "vpt", "--peft-set", "tokens=4", code=EXIT_USAGE)
    assert "--peft-set tokens=10" in refused.err
