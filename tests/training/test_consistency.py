"""The loss with a frozen teacher: its value, what it computes, and what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, images, job, run, same, settings
from torch import Tensor, nn

from finectl.adapters.projection import add_projections, identity_state
from finectl.diffusion.losses import Noised, denoising_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError, InputError, Interrupted, UsageError
from finectl.models.dit import DiT
from finectl.models.io import build_model
from finectl.models.unet_config import UNetConfig
from finectl.training.consistency import Consistency, RefreshedConsistency, checksum
from finectl.training.flops import count_forward
from finectl.training.loop import fit
from finectl.training.settings import USUAL_BETAS, parse_betas, settled_betas
from finectl.training.step import ema_decay, make_optimizer
from finectl.training.timesteps import RangeTimesteps

DENSE = replace(CONFIG, factorized=None)
UNET = UNetConfig(
    "unet2d",
    {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1, "norm_num_groups": 4,
    },
    image_size=8,
    channels=1,
    parameters=1,
)  # fmt: skip
CONFIGS = {"dit": DENSE, "dit-sigma": replace(DENSE, learn_sigma=True), "unet": UNET}


def network(config: Any, seed: int) -> Any:
    model = build_model(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


def batch() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(5, 1, 8, 8, generator=random) for _ in range(2))
    return x0, torch.tensor([0, 1, 2, 3, 3]), torch.tensor([0, 10, 500, 900, 999]), noise


class Counting(nn.Module):
    """A model that counts its forward passes."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config, self.calls = inner, inner.config, 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.seen = (x, t, y)
        return self.inner(x, t, y)


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_loss_is_both_errors_on_the_same_noisy_images(kind: str, weight: float) -> None:
    config = CONFIGS[kind]
    student, teacher = Counting(network(config, 0)), Counting(network(config, 1))
    loss = Consistency(teacher, weight)
    schedule = NoiseSchedule.of(config)
    x0, y, t, noise = batch()
    found = loss(student, schedule, Noised(x0, y, t, noise), step=0)
    assert (student.calls, teacher.calls) == (1, 1)
    assert all(torch.equal(one, two) for one, two in zip(student.seen, teacher.seen, strict=True))
    x_t = schedule.add_noise(x0, noise, t)
    with torch.no_grad():
        ours, theirs = (model.inner(x_t, t, y)[:, :1] for model in (student, teacher))
    distance = (ours - theirs).square().flatten(1).mean(1)
    expected = denoising_loss(student.inner, schedule, x0, y, t, noise) + weight * distance
    assert found.shape == (5,) and found.dtype == torch.float32 and float(distance.detach().min()) > 0
    assert torch.allclose(found, expected)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_both_networks_see_every_image_once_wherever_its_timestep_falls(p: float, parts: int, tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    nets = {"student": network(DENSE, 0), "teacher": network(DENSE, 1)}
    for name, net in nets.items():
        net.register_forward_hook(lambda _, inputs, __, name=name: seen[name].append(inputs[1].clone()))
    fit(
        job(tmp_path, accumulate=parts), nets["student"], images(), settings(eval_every=0),
        loss=Consistency(nets["teacher"]), timesteps=RangeTimesteps(250, 500, p, "sample", antithetic=True),
    )  # fmt: skip
    ours, theirs = seen["student"], seen["teacher"]
    assert [len(t) for t in ours] == [8 // parts] * (10 * parts)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    assert bool((torch.cat(ours) < 250).any()) == (p > 0)


def test_a_student_that_is_the_teacher_has_the_plain_loss() -> None:
    student, teacher = network(DENSE, 0), network(DENSE, 0)
    schedule = NoiseSchedule.of(DENSE)
    x0, y, t, noise = batch()
    student.eval()
    found = Consistency(teacher)(student, schedule, Noised(x0, y, t, noise), step=0)
    assert torch.equal(found, denoising_loss(student, schedule, x0, y, t, noise))


def test_training_leaves_the_teacher_alone_and_counts_its_work(tmp_path: Path) -> None:
    teacher = network(DENSE, 1)
    before = checksum(teacher)
    loss = Consistency(teacher, 1.0)
    trained = run(tmp_path / "a", start=network(DENSE, 1), loss=loss)
    loss.require_unchanged()
    assert checksum(teacher) == before
    plain = run(tmp_path / "b", start=network(DENSE, 1))
    one = count_forward(DENSE, settings().batch_size)
    assert one is not None and trained.cost["flops"] == plain.cost["flops"] + 10 * one
    assert not same(trained.state, plain.state)


def test_a_teacher_that_changed_is_an_error() -> None:
    teacher = network(DENSE, 1)
    loss = Consistency(teacher)
    name, weight = list(teacher.named_parameters())[5]
    weight.data.view(-1)[0] += 1e-6
    with pytest.raises(ComputationError, match="teacher changed"):
        loss.require_unchanged()
    other = network(DENSE, 1)
    assert checksum(other) != checksum(teacher), name


def test_a_run_with_a_teacher_and_a_range_resumes_bit_for_bit(tmp_path: Path) -> None:
    changed = settings(ema=0.9999, ema_power=0.75, betas="0.95,0.999", clip_grad=1.0, eval_every=0)
    timesteps = RangeTimesteps(250, 500, 0.4, antithetic=True)

    def go(where: Path, stop_after: int = 0) -> Any:
        student: DiT = network(DENSE, 1)
        loss = Consistency(network(DENSE, 1))
        return fit(job(where, stop_after), student, images(), changed, loss=loss, timesteps=timesteps)

    whole = go(tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tmp_path / "broken", stop_after=4)
    resumed = go(tmp_path / "broken")
    assert same(whole.state, resumed.state) and same(whole.ema, resumed.ema)


@pytest.mark.parametrize("config", [DENSE, add_projections(DENSE, "blocks")], ids=["plain", "projected"])
def test_a_refreshed_teacher_is_the_average_at_the_start_of_its_epoch(config: Any, tmp_path: Path) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    averages: dict[int, dict[str, Tensor]] = {}

    class Watched(RefreshedConsistency):
        def begin(self, step: int, ema: Any) -> None:
            averages[step] = {name: value.clone() for name, value in ema.state_dict().items()}
            super().begin(step, ema)

        def __call__(self, *arguments: Any, step: int) -> Tensor:
            seen[step] = {name: value.clone() for name, value in self.state_dict().items()}
            return super().__call__(*arguments, step=step)

    start = network(DENSE, 1)
    student = build_model(config)
    student.load_state_dict({**identity_state(config), **start.state_dict()})
    loss = Watched(network(DENSE, 1), 1.0, epoch=4)
    run(tmp_path, start=student, loss=loss)
    for step in range(10):
        wanted = averages[step // 4 * 4] if step >= 4 else dict(start.named_parameters())
        assert all(torch.equal(value, wanted[name]) for name, value in seen[step].items()), step
        assert set(seen[step]) == set(dict(start.named_parameters())), "projections are left out"
    assert not same(seen[3], seen[4]) and not same(seen[7], seen[8])
    loss.require_unchanged()
    next(loss.teacher.parameters()).data.view(-1)[0] += 1e-6
    with pytest.raises(ComputationError, match="teacher changed"):
        loss.require_unchanged()


def test_an_epoch_begins_once_whatever_the_parts_of_a_batch(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    class Watched(RefreshedConsistency):
        def begin(self, step: int, ema: Any) -> None:
            calls.append(("begin", step))
            super().begin(step, ema)

        def __call__(self, *arguments: Any, step: int) -> Tensor:
            calls.append(("part", step))
            return super().__call__(*arguments, step=step)

    loss = Watched(network(DENSE, 1), 1.0, epoch=3)
    run(tmp_path, start=network(DENSE, 1), loss=loss, execution={"accumulate": 2}, eval_every=0)
    assert calls == [(what, step) for step in range(10) for what in ("begin", "part", "part")]


@pytest.mark.parametrize("stop_after", [2, 3, 4, 5, 8])
def test_a_run_with_a_refreshed_teacher_resumes_bit_for_bit(stop_after: int, tmp_path: Path) -> None:
    def go(where: Path, stop: int = 0, epoch: int = 3) -> Any:
        loss = RefreshedConsistency(network(DENSE, 1), 1.0, epoch)
        try:
            return run(where, stop, start=network(DENSE, 1), loss=loss, eval_every=0)
        finally:
            loss.require_unchanged()

    whole = go(tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tmp_path / "broken", stop_after)
    resumed = go(tmp_path / "broken")
    assert same(whole.state, resumed.state) and same(whole.ema, resumed.ema)
    assert not same(whole.state, go(tmp_path / "frozen", epoch=99).state), "the teacher plays a part"


def test_a_state_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(tmp_path, 4, start=network(DENSE, 1), loss=Consistency(network(DENSE, 1)))
    with pytest.raises(InputError, match="no teacher's"):
        run(tmp_path, start=network(DENSE, 1), loss=RefreshedConsistency(network(DENSE, 1), 1.0, 3))


def test_the_decay_of_the_average_rises_to_its_largest() -> None:
    rising = settings(ema=0.9999, ema_power=0.75)
    assert ema_decay(rising, 0) == 0.0
    assert ema_decay(rising, 1) == pytest.approx(1 - 2**-0.75)
    assert ema_decay(rising, 19_999) == pytest.approx(0.9994, abs=5e-5)
    assert ema_decay(rising, 10**6) == 0.9999
    assert ema_decay(settings(ema=0.9), 0) == 0.9


def test_betas() -> None:
    assert parse_betas(None) == USUAL_BETAS and settled_betas("0.90,0.9990") is None
    assert settled_betas(" 0.95, 0.999") == "0.95,0.999"
    parameter = nn.Parameter(torch.zeros(1))
    assert make_optimizer([parameter], 1e-3, betas=parse_betas("0.95,0.999")).defaults["betas"] == (0.95, 0.999)
    assert make_optimizer([parameter], 1e-3).defaults["betas"] == torch.optim.AdamW([parameter]).defaults["betas"]
    for wrong in ("0.9", "0.9,1", "-0.1,0.9", "a,b", "0.9,0.9,0.9", "nan,0.9"):
        with pytest.raises(UsageError, match="--betas"):
            parse_betas(wrong)
