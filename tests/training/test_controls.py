"""Pairs of texts and controls as rows of one table, and a loss that leaves texts out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from finectl.diffusion.losses import Noised
from finectl.training import controls
from finectl.training.controls import InMemory, Pairs, WithoutTexts, pair_up

SIDE = 4


class Texts:
    """Text k is the vector k; the last one is empty."""

    length = 1

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def gather(self, rows: Tensor) -> Tensor:
        return rows.float()[:, None, None].expand(-1, 1, 2)


def levels(*values: int, channels: int = 1) -> InMemory:
    return InMemory(torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, channels, SIDE, SIDE))


def told(pairs: Pairs, rows: Tensor) -> list[tuple[float, float]]:
    texts, maps = pairs.table.texts(rows), pairs.table.controls(rows)
    assert maps.shape == (len(rows), 3, SIDE, SIDE) and maps.dtype == torch.float32
    assert bool((maps == maps[:, :1, :1, :1]).all())
    return list(zip(texts[:, 0, 0].tolist(), (maps[:, 0, 0, 0] * 255).round().tolist(), strict=True))


@pytest.fixture(params=["whole", "mapped"])
def _held(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mapped":
        monkeypatch.setattr(controls, "WHOLE_BYTES", 0)


@pytest.mark.usefixtures("_held")
def test_rows_are_pairs_the_same_without_texts_retained_ones_and_nothing() -> None:
    texts: Any = Texts(6)
    pairs = pair_up(texts, torch.tensor([3, 1]), levels(10, 20), SIDE, torch.tensor([2, 4, 2]))
    assert pairs.null == 7 and pairs.retained.tolist() == [4, 5, 6]
    rows = torch.tensor([7, 0, 1, 2, 3, 4, 5, 6, 0])
    assert told(pairs, rows) == [(5, 0), (3, 10), (1, 20), (5, 10), (5, 20), (2, 0), (4, 0), (2, 0), (3, 10)]
    own = pair_up(texts, torch.tensor([3, 1]), levels(10, 20), SIDE, torch.tensor([2]), levels(30, channels=3))
    assert told(own, torch.tensor([4, 5, 1])) == [(2, 30), (5, 0), (1, 20)]


def test_texts_are_left_out_at_random_and_controls_are_not() -> None:
    count, batch, seen = 50, 64, {}

    def loss(model: Any, schedule: Any, batch: Noised, *, step: int) -> Tensor:
        seen[step, str(batch.slots)] = batch.y
        return batch.y.float()

    wrapped = WithoutTexts(loss, count, batch, 0.5, seed=1)  # type: ignore[arg-type]
    y = torch.arange(batch) % count
    y[:4] = 2 * count  # retained images keep theirs

    def call(step: int, slots: slice | None = None) -> Tensor:
        rows = y if slots is None else y[slots]
        return wrapped(None, None, Noised(rows, rows, rows, rows, slots), step=step).long()  # type: ignore[arg-type]

    first = call(0)
    dropped = first != y
    assert torch.equal(first[dropped], y[dropped] + count) and not dropped[:4].any()
    assert 15 < int(dropped.sum()) < 45 and not torch.equal(call(1), first) and torch.equal(call(0), first)
    parts = torch.cat([call(0, slice(0, 20)), call(0, slice(20, 64))])
    assert torch.equal(parts, first), "the draws depend on how the batch is shared"
    assert torch.equal(WithoutTexts(loss, count, batch, 0.0, 1)(None, None, Noised(y, y, y, y), step=0).long(), y)  # type: ignore[arg-type]
