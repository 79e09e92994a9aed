"""Normalised weights have unit size, filling stays out, and components hold what the training weights are made of."""

from __future__ import annotations

import pytest
import torch
from weight_layers import SMALL

from finectl.errors import InputError, UsageError
from finectl.models.weights.basis import Basis
from finectl.models.weights.config import coefficients_of, require_basis
from finectl.models.weights.layout import Layout
from finectl.models.weights.normalise import FLOOR, Normaliser


def collection(count: int, layout: Layout, scale: float = 1e-3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return scale * torch.randn(count, layout.blocks, layout.block_size, generator=generator) * layout.mask


def test_weights_become_of_unit_size_and_come_back() -> None:
    layout = Layout.of(SMALL, 1, 64)
    initial = collection(1, layout, 0.1)[0]
    blocks = initial + collection(40, layout)
    # One tensor moves a hundred times as much as the others, one not at all.
    ids = layout.tensor_ids
    blocks = torch.where(ids == 1, initial + 100 * (blocks - initial), blocks)
    blocks = torch.where(ids == 4, initial, blocks)
    normaliser = Normaliser.fit(layout, blocks, initial)
    z = normaliser.normalise(blocks)
    for index in range(len(layout.shapes)):
        size = z[:, ids == index].square().mean().sqrt()
        assert size == pytest.approx(0.0 if index == 4 else 1.0, abs=2e-3)
    assert z.mean(0).abs().max() < 1e-4
    assert (z[:, ~layout.mask] == 0).all()
    torch.testing.assert_close(normaliser.restore(z), blocks, rtol=1e-5, atol=1e-7)
    assert (normaliser.scale[ids == 4] == pytest.approx(FLOOR)) and (normaliser.scale[~layout.mask] == 1).all()
    again = Normaliser.from_state(normaliser.state_dict(), layout)
    assert torch.equal(again.normalise(blocks), z)
    with pytest.raises(InputError, match="mean"):
        Normaliser.from_state({**normaliser.state_dict(), "mean": torch.zeros(3)}, layout)


def test_as_many_components_as_samples_lose_nothing_and_fewer_lose_least() -> None:
    layout = Layout.of(SMALL, 1, 64)
    z = collection(6, layout, 1.0)
    full = Basis.fit(z, 8)
    torch.testing.assert_close(full.expand(full.coefficients(z)), z, rtol=1e-4, atol=1e-5)
    assert full.coefficients(z).square().mean().sqrt() == pytest.approx(1.0, rel=1e-4)
    few = Basis.fit(z, 4)
    kept = few.expand(few.coefficients(z))
    assert torch.linalg.norm(kept - z) < torch.linalg.norm(z)
    other = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(2)))[0]
    for block in range(layout.blocks):
        error = (kept[:, block] - z[:, block]).norm()
        assert error <= (z[:, block] @ other @ other.T - z[:, block]).norm()
    rows = few.expand_rows(few.coefficients(z)[2], torch.arange(layout.blocks))
    torch.testing.assert_close(rows, kept[2])
    with pytest.raises(InputError, match="basis"):
        Basis.from_state(few.state_dict(), layout.blocks + 1, 64)


def test_an_error_of_coefficients_counts_as_the_error_of_the_weights() -> None:
    layout = Layout.of(SMALL, 1, 64)
    basis = Basis.fit(collection(20, layout, 1.0), 8)
    error = torch.randn(layout.blocks, 8, generator=torch.Generator().manual_seed(3))
    ratios = basis.expand(error).norm(dim=1) / error.norm(dim=1)
    torch.testing.assert_close(ratios, basis.unit.expand_as(ratios), rtol=1e-4, atol=0)


def test_bases_by_name() -> None:
    assert coefficients_of(require_basis("none", 256)) is None
    assert coefficients_of(require_basis("pca016", 256)) == 16
    for wrong in ("pca", "pca0", "pca6", "pca512", "svd8"):
        with pytest.raises(UsageError, match="--basis"):
            require_basis(wrong, 256)
