"""Timestep clusters as tasks: timesteps, weights and projections, against their definitions."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finectl.diffusion.config import DiffusionConfig
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError, UsageError
from finectl.training.batches import Part
from finectl.training.multitask import METHODS, extra_bytes, make_tasks, require_even
from finectl.training.multitask.clusters import Stratified, of_cluster, require_all_in_each, sums_by_cluster
from finectl.training.multitask.gradients import Gathered, add_products, cosines, gradient_gram
from finectl.training.multitask.nash import UPDATE_EVERY, Nash, bargaining_solution
from finectl.training.multitask.pcgrad import projected_sum
from finectl.training.multitask.uncertainty import Uncertainty
from finectl.world import World

LINEAR = NoiseSchedule.linear()


def timesteps(clusters: int, count: int, step: int = 0, schedule: NoiseSchedule = LINEAR) -> torch.Tensor:
    return Stratified(clusters)(count, schedule, step=step, generator=generator_for("train", 0, 0, step))


def test_each_cluster_has_its_share_of_every_batch() -> None:
    t = timesteps(4, 64)
    assert t.shape == (64,) and t.dtype == torch.int64
    assert torch.equal(t // 250, torch.arange(64) % 4), "image b belongs to interval b mod k"
    assert torch.equal(t, timesteps(4, 64)) and not torch.equal(t, timesteps(4, 64, step=1))


def test_timesteps_are_uniform_in_their_interval_ends_included() -> None:
    odd = NoiseSchedule.from_config(DiffusionConfig(timesteps=11))
    drawn = timesteps(3, 30_000, schedule=odd)
    seen = [Counter(drawn[cluster::3].tolist()) for cluster in range(3)]
    assert [sorted(one) for one in seen] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    for one in seen:
        expected = 10_000 / len(one)
        assert all(abs(count - expected) < 5 * math.sqrt(expected) for count in one.values())


def test_a_batch_that_clusters_do_not_divide_is_refused_with_the_nearest_sizes() -> None:
    require_even(128, 4, 1000)
    with pytest.raises(UsageError, match="5 timestep clusters") as caught:
        require_even(128, 5, 1000)
    assert "125 or 130" in caught.value.fix
    with pytest.raises(UsageError) as caught:
        require_even(3, 4, 1000)
    assert "--batch-size 4," in caught.value.fix
    with pytest.raises(UsageError, match="12 of 10 timesteps"):
        require_even(12, 12, 10)


def test_parts_without_a_cluster_are_refused() -> None:
    def batches(size: int, world: int, parts: int) -> Any:
        return SimpleNamespace(batch_size=size, world=World(size=world), slots=[None] * parts)

    require_all_in_each(batches(32, 2, 4), 4)
    with pytest.raises(UsageError, match="parts of 3 images") as caught:
        require_all_in_each(batches(28, 2, 4), 4)
    assert "at least 32" in caught.value.expected


def test_the_clusters_of_a_part_are_its_images() -> None:
    values, seen = torch.arange(40), []
    for start, stop in ((0, 13), (13, 26), (26, 40)):
        part = Part(slice(start, stop), values[start:stop, None], values[start:stop] * 2)
        for cluster in range(4):
            mine = of_cluster(part, cluster, 4)
            assert torch.equal(values[mine.slots], mine.x0[:, 0]) and torch.equal(mine.labels, 2 * mine.x0[:, 0])
            assert bool((mine.x0 % 4 == cluster).all())
            seen += mine.x0[:, 0].tolist()
    assert sorted(seen) == values.tolist()


def test_sums_by_cluster() -> None:
    losses, slots = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([3, 4, 5, 6, 9])
    assert sums_by_cluster(losses, slots, 3).tolist() == [25.0, 2.0, 4.0]


def test_uncertainties_reach_the_optimum_of_their_loss() -> None:
    """It is log(L_i / k), whatever the start."""
    parts = torch.tensor([0.9, 0.04, 0.3, 2.5], dtype=torch.float64) / 4
    tasks = Uncertainty(4, 0)
    assert tasks.weights().tolist() == [0.5] * 4 and tasks.lr == 0.025
    optimizer = torch.optim.AdamW(tasks.parameters().values(), lr=tasks.lr, weight_decay=0.0)
    for _ in range(1500):
        tasks.learn(parts)
        optimizer.step()
    torch.testing.assert_close(tasks.s.detach(), parts.log().float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(tasks.weights(), (0.5 / parts).float(), atol=1e-2, rtol=1e-3)


def test_the_gradient_of_uncertainties_is_that_of_their_loss() -> None:
    losses, tasks = torch.tensor([0.7, 0.1, 3.0]), Uncertainty(3, 0)
    with torch.no_grad():
        tasks.s.copy_(torch.tensor([0.3, -1.0, 0.5]))
    s = tasks.s.detach().clone().requires_grad_()
    (0.5 * (torch.exp(-s) * losses / 3 + s)).sum().backward()
    tasks.learn(losses.double() / 3)
    torch.testing.assert_close(tasks.s.grad, s.grad)


def residual(gram: torch.Tensor) -> float:
    alpha = bargaining_solution(gram)
    assert bool((alpha > 0).all()) and alpha.dtype == torch.float64
    return float((gram @ alpha - 1 / alpha).abs().max())


def gram_of(vectors: torch.Tensor) -> torch.Tensor:
    gram = vectors @ vectors.T
    return gram / gram.norm()


@pytest.mark.parametrize("count", [2, 4, 5, 10])
def test_bargaining_on_random_matrices(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    for width in (count, count + 1, 1000):
        for _ in range(20):
            vectors = torch.randn(count, width, generator=random, dtype=torch.float64)
            scales = 10 ** (4 * torch.rand(count, 1, generator=random, dtype=torch.float64) - 2)
            assert residual(gram_of(vectors)) < 1e-8
            assert residual(gram_of(vectors * scales)) < 1e-6


def test_bargaining_on_matrices_that_are_nearly_or_quite_singular() -> None:
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 50, generator=random, dtype=torch.float64)
    for distance in (1e-2, 1e-4, 1e-6, 1e-8, 0.0):
        alike, opposed, zero = vectors.clone(), vectors.clone(), vectors.clone()
        alike[1] = alike[0] + distance * alike[1]
        opposed[1] = -opposed[0] + distance * opposed[1]
        zero[2] *= distance
        for one in (alike, opposed, zero):
            assert residual(gram_of(one)) < 1e-6, distance
    assert residual(gram_of(torch.ones(4, 1, dtype=torch.float64))) < 1e-8, "one gradient, four times"


def test_bargaining_in_closed_form() -> None:
    """Orthogonal gradients: alpha_i is 1 / |g_i|. Two of equal length: (1 + cosine)^(-1/2) of that."""
    sizes = torch.tensor([0.9, 0.4, 0.16], dtype=torch.float64)
    torch.testing.assert_close(bargaining_solution(sizes.square().diag()), 1 / sizes)
    for cosine in (-0.9, 0.0, 0.5, 1.0):
        gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        expected = torch.full((2,), (1 + cosine) ** -0.5, dtype=torch.float64)
        torch.testing.assert_close(bargaining_solution(gram), expected)


def test_alpha_is_renewed_every_25_steps_and_frozen_between() -> None:
    tasks = Nash(3, 0)
    assert [step for step in range(60) if tasks.separates(step)] == [0, UPDATE_EVERY, 2 * UPDATE_EVERY] == [0, 25, 50]
    assert [tasks.separated(steps) for steps in (0, 1, 25, 26, 60)] == [0, 1, 1, 2, 3]
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, -0.5], [0.0, -0.5, 9.0]], dtype=torch.float64)
    alpha = tasks.solve(gram, 0).clone()
    torch.testing.assert_close(alpha, bargaining_solution(gram / gram.norm()))
    torch.testing.assert_close(tasks.solve(100 * gram, 25), alpha), "the size of the losses does not matter"
    for ruined in (torch.zeros(3, 3), torch.full((3, 3), math.nan)):
        assert torch.equal(tasks.solve(ruined.double(), 50), tasks.alpha) and bool(torch.isfinite(tasks.alpha).all())
    assert tasks.weights().dtype == torch.float32


def surgery(gradients: torch.Tensor, orders: list[list[int]]) -> torch.Tensor:
    """PCGrad on the vectors themselves."""
    total = torch.zeros_like(gradients[0])
    for own, order in enumerate(orders):
        projected = gradients[own].clone()
        for other in order:
            product = projected @ gradients[other]
            if other != own and product < 0:
                projected -= product / (gradients[other] @ gradients[other]) * gradients[other]
        total += projected
    return total


@pytest.mark.parametrize("count", [2, 4, 7])
def test_projected_gradients_equal_a_direct_computation(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    changed = 0
    for _ in range(20):
        gradients = torch.randn(count, 12, generator=random, dtype=torch.float64)
        orders = [torch.randperm(count, generator=random).tolist() for _ in range(count)]
        weights = projected_sum(gradients @ gradients.T, orders)
        torch.testing.assert_close(weights @ gradients, surgery(gradients, orders))
        changed += not torch.allclose(weights, torch.ones(count, dtype=torch.float64))
    assert changed > 4, "there were conflicts"


def test_gradients_that_agree_are_summed_as_they_are() -> None:
    gradients = torch.rand(4, 6, dtype=torch.float64)
    gradients[3] = 0
    tasks = make_tasks("pcgrad", 4, 0)
    assert tasks.solve(gradients @ gradients.T, 0).tolist() == [1.0] * 4


def test_the_order_of_projections_is_a_function_of_seed_and_step() -> None:
    vectors = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gram = vectors @ vectors.T

    def weights(seed: int, step: int) -> list[float]:
        return make_tasks("pcgrad", 6, seed).solve(gram, step).tolist()

    assert weights(0, 3) == weights(0, 3)
    assert weights(0, 3) != weights(0, 4) and weights(0, 3) != weights(1, 3)


def test_gathered_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2))
    net[1].weight.requires_grad_(False)
    gathered = Gathered(net.parameters(), copied=False)
    rows = []
    for index in range(3):
        # The last layer has a gradient in one of the three only.
        output = net(torch.randn(5, 3)) if index == 1 else net[:2](torch.randn(5, 3))
        output.square().sum().backward()
        rows.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()])
        )
        gathered.take()
        assert all(p.grad is None for p in net.parameters())
    expected = torch.stack(rows).double()
    gram = gathered.gram(World())
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram, expected @ expected.T)
    gathered.put([0.5, -2.0, 3.0])
    found = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(found, 0.5 * rows[0] - 2 * rows[1] + 3 * rows[2])


def test_products_of_long_vectors_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision would lose what is summed here."""
    monkeypatch.setattr("finectl.training.multitask.gradients.COLUMNS", 7)
    rows = [torch.cat([torch.tensor([1e4]), torch.full((100,), 1e-3)]), torch.ones(101)]
    gram = torch.zeros(2, 2, dtype=torch.float64)
    add_products(gram, rows)
    wide = torch.stack(rows).double()
    torch.testing.assert_close(gram, wide @ wide.T, rtol=1e-14, atol=0)


