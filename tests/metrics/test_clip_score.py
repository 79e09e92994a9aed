"""The CLIP score of given embeddings."""

from __future__ import annotations

import math

import pytest
import torch

from finectl.errors import InputError
from finectl.metrics.clip_score import clip_score


def pairs(count: int, dim: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, dim, generator=generator)
    return images, images + torch.randn(count, dim, generator=generator)


def test_the_value_is_that_of_torchmetrics() -> None:
    images, texts = pairs(40)
    # torchmetrics: 100 * sum of the products of embeddings that were divided by their 2-norms, then the mean.
    one, two = images / images.norm(p=2, dim=-1, keepdim=True), texts / texts.norm(p=2, dim=-1, keepdim=True)
    each = 100 * (one * two).sum(axis=-1)
    assert each.min() > 0, "else the two differ in what they clip"
    measured = clip_score(images, texts)
    assert measured.value == pytest.approx(float(each.mean()), rel=1e-6)
    half = 1.96 * float(each.std()) / math.sqrt(40)
    assert (measured.high - measured.value) == pytest.approx(half, rel=1e-3)
    assert measured.low < measured.value < measured.high
    assert measured.details["n"] == 40


def test_known_pairs() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    texts = torch.tensor([[6.0, 8.0], [5.0, 5.0], [0.0, -7.0]])
    expected = (100 + 100 / math.sqrt(2) + 0) / 3  # the last pair's cosine is -1 and counts as 0
    assert clip_score(images, texts).value == pytest.approx(expected, rel=1e-12)


def test_lengths_and_order_do_not_count() -> None:
    images, texts = pairs(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    first, second = clip_score(images, texts), clip_score(7 * images[order], 0.1 * texts[order])
    assert second.value == pytest.approx(first.value, rel=1e-6)
    assert clip_score(images, texts[order]).value < first.value - 10, "which prompt belongs to which image counts"


def test_not_finite_embeddings_give_no_number() -> None:
    images, texts = pairs(3)
    images[1, 2] = math.nan
    assert math.isnan(clip_score(images, texts).value)


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((0, 4), (0, 4)), ((4,), (4,))])
def test_what_is_no_pairs_is_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="CLIP score") as caught:
        clip_score(torch.ones(shapes[0]), torch.ones(shapes[1]))
    assert str(shapes[0]) in caught.value.what and str(shapes[1]) in caught.value.what
