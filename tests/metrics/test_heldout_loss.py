"""Held-out loss: fixed draws, the value of known models, the interval and the ranges."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finectl.data.dataset import ImageSet, MemoryStore, load
from finectl.diffusion.random import generator_for
from finectl.metrics.heldout_loss import heldout_evaluator, heldout_loss


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load("digits", "heldout")


def zero(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_a_model_that_predicts_nothing_has_the_variance_of_the_noise(digits: ImageSet) -> None:
    assert heldout_loss(zero, digits, draws=10).mean == pytest.approx(1.0, abs=0.01)


def test_a_model_that_knows_the_image_has_no_loss(digits: ImageSet) -> None:
    one = replace(digits, indices=digits.indices[:1])

    def oracle(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        from finectl.diffusion.schedule import NoiseSchedule, at_images

        kept = NoiseSchedule.linear().alphas_cumprod[t]
        return (x - at_images(kept.sqrt(), x) * one.images) / at_images((1 - kept).sqrt(), x)

    assert heldout_loss(oracle, one, draws=20).mean < 1e-6


def test_every_model_sees_the_same_draws_whatever_the_batch_size(digits: ImageSet) -> None:
    seen: list[Tensor] = []

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    first = heldout_loss(record, digits, draws=2, batch_size=100)
    again = heldout_loss(record, digits, draws=2, batch_size=512)
    half = len(seen) - 2
    assert torch.equal(torch.cat(seen[:half]), torch.cat(seen[half:]))
    assert torch.equal(first.timesteps, again.timesteps) and torch.allclose(first.losses, again.losses)
    other = heldout_loss(record, digits, draws=2, seed=1)
    assert not torch.equal(first.timesteps, other.timesteps)


def test_timesteps_are_stratified_and_ranges_cover_them(digits: ImageSet) -> None:
    measured = heldout_loss(zero, digits, draws=10)
    for draw, row in enumerate(measured.timesteps):
        assert 100 * draw <= int(row.min()) and int(row.max()) < 100 * (draw + 1)
    summary = measured.summary(4)
    borders = [(part["first"], part["last"]) for part in summary["ranges"]]
    assert borders == [(0, 249), (250, 499), (500, 749), (750, 999)]
    assert sum(part["terms"] for part in summary["ranges"]) == measured.losses.numel()
    weighted = sum(part["loss"] * part["terms"] for part in summary["ranges"]) / measured.losses.numel()
    assert weighted == pytest.approx(measured.mean)


def test_the_interval_holds_the_value_and_shrinks_with_more_images(digits: ImageSet) -> None:
    whole = heldout_loss(zero, digits, draws=4).summary()
    few = replace(digits, indices=digits.indices[:40])
    part = heldout_loss(zero, few, draws=4).summary()
    for summary in (whole, part):
        low, high = summary["interval"]
        assert low < summary["value"] < high
    assert part["interval"][1] - part["interval"][0] > 2 * (whole["interval"][1] - whole["interval"][0])


def test_a_range_has_an_interval_over_the_images_seen_in_it(digits: ImageSet) -> None:
    few = replace(digits, indices=digits.indices[:40])
    measured = heldout_loss(zero, few, draws=3)
    for count in (1, 2, 4, 7):
        for part in measured.summary(count)["ranges"]:
            means = []
            for losses, times in zip(measured.losses.double().T, measured.timesteps.T, strict=True):
                inside = (times >= part["first"]) & (times <= part["last"])
                means += [float(losses[inside].mean())] if bool(inside.any()) else []
            half = 1.959964 * float(torch.tensor(means, dtype=torch.float64).std()) / len(means) ** 0.5
            assert part["interval"] == pytest.approx([part["loss"] - half, part["loss"] + half])
            assert 0 < half < 0.5
    (one,) = measured.summary(1)["ranges"]
    assert one["loss"] == pytest.approx(measured.mean)
    assert one["interval"] == pytest.approx(measured.summary()["interval"])


def test_a_range_that_no_draw_fell_into_has_no_value(digits: ImageSet) -> None:
    measured = heldout_loss(zero, replace(digits, indices=digits.indices[:2]), draws=1)
    parts = measured.summary(1000)["ranges"]
    assert sum(part["terms"] for part in parts) == 2 and len(parts) == 1000
    for part in parts:
        assert (part["loss"] is None) == (part["interval"] is None) == (part["terms"] == 0)
    json.dumps([part for part in parts if part["terms"] == 0], allow_nan=False)


def test_a_learned_variance_does_not_count(digits: ImageSet) -> None:
    def with_variance(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.full_like(x, 3.0)], dim=1)

    assert heldout_loss(with_variance, digits, draws=2).mean == heldout_loss(zero, digits, draws=2).mean
    assert heldout_evaluator(digits)(zero) == pytest.approx(1.0, abs=0.02)


def test_the_draws_of_a_small_set_are_those_of_earlier_versions(digits: ImageSet) -> None:
    measured = heldout_loss(zero, digits, draws=2)
    for draw in range(2):
        random = generator_for("heldout", 0, draw)
        part = torch.rand(len(digits), generator=random)
        noise = torch.randn((len(digits), *digits.shape), generator=random)
        assert torch.equal(measured.timesteps[draw], ((draw + part) / 2 * 1000).long())
        torch.testing.assert_close(measured.losses[draw], noise.square().mean((1, 2, 3)))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_large_set_is_read_and_drawn_by_parts(
    sampled: bool, digits: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finectl.metrics.heldout_loss.CHUNK_IMAGES", 50)
    sizes: list[int] = []

    class Parts(MemoryStore):
        def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
            sizes.append(len(indices))
            return super().read(indices, flips)

        def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
            assert (noise is not None) == sampled
            return super().transform(raw) + (0 if noise is None else noise)

    store = digits.store
    assert isinstance(store, MemoryStore)
    data = replace(digits, store=Parts(store.images, store.labels, store.largest, sampled))
    seen: list[Tensor] = []

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x.clone())
        return torch.zeros_like(x)

    first = heldout_loss(record, data, draws=2, batch_size=7)
    assert max(sizes) == 7
    again = heldout_loss(record, data, draws=2, batch_size=1000)
    assert max(sizes) == 50
    torch.testing.assert_close(first.losses, again.losses)
    assert torch.equal(torch.cat(seen)[: 2 * 359], torch.cat(seen)[2 * 359 :])
    assert len(first.losses.unique()) == 2 * 359  # no two parts or draws have the same noise


def test_training_looks_at_a_part_of_a_large_set(digits: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finectl.metrics.heldout_loss.TRAINING_IMAGES", 100)
    labels: list[Tensor] = []

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels.append(y)
        return torch.zeros_like(x)

    heldout_evaluator(digits, draws=1)(record)
    assert torch.cat(labels).bincount().tolist() == [10] * 10
