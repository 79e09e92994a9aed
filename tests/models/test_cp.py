"""CP decomposition: exact recovery, a falling error, the metric, and the factors' form."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from finectl.models.cp import decompose, relative_errors


def exact_stack(layers: int, outputs: int, inputs: int, rank: int, seed: int = 0) -> Tensor:
    """Return a random stack of rank `rank`, (L, m1, m2)."""
    random = torch.Generator().manual_seed(seed)
    U, S, V = (torch.randn(n, rank, generator=random, dtype=torch.float64) for n in (outputs, layers, inputs))
    return torch.einsum("mr,lr,nr->lmn", U, S, V)


def noise_stack(layers: int, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(
        layers, outputs, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )  # fmt: skip


def metric_of(layers: int, inputs: int, seed: int = 1) -> Tensor:
    """Return a second moment for each layer that is far from the identity, (L, m2, m2)."""
    roots = noise_stack(layers, inputs, inputs, seed) * torch.logspace(0, -1.5, inputs, dtype=torch.float64)
    return roots.transpose(1, 2) @ roots / inputs


@pytest.mark.parametrize(
    ("shape", "weighted"),
    [
        ((6, 48, 16, 8), False),
        ((6, 48, 16, 8), True),
        ((6, 48, 16, 16), False),
        ((6, 48, 16, 16), True),
        ((4, 20, 12, 10), False),
        ((6, 16, 16, 24), False),
    ],
)
def test_a_stack_of_that_rank_is_recovered(shape: tuple[int, int, int, int], weighted: bool) -> None:
    layers, _, inputs, rank = shape
    stack = exact_stack(*shape)
    metric = metric_of(layers, inputs) if weighted else None
    found = decompose(stack, rank, metric=metric, iterations=1500, tolerance=1e-10)
    assert found.error < 1e-6
    assert float(relative_errors(stack, found.U, found.sigma, found.V, metric).max()) < 1e-6
    if not weighted:
        rebuilt = torch.einsum("mr,lr,nr->lmn", found.U, found.sigma, found.V)
        assert float((rebuilt - stack).norm() / stack.norm()) < 1e-6


def test_the_unknown_scale_of_the_stack_does_not_matter() -> None:
    for scale in (1e-8, 1e8):
        assert decompose(scale * exact_stack(5, 12, 8, 6), 6, iterations=2000, tolerance=1e-10).error < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rank", [3, 12, 30])
def test_the_error_falls_with_every_sweep(weighted: bool, rank: int) -> None:
    metric = metric_of(5, 12) if weighted else None
    found = decompose(noise_stack(5, 20, 12), rank, metric=metric, iterations=60, tolerance=0.0)
    history = found.history
    assert len(history) > 20 and history[-1] == found.error
    assert all(after <= before for before, after in itertools.pairwise(history))
    assert history[-1] < history[0] - 1e-3
    direct = relative_errors(noise_stack(5, 20, 12), found.U, found.sigma, found.V, metric)
    torch.testing.assert_close(direct, found.layer_errors, rtol=1e-2, atol=1e-7)  # but for the ridge


def test_a_metric_of_identities_changes_nothing() -> None:
    stack = noise_stack(4, 10, 7)
    eye = torch.eye(7, dtype=torch.float64).expand(4, 7, 7)
    plain, weighted = decompose(stack, 5), decompose(stack, 5, metric=eye)
    assert weighted.error == pytest.approx(plain.error, rel=1e-4)
    for plain_factor, weighted_factor in ((plain.U, weighted.U), (plain.V, weighted.V), (plain.sigma, weighted.sigma)):
        torch.testing.assert_close(weighted_factor, plain_factor, rtol=0.0, atol=5e-2)


def test_the_metric_lowers_the_error_of_the_outputs() -> None:
    stack, metric = noise_stack(5, 20, 12), metric_of(5, 12)
    plain, weighted = decompose(stack, 12), decompose(stack, 12, metric=metric)

    def outputs(found: object) -> float:
        errors = relative_errors(stack, found.U, found.sigma, found.V, metric)  # type: ignore[attr-defined]
        return float(errors.square().mean().sqrt())

    assert outputs(weighted) < 0.8 * outputs(plain)
    rest = stack - torch.einsum("mr,lr,nr->lmn", weighted.U, weighted.sigma, weighted.V)
    squared = (rest @ metric * rest).sum() / (stack @ metric * stack).sum()
    assert weighted.error == pytest.approx(float(squared.sqrt()), rel=1e-3)


def test_directions_without_inputs_do_no_harm() -> None:
    """Inputs that span 3 of 12 dimensions leave the metric singular."""
    basis = noise_stack(1, 3, 12)[0]
    found = decompose(noise_stack(5, 20, 12), 6, metric=(basis.t() @ basis).expand(5, 12, 12), iterations=50)
    assert all(bool(torch.isfinite(x).all()) for x in (found.U, found.sigma, found.V))
    assert found.error < 0.5


def test_the_factors_have_unit_columns_and_repeat_bit_for_bit() -> None:
    stack = noise_stack(3, 10, 6)
    first, second = (
        decompose(stack, 9, generator=torch.Generator().manual_seed(5), iterations=30) for _ in range(2)
    )  # fmt: skip
    for name in ("U", "sigma", "V"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.U.shape == (10, 9) and first.V.shape == (6, 9) and first.sigma.shape == (3, 9)
    for factor in (first.U, first.V):
        torch.testing.assert_close(factor.norm(dim=0), torch.ones(9, dtype=torch.float64))


def test_zero_weights_have_no_error() -> None:
    """adaLN layers of an untrained model are zero."""
    found = decompose(torch.zeros(3, 6, 4), 2, metric=metric_of(3, 4))
    assert found.error == 0.0 and float(found.layer_errors.max()) == 0.0
    assert float(found.sigma.abs().max()) == 0.0 and bool(torch.isfinite(found.V).all())


def test_one_layer_is_an_ordinary_factorisation() -> None:
    assert decompose(noise_stack(1, 8, 5), 5, iterations=200, tolerance=1e-12).error < 1e-6


def test_it_can_be_stopped_between_sweeps() -> None:
    calls = []

    def between() -> None:
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decompose(noise_stack(4, 10, 7), 5, between=between, tolerance=0.0)
    assert len(calls) == 7
