"""Diff-Tuning's coefficients: which timesteps are drawn, what losses count, and what a teacher is asked."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import images, job, same, settings
from test_consistency import DENSE, UNET, Counting, network
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.diffusion.losses import Noised, denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError, Interrupted, UsageError
from finectl.training.batches import Batches, Retained
from finectl.training.chain import SAMPLING, WEIGHT, WEIGHTS, retained_of
from finectl.training.consistency import checksum
from finectl.training.flops import count_forward, training_flops
from finectl.training.loop import Trained, fit
from finectl.training.retention import Chain, ChainLoss, ChainTimesteps
from finectl.training.run import plain_loss
from finectl.training.timesteps import RangeTimesteps
from finectl.world import World

SCHEDULE = NoiseSchedule.of(DENSE)
T = len(SCHEDULE)
SIGMA = replace(DENSE, learn_sigma=True)
CONFIGS = {"dit": DENSE, "dit-sigma": SIGMA, "unet": UNET}


def draws(chain: Chain, steps: int = 400) -> tuple[Tensor, Tensor]:
    """Return the timesteps of retained and of new images in so many batches."""
    drawn = [
        ChainTimesteps(chain)(chain.batch, SCHEDULE, step=step, generator=generator_for("test", step))
        for step in range(steps)
    ]
    every = torch.stack(drawn).double()
    return every[:, : chain.retained].flatten(), every[:, chain.retained :].flatten()


def batch(count: int = 5) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(count, 1, 8, 8, generator=random) for _ in range(2))
    t = torch.tensor([0, 10, 500, 900, 999, 3, 700])[:count]
    return x0, torch.full((count,), 10), t, noise


def bank(count: int = 20) -> ImageSet:
    """Return images that no data set has, with the null label."""
    random = torch.Generator().manual_seed(1)
    made = 0.5 * torch.rand(count, 1, 8, 8, generator=random)
    return ImageSet.in_memory(images().info, "train", made, torch.full((count,), 10))


def tuned(directory: Path, net: Any, chain: Chain, teacher: Any = None, stop_after: int = 0, **run: Any) -> Trained:
    return fit(
        job(directory, stop_after, **run), net, images(), settings(eval_every=0), loss=ChainLoss(chain, teacher),
        timesteps=ChainTimesteps(chain), retained=Retained(bank(), chain.retained) if chain.retained else None,
    )  # fmt: skip


def test_new_images_are_drawn_at_high_noise_and_retained_ones_at_low_noise() -> None:
    kept, new = draws(Chain(100, 50))
    assert len(kept) == len(new) == 20_000
    assert float(new.mean()) == pytest.approx(666, abs=5) and float(kept.mean()) == pytest.approx(333, abs=5)
    assert float((new >= 500).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float((new < 250).double().mean()) == pytest.approx(0.063, abs=0.006)
    assert float((kept < 500).double().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(kept.min()) == 0 and float(new.max()) == T - 1


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_each_timestep_is_drawn_in_proportion_to_its_coefficient(power: float) -> None:
    chain = Chain(64, 32, power=power, retention_power=power)
    t = torch.arange(T, dtype=torch.float64)
    for found, coefficient in zip(draws(chain), (chain.xi(t, T), chain.psi(t, T)), strict=True):
        wanted = (coefficient / coefficient.sum()).view(10, 100).sum(1)
        share = torch.histc(found, 10, 0, T) / len(found)
        assert torch.allclose(share, wanted, atol=4 * (0.25 / len(found)) ** 0.5)
    means = chain.mean_timesteps(T)
    assert means["target"] == pytest.approx(float(draws(chain)[1].mean()), abs=8)
    assert means["retained"] == pytest.approx(T - 1 - means["target"], abs=1e-6)


def test_with_weights_every_timestep_is_as_likely() -> None:
    kept, new = draws(Chain(100, 50, coefficients=WEIGHTS, weight=1.0))
    assert float(kept.mean()) == pytest.approx(499.5, abs=6) and float(new.mean()) == pytest.approx(499.5, abs=6)


def test_new_images_of_an_expert_are_drawn_in_its_range() -> None:
    chain = Chain(64, 32)
    inside = ChainTimesteps(chain, RangeTimesteps(250, 500, 0.0))
    drawn = torch.stack(
        [inside(64, SCHEDULE, step=step, generator=generator_for("test", step)) for step in range(200)]
    ).double()
    assert float(drawn[:, 32:].min()) >= 250 and float(drawn[:, 32:].max()) < 500
    assert float(drawn[:, 32:].mean()) == pytest.approx(374.5, abs=5)
    assert float(drawn[:, :32].mean()) == pytest.approx(333, abs=12) and float(drawn[:, :32].max()) > 900


def test_sampling_is_twice_the_weighted_loss() -> None:
    """E_p[l] = E_U[psi l] / E_U[psi], in closed form over all timesteps and from draws."""
    chain = Chain(100, 50)
    t = torch.arange(T, dtype=torch.float64)
    losses = 1.0 + (t / 100).sin()  # some loss that depends on t
    psi, xi = chain.psi(t, T), chain.xi(t, T)
    factor = 1 / float(psi.mean())
    assert factor == pytest.approx(2, abs=0.003) and 1 / float(xi.mean()) == pytest.approx(factor)
    kept, new = draws(chain)
    assert float(losses[new.long()].mean()) == pytest.approx(factor * float((psi * losses).mean()), rel=0.02)
    assert float(losses[kept.long()].mean()) == pytest.approx(factor * float((xi * losses).mean()), rel=0.02)
    # What the two ways count, from the same draws' distribution: the losses' own factors are psi and xi.
    weights = ChainLoss(replace(chain, coefficients=WEIGHTS, weight=1.0))
    kept_t, new_t = (drawn.long() for drawn in draws(weights.chain))
    found = [
        float((losses[drawn] * weights.factors(drawn, first, T) / 2).mean())
        for drawn, first in ((kept_t, len(kept_t)), (new_t, 0))
    ]
    assert found[0] == pytest.approx(float((xi * losses).mean()), rel=0.03)
    assert found[1] == pytest.approx(float((psi * losses).mean()), rel=0.03)


def test_a_fifth_of_a_batch_is_retained() -> None:
    assert [retained_of(batch, 0.2) for batch in (32, 5, 10, 256, 128)] == [6, 1, 2, 51, 25]
    assert Chain(32, retained_of(32, 0.2)).new == 26 and retained_of(10, 0.3) == 3
    assert WEIGHT == {SAMPLING: 0.1, WEIGHTS: 1.0}
    for share, count in ((0.2, 4), (1.0, 8), (0.0, 8)):
        with pytest.raises(UsageError, match="--retention-share"):
            retained_of(count, share)
    with pytest.raises(UsageError):
        Chain(4, 4)
    with pytest.raises(UsageError, match="unknown coefficients"):
        Chain(4, 1, coefficients="loss")


@pytest.mark.parametrize("coefficients", [SAMPLING, WEIGHTS])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_mean_is_that_of_new_images_plus_lambda_times_that_of_retained_ones(kind: str, coefficients: str) -> None:
    """The bound of a learned variance counts in both."""
    net, (x0, y, t, noise) = network(CONFIGS[kind], 0), batch()
    chain = Chain(5, 2, coefficients=coefficients, weight=WEIGHT[coefficients])
    schedule = NoiseSchedule.of(CONFIGS[kind])
    found = ChainLoss(chain)(net, schedule, Noised(x0, y, t, noise), step=0)
    losses = denoising_loss(net, schedule, x0, y, t, noise)
    if coefficients == WEIGHTS:
        losses = losses * torch.cat([(1000 - t[:2]) / 1000, (t[2:] + 1) / 1000])
    expected = losses[2:].mean() + {SAMPLING: 0.1, WEIGHTS: 1.0}[coefficients] * losses[:2].mean()
    assert found.shape == (5,) and found.dtype == torch.float32
    assert float(found.detach().mean()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize("taught", [False, True])
def test_a_part_counts_as_its_place_in_the_batch_says(taught: bool) -> None:
    net, teacher, (x0, y, t, noise) = network(SIGMA, 0), network(SIGMA, 1) if taught else None, batch(7)
    loss = ChainLoss(Chain(7, 3), teacher)
    whole = loss(net, SCHEDULE, Noised(x0, y, t, noise), step=0)
    for cuts in ((0, 2, 7), (0, 3, 7), (0, 5, 7), (0, 1, 2, 7)):
        slots = [slice(first, end) for first, end in pairwise(cuts)]
        parts = [loss(net, SCHEDULE, Noised(x0[s], y[s], t[s], noise[s], s), step=0) for s in slots]
        assert torch.allclose(torch.cat(parts), whole, rtol=1e-5), cuts


def test_a_teacher_is_asked_for_no_class_of_retained_images_and_gets_no_gradient() -> None:
    student, teacher = Counting(network(SIGMA, 0)), Counting(network(replace(SIGMA, num_classes=3), 1))
    loss = ChainLoss(Chain(5, 2), teacher)
    x0, y, t, noise = batch()
    found = loss(student, SCHEDULE, Noised(x0, y, t, noise), step=0)
    assert (student.calls, teacher.calls) == (1, 1)
    x_t = SCHEDULE.add_noise(x0, noise, t)
    asked = teacher.seen
    assert torch.equal(asked[0], x_t[:2]) and torch.equal(asked[1], t[:2]) and asked[2].tolist() == [3, 3]
    with torch.no_grad():
        distance = (student.inner(x_t[:2], t[:2], y[:2]) - teacher.inner(*asked)).square().flatten(1).mean(1)
    assert distance.shape == (2,) and torch.allclose(found[:2] * 2 / 5 / 0.1, distance), "all channels, no bound"
    new = denoising_loss(student.inner, SCHEDULE, *(part[2:] for part in (x0, y, t, noise)))
    assert torch.allclose(found[2:] * 3 / 5, new)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("taught", [False, True])
def test_every_batch_has_the_retained_images_first_under_the_null_label(taught: bool, tmp_path: Path) -> None:
    net, teacher = network(DENSE, 0), network(DENSE, 1)
    before = checksum(teacher)
    seen: list[tuple[Tensor, ...]] = []
    net.register_forward_hook(lambda _, inputs, __: seen.append(tuple(value.clone() for value in inputs)))
    chain = Chain(8, 2)
    tuned(tmp_path, net, chain, teacher if taught else None)
    assert [len(x) for x, _, _ in seen] == [8] * 10, "one forward pass on all of a batch"
    labels = torch.stack([y for _, _, y in seen])
    assert labels[:, :2].eq(10).all() and not labels[:, 2:].eq(10).all()
    assert checksum(teacher) == before
    loss = ChainLoss(chain, teacher)
    loss.require_unchanged()
    with torch.no_grad():
        next(teacher.parameters()).add_(1)
    with pytest.raises(ComputationError, match="teacher changed"):
        loss.require_unchanged()


@pytest.mark.parametrize("taught", [False, True])
def test_a_killed_and_resumed_run_equals_an_unbroken_one(taught: bool, tmp_path: Path) -> None:
    def go(directory: Path, stop_after: int = 0) -> Trained:
        return tuned(directory, network(DENSE, 0), Chain(8, 3), network(DENSE, 1) if taught else None, stop_after)

    unbroken = go(tmp_path / "one")
    with pytest.raises(Interrupted):
        go(tmp_path / "two", 4)
    resumed = go(tmp_path / "two")
    assert same(unbroken.state, resumed.state) and same(unbroken.ema, resumed.ema)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(tmp_path: Path) -> None:
    one = tuned(tmp_path / "one", network(DENSE, 0), Chain(8, 3))
    cut = tuned(tmp_path / "cut", network(DENSE, 0), Chain(8, 3), accumulate=3)
    # Adam takes steps of full size along gradients that are 0 but for rounding, such as those of the keys' biases.
    apart = torch.cat([(value - cut.state[name]).abs().flatten() for name, value in one.state.items()])
    assert float(apart.median()) < 1e-6 and float((apart > 1e-4).float().mean()) < 0.02


def test_a_teacher_is_counted_for_the_images_it_sees() -> None:
    net, teacher = network(DENSE, 0), network(SIGMA, 1)
    batches = Batches(images(), 8, 0, torch.device("cpu"), World(), retained=Retained(bank(), 2))
    plain = training_flops(net, plain_loss, batches, 10)
    assert plain and training_flops(net, ChainLoss(Chain(8, 2)), batches, 10) == plain
    asked = count_forward(SIGMA, 2)
    assert asked and training_flops(net, ChainLoss(Chain(8, 2), teacher), batches, 10) == plain + 10 * asked
