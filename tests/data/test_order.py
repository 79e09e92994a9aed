"""The order of training samples."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finectl.data.order import batch_indices, epoch_permutation
from finectl.errors import InputError, UsageError


def stream(count: int, batch_size: int, length: int, seed: int) -> list[int]:
    steps = -(-length // batch_size)
    return torch.cat([batch_indices(count, batch_size, step, seed) for step in range(steps)]).tolist()[:length]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(count: int, batch_size: int, seed: int) -> None:
    samples = stream(count, batch_size, 3 * count, seed)
    for epoch in range(3):
        assert sorted(samples[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), first=st.integers(1, 50), second=st.integers(1, 50))
def test_the_stream_does_not_depend_on_the_batch_size(count: int, first: int, second: int) -> None:
    assert stream(count, first, 100, seed=3) == stream(count, second, 100, seed=3)


def test_a_step_does_not_depend_on_the_calls_before_it() -> None:
    late = batch_indices(23, 7, 1000, seed=5)
    epoch_permutation.cache_clear()
    for step in range(20):
        batch_indices(23, 7, step, seed=5)
    assert torch.equal(batch_indices(23, 7, 1000, seed=5), late)


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_permutation(50, epoch, seed).tolist()) for epoch in range(4) for seed in range(4)}
    assert len(orders) == 16


def test_the_order_is_that_of_earlier_versions() -> None:
    assert batch_indices(10, 12, 3, seed=0).tolist() == EXPECTED
    assert batch_indices(10, 12, 3, seed=0).dtype == torch.int64


def test_writing_to_a_batch_does_not_change_the_stream() -> None:
    before = batch_indices(10, 4, 0, seed=1).tolist()
    batch_indices(10, 4, 0, seed=1).fill_(0)
    assert batch_indices(10, 4, 0, seed=1).tolist() == before


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InputError, match="0 images"):
        batch_indices(0, 4, 0, seed=0)
    with pytest.raises(UsageError, match="batch size 0"):
        batch_indices(4, 0, 0, seed=0)
    with pytest.raises(UsageError, match="step -1"):
        batch_indices(4, 1, -1, seed=0)


def test_the_order_does_not_depend_on_how_a_batch_is_sliced() -> None:
    """Ranks and accumulation take slices of the global batch: put together they are that batch."""
    count, batch = 37, 12
    for step in range(7):
        whole = batch_indices(count, batch, step, seed=9)
        for pieces in (1, 2, 3, 4, 6):
            size = batch // pieces
            parts = [batch_indices(count, size, step * pieces + piece, seed=9) for piece in range(pieces)]
            assert torch.equal(torch.cat(parts), whole)
            ranks = [whole[rank::pieces] for rank in range(pieces)]
            assert torch.equal(torch.stack(ranks, 1).flatten(), whole)


def test_the_order_of_a_large_set_is_made_once_an_epoch() -> None:
    count, batch = 1_281_167, 256
    batch_indices(count, batch, 0, seed=0)
    made = epoch_permutation.cache_info().misses
    start_s = time.perf_counter()
    for step in range(count // batch - 300, count // batch + 300):  # across the end of an epoch
        batch_indices(count, batch, step, seed=0)
    assert epoch_permutation.cache_info().misses == made + 1
    assert time.perf_counter() - start_s < 3


EXPECTED = [2, 9, 3, 8, 6, 8, 4, 3, 9, 0, 5, 1]
