"""What `--dry-run` says that training takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, settings
from support import ROOT, run_cli
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.artifacts.job import Execution
from finectl.diffusion.random import generator_for
from finectl.models.dit import DiT, initialize_
from finectl.models.extras import Extras
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, preset
from finectl.training.estimate import activation_bytes, forward_flops, measure_training, training_estimate

BASE = DiTConfig(64, 4, 4, 2, 16, 3, 10)
LATENTS: dict[str, Any] = {"image_size": 32, "channels": 4, "num_classes": 1000}


def memory(config: DiTConfig = BASE, batch_size: int = 32, **execution: Any) -> int:
    return int(training_estimate(config, settings(batch_size=batch_size), Execution(**execution))["memory_bytes"])


def launched(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(size)), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)


def test_parameters_of_the_published_sizes() -> None:
    dense = preset("dit-b", learn_sigma=True, **LATENTS)
    assert count_parameters(dense)["total"] == 130_315_808
    factorized = replace(dense, factorized=FactorConfig(("qkv", "o", "in", "out", "adaln"), 768))
    assert count_parameters(factorized)["factors"] == 13_565_952
    estimate = training_estimate(dense, settings())
    assert estimate["parameters"] == 130_315_808
    assert estimate["disk_bytes"] == 6 * 4 * 130_315_808


def test_the_disk_holds_what_is_kept_of_earlier_updates() -> None:
    parameters = count_parameters(BASE)["total"]
    for every, copies in ((0, 6), (1, 15), (3, 9), (5, 7), (9, 7), (10, 6), (11, 6)):
        assert training_estimate(BASE, settings(steps=10, keep_every=every))["disk_bytes"] == copies * 4 * parameters


def test_memory_of_the_weights() -> None:
    """Weights, gradients, two moments and the average, in float32, whatever the batch."""
    parameters = count_parameters(BASE)["total"]
    per_image = memory(batch_size=2) - memory(batch_size=1)
    assert memory(batch_size=1) - per_image == 20 * parameters


def test_memory_grows_with_what_is_kept() -> None:
    assert memory(batch_size=64) > memory()
    assert memory(replace(BASE, depth=8)) > memory()
    assert memory(replace(BASE, image_size=32)) > 3 * memory() - 3 * 20 * count_parameters(BASE)["total"]
    assert memory(dtype="bfloat16") < memory()
    assert memory(grad_checkpointing=True) < memory()
    assert memory(accumulate=2) < memory() and memory(accumulate=32) == memory(batch_size=1)


def test_checkpointing_keeps_one_block_and_the_inputs_of_the_others() -> None:
    for narrow in (False, True):
        kept = [activation_bytes(replace(BASE, depth=depth), narrow, checkpointed=True) for depth in (1, 2, 3)]
        full = [activation_bytes(replace(BASE, depth=depth), narrow, checkpointed=False) for depth in (1, 2, 3)]
        assert kept[1] - kept[0] == kept[2] - kept[1] == 4 * BASE.tokens * BASE.width
        assert full[1] == 2 * full[0] and full[2] == 3 * full[0]
        assert kept[2] < full[2]


def test_activations_are_of_the_size_that_the_backward_pass_keeps() -> None:
    """What autograd saves in a forward pass of one image, without weights, is what the formula says within a third."""
    config = DiTConfig(128, 6, 4, 2, 16, 3, 10)
    net = initialize_(DiT(config), generator_for("test", 0))
    weights = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    images, storages = 4, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(torch.randn(images, 3, 16, 16), torch.zeros(images), torch.zeros(images, dtype=torch.int64))
    assert output.requires_grad
    saved = sum(size for size, _ in storages.values()) / images
    assert saved == pytest.approx(activation_bytes(config, False, checkpointed=False), rel=0.34)


def test_memory_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, sharded = memory(), memory(fsdp=True)
    assert alone == sharded
    launched(monkeypatch, 4)
    estimate = training_estimate(BASE, settings(batch_size=32), Execution())
    assert estimate["processes"] == 4 and estimate["memory_per"] == "device"
    parameters = count_parameters(BASE)["total"]
    assert alone - estimate["memory_bytes"] == 24 * activation_bytes(BASE, False, checkpointed=False)
    assert estimate["memory_bytes"] - memory(fsdp=True) == 15 * parameters


@pytest.mark.parametrize(
    "config",
    [
        BASE,
        replace(BASE, patch_size=4, learn_sigma=True),
        replace(BASE, width=96, heads=6, depth=2, image_size=32),
        DiTConfig(64, 6, 4, 2, 8, 1, 10),
        DiTConfig(64, 2, 4, 2, 8, 1, 10, extras=Extras(bottleneck=6, prompts=3)),
    ],
)
def test_floating_point_operations_of_a_forward_pass(config: DiTConfig) -> None:
    net = initialize_(DiT(config), generator_for("test", 0)).eval()
    images = 2
    x = torch.zeros(images, config.channels, config.image_size, config.image_size)
    # The counter does not know the fused attention of a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, torch.zeros(images), torch.zeros(images, dtype=torch.int64))
    assert counter.get_total_flops() > 0
    assert images * forward_flops(config) == counter.get_total_flops()


def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = measure_training(CONFIG, settings(steps=50, batch_size=400), Execution("cpu"))
    assert plan["step_s"] > 0 and plan["training_s"] == pytest.approx(50 * plan["step_s"], abs=0.51)
    assert "float32 on cpu" in plan["measured"] and plan["steps"] == 50
    assert "bfloat16" in measure_training(CONFIG, settings(), Execution("cpu", "bfloat16"))["measured"]


@pytest.mark.parametrize(("size", "batch_size", "step_s"), [(1, 400, 100.5), (1, 1, 0.75), (2, 401, 50.75)])
def test_the_measured_time_is_drawn_out_to_the_share(
    size: int, batch_size: int, step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes half a second, each image a quarter of one, and the first step ten more."""
    now = [0.0]

    def step(run: Any, index: int) -> torch.Tensor:
        now[0] += 0.5 + 0.25 * run.batches.batch_size + (0.0 if now[0] else 10.0)
        return torch.zeros(())

    monkeypatch.setattr("finectl.training.run.train_step", step)
    monkeypatch.setattr("finectl.training.estimate.time.perf_counter", lambda: now[0])
    launched(monkeypatch, size)
    measured = measure_training(CONFIG, settings(steps=8, batch_size=batch_size), Execution("cpu"))
    assert measured["step_s"] == step_s and measured["training_s"] == 8 * step_s


