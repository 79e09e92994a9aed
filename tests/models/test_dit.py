"""The DiT: equality with diffusers' implementation, initialisation, label dropout, state dicts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from finectl.models.dit import DiT, attention, dense_state_dict, drop_labels, initialize_, position_embedding
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig

TINY = DiTConfig(width=32, depth=2, heads=4, patch_size=2, image_size=12, channels=3, num_classes=5)
FACTORS = FactorConfig(tuple(LAYER_TYPES), 20, 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomized(config: DiTConfig, scale: float = 0.1) -> DiT:
    """A model whose every parameter is random: at DiT's own initialisation the output is zero."""
    model, generator = DiT(config), seeded(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def inputs(config: DiTConfig, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(1)
    x = torch.randn(batch, config.channels, config.image_size, config.image_size, generator=generator)
    t = torch.tensor([0, 517, 999])[:batch]
    return x, t, torch.tensor([0, config.num_classes, 3])[:batch]


def diffusers_state(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Rename a DiT's parameters to diffusers' names; diffusers keeps a copy of the embedders in every block."""
    out = {}
    for part in ("weight", "bias"):
        out[f"pos_embed.proj.{part}"] = state[f"x_embedder.proj.{part}"]
        out[f"proj_out_1.{part}"] = state[f"final_layer.adaLN_modulation.1.{part}"]
        out[f"proj_out_2.{part}"] = state[f"final_layer.linear.{part}"]
        for index in range(depth):
            theirs, ours = f"transformer_blocks.{index}", f"blocks.{index}"
            for name, position in (("linear_1", 0), ("linear_2", 2)):
                embedder = f"{theirs}.norm1.emb.timestep_embedder.{name}.{part}"
                out[embedder] = state[f"t_embedder.mlp.{position}.{part}"]
            for name, third in zip("qkv", state[f"{ours}.attn.qkv.{part}"].chunk(3), strict=True):
                out[f"{theirs}.attn1.to_{name}.{part}"] = third
            out[f"{theirs}.norm1.linear.{part}"] = state[f"{ours}.adaLN_modulation.1.{part}"]
            out[f"{theirs}.attn1.to_out.0.{part}"] = state[f"{ours}.attn.proj.{part}"]
            out[f"{theirs}.ff.net.0.proj.{part}"] = state[f"{ours}.mlp.fc1.{part}"]
            out[f"{theirs}.ff.net.2.{part}"] = state[f"{ours}.mlp.fc2.{part}"]
    table = state["y_embedder.embedding_table.weight"]
    for index in range(depth):
        out[f"transformer_blocks.{index}.norm1.emb.class_embedder.embedding_table.weight"] = table
    return out


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_output_equals_diffusers(learn_sigma: bool) -> None:
    from diffusers import DiTTransformer2DModel

    config = dataclasses.replace(TINY, frequency_divisor=127, learn_sigma=learn_sigma)
    ours = randomized(config)
    theirs = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.image_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    ).eval()
    theirs.load_state_dict(diffusers_state(ours.state_dict(), config.depth), strict=True)
    x, t, y = inputs(config)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        actual = ours(x, t, y)
        other_divisor = randomized(dataclasses.replace(config, frequency_divisor=128))(x, t, y)
    assert actual.shape == (3, config.out_channels, 12, 12)
    scale = expected.abs().max()
    assert (actual - expected).abs().max() < 2e-6 * scale
    assert (other_divisor - expected).abs().max() > 1e-3 * scale


def test_gradients_reach_every_parameter() -> None:
    for config in (TINY, dataclasses.replace(TINY, factorized=FACTORS)):
        model = randomized(config)
        model(*inputs(config)).square().sum().backward()
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not idle


def test_position_embedding_encodes_column_then_row() -> None:
    embedded = position_embedding(8, 3).view(3, 3, 2, 4)  # (row, column, half, D / 2)
    assert torch.equal(embedded[0, :, 0], embedded[2, :, 0])
    assert torch.equal(embedded[:, 0, 1], embedded[:, 2, 1])
    expected = torch.tensor([2.0, 0.02]).double()
    assert torch.allclose(embedded[0, 2, 0], torch.cat([expected.sin(), expected.cos()]).float())
    assert torch.equal(embedded[0, 2, 0], embedded[2, 0, 1])


def test_building_draws_no_random_numbers() -> None:
    before = torch.random.get_rng_state()
    initialize_(DiT(TINY), seeded(0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("factors", [None, FACTORS])
def test_initialisation_is_a_function_of_the_generator(factors: FactorConfig | None) -> None:
    config = dataclasses.replace(TINY, factorized=factors)
    first, again, other = (initialize_(DiT(config), seeded(seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_dense_initialisation_follows_the_paper() -> None:
    config = dataclasses.replace(TINY, width=128, num_classes=200)
    state = initialize_(DiT(config), seeded(0)).state_dict()
    for name, value in state.items():
        if "adaLN" in name or name.endswith("bias") or name.startswith("final_layer"):
            assert not value.any(), name
        elif name.startswith(("t_embedder", "y_embedder")):
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            fan_out, fan_in = value.shape[0], value[0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * bound < value.abs().max() <= bound, name
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    model = initialize_(DiT(config), seeded(0))
    assert not model(*inputs(config)).any()


def test_factorised_initialisation_has_xavier_variance_and_distinct_layers() -> None:
    config = dataclasses.replace(TINY, width=96, factorized=FactorConfig(tuple(LAYER_TYPES), 96))
    model = initialize_(DiT(config), seeded(0))
    for kind, path in LAYER_TYPES.items():
        shared = model.factors[kind]
        for matrix in (shared.U, shared.V):
            assert torch.allclose(matrix.T @ matrix, torch.eye(96), atol=1e-5)
        first, second = (block.get_submodule(path) for block in model.blocks)
        if kind == "adaln":
            assert not first.sigma.any() and not first.weight().any()
            continue
        outputs, inputs_ = first.weight().shape
        assert first.weight().var().item() == pytest.approx(2 / (outputs + inputs_), rel=0.05)
        spread = (first.sigma - second.sigma).abs().mean() / first.sigma.mean()
        assert 0.05 < spread.item() < 0.3 and (first.sigma > 0).all()


def test_over_complete_factors_have_unit_columns_and_xavier_variance() -> None:
    config = dataclasses.replace(TINY, width=64, factorized=FactorConfig(("o",), 160))
    model = initialize_(DiT(config), seeded(0))
    shared, layer = model.factors["o"], model.blocks[0].attn.proj
    for matrix in (shared.U, shared.V):
        assert torch.allclose(matrix.norm(dim=0), torch.ones(160))
    assert layer.weight().var().item() == pytest.approx(2 / 128, rel=0.1)
    assert torch.isfinite(model(*inputs(config))).all()


def test_shared_factors_appear_once_in_the_state() -> None:
    state = DiT(dataclasses.replace(TINY, factorized=FACTORS)).state_dict()
    assert state["factors.qkv.U"].shape == (96, 20) and state["factors.qkv.V"].shape == (32, 20)
    assert state["blocks.1.mlp.fc2.sigma"].shape == (7,) and state["blocks.1.mlp.fc2.bias"].shape == (32,)
    assert sum(name.endswith((".U", ".V")) for name in state) == 10
    assert "pos_embed" not in state


def test_dense_state_computes_what_the_factorised_model_does() -> None:
    config = dataclasses.replace(TINY, factorized=FACTORS)
    model = randomized(config, 0.3)
    dense = DiT(TINY)
    dense.load_state_dict(dense_state_dict(model, config), strict=True)
    from_state = dense_state_dict(model.state_dict(), config)
    assert all(torch.equal(value, from_state[name]) for name, value in dense.state_dict().items())
    with torch.no_grad():
        expected, actual = model(*inputs(TINY)), dense(*inputs(TINY))
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_copy_and_a_functional_call_use_their_own_factors() -> None:
    config = dataclasses.replace(TINY, factorized=FACTORS)
    model = randomized(config)
    twin = copy.deepcopy(model)
    x, t, y = inputs(config)
    with torch.no_grad():
        expected = model(x, t, y)
        twin.factors["qkv"].U.zero_()
        assert torch.equal(model(x, t, y), expected)
        assert not torch.equal(twin(x, t, y), expected)
        called = torch.func.functional_call(model, twin.state_dict(), (x, t, y))
    assert torch.equal(called, twin(x, t, y))


def test_bfloat16_autocast_is_close_and_trains() -> None:
    for config in (TINY, dataclasses.replace(TINY, factorized=FACTORS)):
        model = randomized(config)
        model.factors.requires_grad_(False)
        x, t, y = inputs(config)
        full = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x, t, y)
        half.float().square().sum().backward()
        assert (half.float() - full).abs().max() < 0.05 * full.abs().max()
        for name, parameter in model.blocks.named_parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


def test_explicit_attention_agrees_with_the_kernel() -> None:
    q, k, v = (torch.randn(2, 3, 9, 8, generator=seeded(i)).bfloat16().requires_grad_() for i in range(3))
    explicit = attention(q, k, v)
    kernel = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert (explicit.float() - kernel).abs().max() < 0.02
    gradients = torch.autograd.grad(explicit.float().square().sum(), (q, k, v))
    expected = torch.autograd.grad(kernel.square().sum(), (q, k, v))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours.float() - theirs.float()).abs().max() < 0.03 * theirs.float().abs().max()


def test_drop_labels_drops_the_asked_share_from_the_generator_only() -> None:
    y = torch.arange(10_000) % 10
    dropped = drop_labels(y, 10, 0.1, seeded(0))
    assert torch.equal(dropped, drop_labels(y, 10, 0.1, seeded(0)))
    assert 0.085 < (dropped == 10).float().mean() < 0.115
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(drop_labels(y, 10, 0.0, seeded(0)), y)
    assert (drop_labels(y, 10, 1.0, seeded(0)) == 10).all()
