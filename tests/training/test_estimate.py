"""What --dry-run says: parameters, memory, floating-point operations and a measured step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fitting import settings
from support import run_cli
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.artifacts.job import Execution
from finectl.models.dit import DiT
from finectl.models.presets import preset
from finectl.training.estimate import activation_bytes, forward_flops, training_estimate

SMALL = preset("dit-nano", image_size=16, channels=4, num_classes=10)


def test_floating_point_operations_are_those_that_torch_counts() -> None:
    config = preset("dit-s", image_size=32, channels=4, num_classes=10, depth=2, learn_sigma=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        DiT(config)(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert forward_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_memory_follows_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(**execution: Any) -> int:
        return int(training_estimate(SMALL, settings(batch_size=64), Execution(**execution))["memory_bytes"])

    whole = memory()
    images = 64 * activation_bytes(SMALL, narrow=False, checkpointed=False)
    assert memory(accumulate=4) == whole - images + images // 4
    assert memory(dtype="bfloat16") < whole and memory(grad_checkpointing=True) < whole
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert memory() == whole - images + images // 4
    parameters = training_estimate(SMALL, settings(), Execution())["parameters"]
    assert memory() - memory(fsdp=True) == pytest.approx(20 * parameters * 3 / 4, abs=8)


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
    from support import ROOT

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


def test_a_dry_run_measures_a_step(workspace: Any) -> None:
    ran = run_cli("condense", "--depth", 1, "--steps", 1000, "--batch-size", 8, "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert plan["step_s"] > 0 and abs(plan["training_s"] - 1000 * plan["step_s"]) <= 1
    assert "1 and 3 images in float32 on cpu" in plan["measured"]
    assert {"memory_bytes", "disk_bytes", "parameters", "steps", "processes"} <= set(plan)
    assert not list(workspace.glob("*/*"))
