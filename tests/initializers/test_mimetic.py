"""Mimetic initialisation: the products of query and key and of value and projection, and that all else is DiT's own."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import cast

import pytest
import torch
from support import run_cli
from torch import Tensor

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.diffusion.random import generator_for
from finectl.initializers import METHODS
from finectl.initializers.mimetic import Constants, attention_weights, balanced_factors, constants_of, noisy_identity
from finectl.models.dit import Block, DiT, SelfAttention, initialize_
from finectl.models.io import load_model
from finectl.models.presets import PRESETS

WIDTH, _, HEADS, _ = PRESETS["dit-nano"]
SIZE = WIDTH // HEADS
CONSTANTS = {variant: constants_of(METHODS["mimetic"].constants, variant) for variant in METHODS["mimetic"].variants}
DEPTH = 3


def made(workspace: Path, *options: object) -> DiT:
    where = ("--model", "dit-nano", "--depth", DEPTH, "--workspace", workspace)
    path = run_cli("init", "--method", "mimetic", *where, *options).path
    assert read_manifest(path).metrics["parameters_transferred_with_embedders"] == 0
    return cast(DiT, load_model(open_artifact(path), "raw")).double().requires_grad_(False)


def attention_of(model: DiT, index: int) -> SelfAttention:
    return cast(Block, model.blocks[index]).attn


def products(qkv: Tensor, proj: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return W_Q W_K^T and W_V W_proj of each head, (heads, d, d), through the layers as the model runs them."""
    width = proj.shape[0]
    unit = torch.eye(width, dtype=qkv.dtype)  # a layer maps the unit vectors to the rows of its matrix W
    parts = torch.nn.functional.linear(unit, qkv).view(width, 3, heads, width // heads)
    q, k, v = parts.permute(1, 2, 0, 3).unbind(0)  # (heads, d, k) each
    out = torch.nn.functional.linear(unit, proj).view(heads, width // heads, width)
    return q @ k.transpose(1, 2), v @ out


def nearest(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank (Eckart and Young)."""
    left, values, right = torch.linalg.svd(matrix)
    return left[:, :rank] @ values[:rank].diag() @ right[:rank]


def has_diagonal(matrix: Tensor, alpha: float, beta: float) -> None:
    """The matrix looks like alpha Z + beta I with entries of Z from N(0, 1/d): within 5 standard errors."""
    width = matrix.shape[0]
    noise = alpha / math.sqrt(width)
    diagonal = matrix.diagonal()
    others = matrix[~torch.eye(width, dtype=torch.bool)]
    assert abs(float(diagonal.mean()) - beta) < 5 * noise / math.sqrt(width)
    assert abs(float(diagonal.std()) / noise - 1) < 5 / math.sqrt(2 * width)
    assert abs(float(others.mean())) < 5 * noise / width
    assert abs(float(others.std()) / noise - 1) < 5 / math.sqrt(2 * width**2)


def test_the_variants_are_the_published_constants() -> None:
    assert CONSTANTS == {"paper": Constants(0.7, 0.7, 0.4, 0.4), "swapped": Constants(0.4, 0.4, 0.7, 0.7)}


def test_numbers_that_are_set_are_exchanged_by_the_variant(workspace: Path) -> None:
    values = {"alpha_q": 0.1, "beta_q": 0.2, "alpha_v": 0.3, "beta_v": 0.4}
    assert constants_of(values, "paper") == Constants(0.1, 0.2, 0.3, 0.4)
    assert constants_of(values, "swapped") == Constants(0.3, 0.4, 0.1, 0.2)
    model = made(workspace, "--set", "beta_q=0.9,alpha_v=0.1")
    wanted = attention_weights(WIDTH, HEADS, Constants(0.7, 0.9, 0.1, 0.4), generator_for("init-mimetic", 0, 1))
    assert torch.equal(cast(Tensor, attention_of(model, 1).qkv.weight).float(), wanted[0])
    exchanged = ("--set", "alpha_q=0.4,beta_q=0.4,alpha_v=0.7,beta_v=0.7")
    swapped, other = made(workspace, *exchanged).state_dict(), made(workspace, "--variant", "swapped").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in swapped.items())


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_factors_are_those_of_the_singular_value_decomposition(rank: int) -> None:
    matrix = noisy_identity(24, 0.7, 0.7, torch.Generator().manual_seed(3))
    first, second = balanced_factors(matrix, rank)
    values = torch.linalg.svdvals(matrix)[:rank]
    torch.testing.assert_close(first @ second.T, nearest(matrix, rank), rtol=0, atol=1e-12)
    for side in (first, second):
        torch.testing.assert_close(side.T @ side, values.diag(), rtol=0, atol=1e-11)
    assert bool((second.gather(0, second.abs().argmax(0, keepdim=True)) > 0).all()), "signs are fixed"


def test_factors_of_a_matrix_without_full_rank_are_finite() -> None:
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    matrix[0, 1] = 2.0
    first, second = balanced_factors(matrix, 8)
    assert bool(first.isfinite().all() and second.isfinite().all())
    torch.testing.assert_close(first @ second.T, matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("constants", [*CONSTANTS.values(), Constants(0.3, 0.9, 0.6, 0.2)])
def test_one_head_has_the_prescribed_diagonals(constants: Constants, width: int) -> None:
    qkv, proj = attention_weights(width, 1, constants, torch.Generator().manual_seed(1))
    assert qkv.shape == (3 * width, width) and proj.shape == (width, width)
    assert qkv.dtype == proj.dtype == torch.float32
    logits, values = products(qkv, proj, 1)
    has_diagonal(logits[0], constants.alpha_q, constants.beta_q)
    has_diagonal(values[0], constants.alpha_v, -constants.beta_v)


@pytest.mark.parametrize("variant", [None, *CONSTANTS])
def test_products_in_the_model(variant: str | None, workspace: Path) -> None:
    constants = CONSTANTS[variant or "paper"]
    model = made(workspace, "--seed", 5, *(("--variant", variant) if variant else ()))
    seen = []
    for index in range(DEPTH):
        layer = attention_of(model, index)
        logits, values = products(cast(Tensor, layer.qkv.weight), cast(Tensor, layer.proj.weight), HEADS)
        noise = generator_for("init-mimetic", 5, index)
        for head in range(HEADS):
            drawn = noisy_identity(WIDTH, constants.alpha_q, constants.beta_q, noise)
            torch.testing.assert_close(logits[head], nearest(drawn, SIZE), rtol=0, atol=1e-6)
            assert int(torch.linalg.matrix_rank(logits[head], rtol=1e-6)) == SIZE
            assert int(torch.linalg.matrix_rank(values[head], rtol=1e-6)) == SIZE
            assert float(logits[head].diagonal().mean()) > 5 * float(logits[head].mean().abs())
            has_diagonal(drawn, constants.alpha_q, constants.beta_q)
            seen.append(logits[head])
        whole = values.sum(0)
        drawn = noisy_identity(WIDTH, constants.alpha_v, -constants.beta_v, noise)
        torch.testing.assert_close(whole, drawn, rtol=0, atol=1e-6)
        has_diagonal(whole, constants.alpha_v, -constants.beta_v)
    for first, second in itertools.pairwise(seen):
        assert not torch.allclose(first, second, atol=1e-3), "each head and layer has noise of its own"


def test_a_token_that_sees_itself_alone_is_mapped_by_the_product(workspace: Path) -> None:
    layer = attention_of(made(workspace), 1)
    noise = generator_for("init-mimetic", 0, 1)
    for _ in range(HEADS):
        noisy_identity(WIDTH, 0.7, 0.7, noise)
    product = noisy_identity(WIDTH, 0.4, -0.4, noise)
    tokens = torch.randn(6, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(tokens), tokens @ product, rtol=0, atol=1e-5)


def test_tokens_attend_to_themselves(workspace: Path) -> None:
    layer = attention_of(made(workspace), 0)
    tokens = torch.randn(16, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, _ = products(cast(Tensor, layer.qkv.weight), cast(Tensor, layer.proj.weight), HEADS)
    shares = (tokens @ logits @ tokens.T / math.sqrt(SIZE)).softmax(-1)  # (heads, 16, 16)
    assert float(shares.diagonal(dim1=1, dim2=2).mean()) > 0.5


def test_all_else_is_dits_own(workspace: Path) -> None:
    model = made(workspace, "--seed", 5)
    usual = initialize_(DiT(model.config), generator_for("init", 5)).state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, usual[name].double())}
    assert changed == {f"blocks.{index}.attn.{layer}.weight" for index in range(DEPTH) for layer in ("qkv", "proj")}
    other = made(workspace, "--seed", 6).state_dict()
    assert all(not torch.equal(model.state_dict()[name], other[name]) for name in changed)


def test_layers_do_not_depend_on_the_depth(workspace: Path) -> None:
    deep, flat = made(workspace), made(workspace, "--depth", 1)
    assert torch.equal(cast(Tensor, attention_of(deep, 0).qkv.weight), cast(Tensor, attention_of(flat, 0).qkv.weight))
