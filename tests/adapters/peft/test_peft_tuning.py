"""Tuned models: how they start, what is trained, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from tuned import DIT, LABELLED, TEXT, UNET, answer, inputs, lively, train

from finectl.adapters.peft.table import (
    PEFTS,
    PeftOptions,
    is_trained,
    result_config,
    trainable_parameters,
)
from finectl.adapters.peft.tuning import Tuning, tune
from finectl.errors import UsageError
from finectl.models.extras import Extras
from finectl.models.io import ModelConfig, build_model
from finectl.models.presets import DiTConfig
from finectl.training.memory import checkpoint_activations

METHODS = [name for name in PEFTS if name != "none"]
CASES = [
    *((DIT, PeftOptions(method)) for method in METHODS),
    (DIT, PeftOptions("lora", {"layers": "qkv,proj,fc1,fc2", "rank": 3, "alpha": 6.0, "labels": False})),
    (DIT, PeftOptions("difffit", {"layers": "qkv,proj,fc2", "blocks": 1})),
    (replace(DIT, extras=Extras(bottleneck=64, prompts=10)), PeftOptions("vpt")),
    (replace(DIT, extras=Extras(bottleneck=64, prompts=10)), PeftOptions("difffit")),
    (LABELLED, PeftOptions("lora")),
    (UNET, PeftOptions("bitfit")),
    (TEXT, PeftOptions("lora", {"layers": "to_q,to_v"})),
]
IDS = [f"{getattr(config, 'architecture', 'dit')}-{peft.method}-{index}" for index, (config, peft) in enumerate(CASES)]


@pytest.mark.parametrize(("config", "peft"), CASES, ids=IDS)
def test_the_start_is_the_pretrained_model(config: ModelConfig, peft: PeftOptions) -> None:
    model = lively(config)
    before, names = answer(model), set(model.state_dict())
    tuning = tune(model, peft, seed=0)
    after = answer(tuning.model)
    if peft.method == "vpt" and not getattr(config, "extras", None):
        assert not torch.allclose(after, before)
    elif config in (DIT, CASES[8][0]):
        assert torch.equal(after, before)
    else:  # the CPU's convolutions round by where in memory a tensor lies
        assert torch.allclose(after, before, rtol=0, atol=1e-6)
    result = tuning.result_state(tuning.model.state_dict())
    assert names <= set(result)
    assert result_config(config, peft) == tuning.model.config


@pytest.mark.parametrize(("config", "peft"), CASES, ids=IDS)
def test_what_is_trained_is_what_is_counted_and_nothing_else_moves(config: ModelConfig, peft: PeftOptions) -> None:
    tuning = tune(lively(config), peft, seed=0)
    model = tuning.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(dict(model.named_parameters())[name].numel() for name in trained) == trainable_parameters(config, peft)
    assert tuning.trainable == trainable_parameters(config, peft)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved <= trained
    # Keys are the same for all queries' softmax up to a constant: what is added to all of them has no gradient.
    still = {name for name in trained - moved if "to_k" not in name}
    assert still == set()
    assert all(value.grad is None for name, value in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("averaged", [False, True], ids=["raw", "ema"])
@pytest.mark.parametrize(("config", "peft"), CASES, ids=IDS)
def test_the_result_computes_what_the_tuned_model_does(config: ModelConfig, peft: PeftOptions, averaged: bool) -> None:
    tuning = tune(lively(config), peft, seed=0)
    start = answer(tuning.model)
    ema = train(tuning.model)
    state = ema.state_dict() if averaged else tuning.model.state_dict()
    plain: Any = build_model(result_config(config, peft)).eval()
    plain.load_state_dict(tuning.result_state(state))
    if averaged:
        with ema.applied():
            tuned = answer(tuning.model)
    else:
        tuned = answer(tuning.model)
    assert (tuned - start).abs().max() > 1e-3
    assert torch.allclose(answer(plain), tuned, rtol=1e-5, atol=1e-6 * float(tuned.abs().max()) + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_seed_decides_the_new_parts(method: str) -> None:
    def parts(seed: int, noise: int) -> dict[str, Tensor]:
        torch.manual_seed(noise)
        state = tune(lively(DIT), PeftOptions(method), seed).model.state_dict()
        return dict(state)

    one, same, other = parts(1, 0), parts(1, 99), parts(2, 0)
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    drawn = method in ("lora", "adaptformer", "vpt")
    assert drawn == any(not torch.equal(value, other[name]) for name, value in one.items())
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    tune(lively(DIT), PeftOptions(method), 1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_merged_weights_are_the_formula() -> None:
    peft = PeftOptions("lora", {"rank": 2, "alpha": 6.0})
    tuning = tune(lively(DIT), peft, 0)
    layer = tuning.model.blocks[1].attn.qkv
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(0.5)
    merged = tuning.result_state(tuning.model.state_dict())["blocks.1.attn.qkv.weight"]
    expected = layer.base_layer.weight.double() + 3 * 0.5 * layer.lora_A["default"].weight.double().sum(0)
    assert torch.allclose(merged.double(), expected, atol=1e-6)


def test_folded_scales_are_the_formula() -> None:
    tuning = tune(lively(DIT), PeftOptions("difffit"), 0)
    layer = tuning.model.blocks[0].mlp.fc2
    with torch.no_grad():
        layer.gamma.copy_(torch.arange(64.0))
    state = tuning.result_state(tuning.model.state_dict())
    gamma = torch.arange(64.0)
    assert torch.equal(state["blocks.0.mlp.fc2.weight"], gamma[:, None] * layer.base_layer.weight)
    assert torch.equal(state["blocks.0.mlp.fc2.bias"], gamma * layer.base_layer.bias)


def test_what_is_not_changed_is_not_copied() -> None:
    tuning = tune(lively(DIT), PeftOptions("lora"), 0)
    state = tuning.model.state_dict()
    result = tuning.result_state(state)
    shared = {name for name, value in result.items() if name in state and value.data_ptr() == state[name].data_ptr()}
    assert {"blocks.0.mlp.fc1.weight", "final_layer.linear.weight"} <= shared
    assert len(result) - len(shared) == 2 * DIT.depth  # weight and bias of each qkv have other names meanwhile


def test_prompts_are_attended_to_and_their_outputs_dropped() -> None:
    """A block with prompts equals a plain block on the longer sequence, without its first outputs."""
    prompted = lively(replace(DIT, extras=Extras(prompts=3)))
    block = prompted.blocks[0]
    tokens, condition = torch.randn(2, 16, 64), torch.randn(2, 64)
    with torch.no_grad():
        found = block(tokens, condition)
        longer = torch.cat([block.prompts.expand(2, -1, -1), tokens], dim=1)
        block.prompts = None
        assert torch.allclose(found, block(longer, condition)[:, 3:], atol=1e-5)


def test_bottlenecks_stand_beside_the_feed_forward_part() -> None:
    model = lively(replace(DIT, extras=Extras(bottleneck=8, scale=0.3)))
    part = model.blocks[0].mlp
    x = torch.randn(2, 16, 64)
    with torch.no_grad():
        beside = part.bottleneck.up(part.bottleneck.down(x).clamp(min=0))
        found = part(x)
        part.bottleneck = None
        assert torch.allclose(found, part(x) + 0.3 * beside, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_gradients_are_the_same(method: str) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model = tune(lively(DIT).train(), PeftOptions(method), 0).model
        if checkpointed:
            checkpoint_activations(model)
        model(*inputs(DIT)).square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain
    assert plain.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in plain.items())


def test_tuning_nothing_trains_everything() -> None:
    tuning = tune(lively(DIT), PeftOptions(), 0)
    assert all(parameter.requires_grad for parameter in tuning.model.parameters())
    state = tuning.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in tuning.result_state(state).items())
    with pytest.raises(UsageError, match="no adapter"):
        tuning.save_adapter(Path("unused"), state)


def test_half_precision_and_float32_parts_go_together() -> None:
    for method in METHODS:
        model = tune(lively(DIT), PeftOptions(method), 0).model
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(*inputs(DIT))).all()


def test_names_decide_what_is_trained() -> None:
    assert is_trained("blocks.0.attn.qkv.lora_A.default.weight", PeftOptions("lora"))
    assert not is_trained("blocks.0.attn.qkv.base_layer.bias", PeftOptions("lora"))
    assert not is_trained("y_embedder.embedding_table.weight", PeftOptions("lora", {"labels": False}))
    assert is_trained("y_embedder.embedding_table.weight", PeftOptions("bitfit"))


def test_a_tuning_knows_its_learning_rate() -> None:
    assert Tuning(nn.Identity(), PeftOptions("difffit"), DIT).lr_scale == 10
    assert Tuning(nn.Identity(), PeftOptions(), DIT).lr_scale == 1


def test_dit_config_is_a_dit_config() -> None:
    assert isinstance(result_config(DIT, PeftOptions("vpt")), DiTConfig)
