"""Linear CKA: values known in closed form, what it does not depend on, and both ways of computing it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finectl.training.similarity import linear_cka


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_kernels(x: Tensor, y: Tensor) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centred Gram matrices, as the paper defines it."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # noqa: E741
    return float((k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt())


@pytest.mark.parametrize("rows", [6, 40])  # fewer rows than columns, and more
def test_it_is_the_papers_definition(rows: int) -> None:
    xs, ys = (
        [random(rows, 9, 1), random(rows, 12, 2) + 3],
        [random(rows, 8, 3), random(rows, 10, 4), random(rows, 9, 1)],
    )
    found = linear_cka(xs, ys)
    assert found.shape == (2, 3) and found.dtype == torch.float64
    for row, x in enumerate(xs):
        for column, y in enumerate(ys):
            assert float(found[row, column]) == pytest.approx(by_kernels(x, y), abs=1e-12)
    assert float(found[0, 2]) == pytest.approx(1)


def test_rotation_scale_and_shift_change_nothing_and_other_maps_do() -> None:
    x = random(50, 7)
    rotation = torch.linalg.qr(random(7, 7, 1))[0]
    squeezed = x * torch.tensor([1, 1, 1, 1, 1, 1, 20.0], dtype=torch.float64)
    found = linear_cka([x], [x @ rotation * 5 + 2, squeezed, random(50, 7, 9), torch.ones(50, 3)])[0]
    assert float(found[0]) == pytest.approx(1) and 0 < float(found[1]) < 0.9 and float(found[2]) < 0.5
    assert float(found[3]) == 0, "the same in all rows"
