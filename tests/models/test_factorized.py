"""Factorised linear layers: exact gradients in both ways, frozen factors, autocast."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from finectl.models.factorized import (
    MATERIALISE,
    SEQUENCE,
    FactorizedLinear,
    SharedFactors,
    expand_sigma,
    factorized_linear,
)

TOKENS, OUTPUTS, INPUTS, RANK = 6, 5, 4, 3
COMBINATIONS = list(itertools.product((False, True), repeat=4))  # x, U, sigma, V


def factors(rank: int = RANK, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return draw(OUTPUTS, rank), draw(rank), draw(INPUTS, rank)


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("needs", COMBINATIONS)
def test_gradients_are_exact(needs: tuple[bool, ...], materialise: bool) -> None:
    U, sigma, V = factors()
    x = torch.randn(2, TOKENS // 2, INPUTS, dtype=torch.float64)
    bias = torch.randn(OUTPUTS, dtype=torch.float64, requires_grad=True)
    tensors = [tensor.requires_grad_(need) for tensor, need in zip((x, U, sigma, V), needs, strict=True)]

    def apply(x: Tensor, U: Tensor, sigma: Tensor, V: Tensor, bias: Tensor) -> Tensor:
        return factorized_linear(x, U, sigma, V, bias, materialise=materialise)

    assert torch.autograd.gradcheck(apply, (*tensors, bias))
    expected = torch.nn.functional.linear(x, U @ torch.diag(sigma) @ V.T, bias)
    assert torch.allclose(apply(*tensors, bias), expected, rtol=1e-12)


@pytest.mark.parametrize("materialise", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rank", [3, 9])
def test_sigma_gradient_at_zero_is_that_of_the_dense_product(materialise: bool, frozen: bool, rank: int) -> None:
    U, sigma, V = factors(rank)
    sigma.zero_().requires_grad_()
    U.requires_grad_(not frozen)
    V.requires_grad_(not frozen)
    x, gy = torch.randn(TOKENS, INPUTS).double(), torch.randn(TOKENS, OUTPUTS).double()
    factorized_linear(x, U, sigma, V, None, materialise=materialise).backward(gy)
    expected = torch.einsum("to,or,ti,ir->r", gy, U.detach(), x, V.detach())
    assert expected.abs().min() > 0
    assert torch.allclose(sigma.grad, expected, rtol=1e-10)


class _Shapes(TorchDispatchMode):
    """Record the shapes that every operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add(tuple(result.shape))
        return result


def backward_shapes(layer: FactorizedLinear, x: Tensor) -> set[tuple[int, ...]]:
    y = layer(x)
    with _Shapes() as shapes:
        y.sum().backward()
    return shapes.seen


@pytest.mark.parametrize("way", [MATERIALISE, SEQUENCE])
def test_frozen_factors_form_no_gradient_of_the_weight(way: str) -> None:
    shared = SharedFactors(13, 11, 7)
    layer = FactorizedLinear(shared)
    layer.way = way
    x = torch.randn(5, 11, requires_grad=True)
    forbidden = {(13, 11), (11, 13)} if way == MATERIALISE else {(13, 7), (7, 13)}
    # The check would be blind if it did not see the gradient that trained factors do form.
    assert backward_shapes(layer, x) & forbidden
    shared.requires_grad_(False)
    # Scaling V by sigma is (11, 7); the gradient of U diag(sigma) would be (13, 7).
    assert not backward_shapes(layer, x) & forbidden


@pytest.mark.parametrize("way", [MATERIALISE, SEQUENCE])
@pytest.mark.parametrize("sharing", [1, 2, 4])
def test_layer_equals_its_dense_weight(way: str, sharing: int) -> None:
    shared = SharedFactors(10, 8, 7)
    layer = FactorizedLinear(shared, sharing)
    layer.way = way
    with torch.no_grad():
        for parameter in (shared.U, shared.V, layer.sigma, layer.bias):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(2, 3, 8)
    assert layer.sigma.shape == (-(-7 // sharing),)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight(), layer.bias), atol=1e-4)


def test_sigma_is_shared_in_consecutive_groups() -> None:
    sigma = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    diagonal = expand_sigma(sigma, 5, 2)
    assert diagonal.tolist() == [1, 1, 2, 2, 3]
    diagonal.sum().backward()
    assert sigma.grad is not None and sigma.grad.tolist() == [2, 2, 1]


@pytest.mark.parametrize("way", [MATERIALISE, SEQUENCE])
@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_autocast_follows_float32(way: str, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    shared = SharedFactors(48, 40, 32)
    layer = FactorizedLinear(shared)
    layer.way = way
    with torch.no_grad():
        for parameter in (shared.U, shared.V, layer.sigma, layer.bias):
            parameter.normal_(generator=generator)
    shared.requires_grad_(not frozen)
    x = torch.randn(4, 16, 40, generator=generator).requires_grad_()
    gy = torch.randn(4, 16, 48, generator=generator)
    wanted = [x, layer.sigma, layer.bias, *(() if frozen else (shared.U, shared.V))]
    expected = torch.autograd.grad(layer(x), wanted, gy)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for ours, full in zip(torch.autograd.grad(y, wanted, gy.bfloat16()), expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - full).norm() < 0.02 * full.norm()


def test_no_gradient_means_no_saved_state() -> None:
    shared = SharedFactors(4, 4, 2).requires_grad_(False)
    layer = FactorizedLinear(shared)
    with torch.no_grad():
        assert layer(torch.randn(3, 4)).grad_fn is None
    assert layer(torch.randn(3, 4)).grad_fn is not None