@pytest.mark.parametrize("memory_bytes", [1, 4 * 5 * 4, 300, 2**30])
def test_the_gram_of_many_gradients_keeps_no_more_than_it_may(
    memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    spare = nn.Parameter(torch.ones(3))
    data = torch.randn(5, 2, 6, 3)  # 5 losses, each of 2 batches
    calls: list[int] = []
    widest = [0]
    real = add_products

    def watch(gram: torch.Tensor, rows: Any) -> None:
        widest[0] = max(widest[0], sum(row.numel() * row.element_size() for row in rows))
        real(gram, rows)

    monkeypatch.setattr("finectl.training.multitask.gradients.add_products", watch)

    def losses(index: int) -> Any:
        calls.append(index)
        return (net(batch).square().mean() for batch in data[index])

    found = gradient_gram(losses, 5, [*net.parameters(), spare], memory_bytes=memory_bytes)
    gradients = []
    for batches in data:
        net.zero_grad()
        sum(net(batch).square().mean() for batch in batches).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in net.parameters()]).double())
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    weights = sum(parameter.numel() for parameter in net.parameters()) + 3
    width = max(1, memory_bytes // 20)
    assert widest[0] <= max(memory_bytes, 20) and len(calls) == 5 * math.ceil(weights / width)
    wanted = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in gradients]) for a in gradients])
    torch.testing.assert_close(cosines(found), wanted, rtol=1e-4, atol=1e-4)


def test_cosines_beside_a_vector_of_zeros() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert cosines(gram).tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_table_of_methods() -> None:
    for name in METHODS:
        tasks = make_tasks(name, 3, 0)
        assert tasks.clusters == 3 and bool(tasks.separated(100)) is METHODS[name].gathers
    assert METHODS["ant-nash"].clip_grad == 1.0 and METHODS["ant-uw"].clip_grad == 0.0
    assert extra_bytes("ant-uw", 4, 1000) == 0 and extra_bytes("pcgrad", 4, 1000) == 12_000


def test_a_state_of_other_tasks_is_refused() -> None:
    with pytest.raises(InputError, match="nothing") as caught:
        Nash(4, 0).load_state_dict({})
    assert "--no-resume" in caught.value.fix
    with pytest.raises(InputError):
        Uncertainty(4, 0).load_state_dict({"s": torch.zeros(5)})