def test_what_a_dry_run_prints(chain: Any) -> None:
    for arguments in (("condense", "--depth", 1, "--steps", 7), ("train", chain.init, "--steps", 7)):
        before = sorted(path.name for path in Path(chain.root).rglob("*"))
        plan = json.loads(run_cli(*arguments, "--batch-size", 8, "--dry-run", "--json").out)
        assert plan["steps"] == 7 and plan["processes"] == 1 and plan["memory_per"] == "process"
        for key in ("step_s", "memory_bytes", "disk_bytes", "parameters"):
            assert plan[key] > 0, key
        assert sorted(path.name for path in Path(chain.root).rglob("*")) == before, "a dry run left something"
    plan = json.loads(run_cli("condense", "--depth", 1, "--dry-run", "--json", "--grad-checkpointing").out)
    other = json.loads(run_cli("condense", "--depth", 1, "--dry-run", "--json", "--accumulate", 8).out)
    whole = json.loads(run_cli("condense", "--depth", 1, "--dry-run", "--json").out)
    assert other["memory_bytes"] < whole["memory_bytes"] and plan["recipe"] == other["recipe"] == whole["recipe"]


def test_checkpointing_pays_for_deep_models_only() -> None:
    deep = preset("dit-nano", image_size=16, channels=4, num_classes=10, depth=24)
    saved = activation_bytes(deep, False, checkpointed=True) / activation_bytes(deep, False, checkpointed=False)
    assert saved < 0.15


@pytest.mark.parametrize(
    ("recipe", "dense", "shared"),
    [
        ("fine-imagenet-dit-b.yaml", 130_315_808, 13_565_952),
        ("fine-imagenet-dit-b.yaml:v1", 130_315_808, 9_437_184),
        ("fine-imagenet-dit-l.yaml", 231_163_936, 24_117_248),
        ("fine-imagenet-dit-l.yaml:v1", 231_163_936, 16_777_216),
    ],
)
def test_the_recipes_of_the_paper_have_its_numbers(recipe: str, dense: int, shared: int, workspace: Any) -> None:
    from finectl.artifacts.job import Plan
    from finectl.cli.main import build_command
    from finectl.cli.recipe import load_recipe
    from finectl.stages.condense import STAGE

    command = build_command("condense")
    defaults = {parameter.name: parameter.default for parameter in command.params}
    names = list(defaults)
    given = load_recipe(ROOT / "recipes" / recipe, "condense", names)
    context = command.make_context("condense", [], resilient_parsing=False, default_map=given)
    config = STAGE.config(**{name: context.params[name] for name in STAGE.config.__dataclass_fields__})
    plan: Plan[Any] = STAGE.plan(config, ())
    assert plan.summary["parameters_dense"] == dense and plan.summary["parameters_shared"] == shared
    assert plan.summary["disk_bytes"] > 0 and plan.summary["memory_bytes"] > 20 * plan.summary["parameters"]
    assert (plan.config.batch_size, plan.config.steps) == ((256, 30_000) if ":v1" in recipe else (64, 300_000))
