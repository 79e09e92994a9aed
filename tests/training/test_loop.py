"""The training loop: resuming, averaging, schedules, and losses that are not finite."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import CONFIG, images, model, run, same, settings

from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.data.order import batch_indices
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError, InputError, Interrupted
from finectl.models.dit import DiT, drop_labels
from finectl.training import loop
from finectl.training import run as steps
from finectl.training.log import read_log
from finectl.training.state import NAME
from finectl.training.step import lr_factor


def interrupted(directory: Path, *, at: int, **options: Any) -> None:
    with pytest.raises(Interrupted) as caught:
        run(directory, stop_after=at, **options)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("at", [1, 5, 9])
def test_ten_steps_equal_some_an_interruption_and_the_rest(at: int, tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken")
    interrupted(tmp_path / "broken", at=at)
    resumed = run(tmp_path / "broken")
    assert same(resumed.state, unbroken.state)
    assert same(resumed.ema, unbroken.ema)
    assert not same(resumed.state, model().state_dict()), "nothing was learnt"
    assert resumed.cost["steps"] == 10 and resumed.cost["samples"] == 80


def test_an_interruption_at_every_step(tmp_path: Path) -> None:
    unbroken = run(tmp_path / "unbroken")
    for _ in range(9):
        interrupted(tmp_path / "broken", at=1)
    assert same(run(tmp_path / "broken").state, unbroken.state)


def test_groups_and_frozen_parameters_resume_too(tmp_path: Path) -> None:
    def groups(net: DiT) -> list[dict[str, Any]]:
        net.x_embedder.requires_grad_(False)
        named = list(net.named_parameters())
        return [
            {"params": [p for n, p in named if n.endswith(".sigma")], "lr": 0.1},
            {"params": [p for n, p in named if not n.endswith(".sigma")]},
        ]

    unbroken = run(tmp_path / "unbroken", groups=groups)
    interrupted(tmp_path / "broken", at=4, groups=groups)
    resumed = run(tmp_path / "broken", groups=groups)
    assert same(resumed.state, unbroken.state)
    start = model()
    assert torch.equal(resumed.model.x_embedder.proj.weight, start.x_embedder.proj.weight)
    assert not torch.equal(resumed.model.blocks[0].attn.qkv.sigma, start.blocks[0].attn.qkv.sigma)


def test_saving_more_often_changes_nothing(tmp_path: Path) -> None:
    assert same(run(tmp_path / "often", save_every=1).state, run(tmp_path / "never").state)
    assert (tmp_path / "often" / "state" / NAME).is_file() and read_metadata(tmp_path / "never" / "state" / NAME)[
        "step"
    ] == 0


def test_the_seed_decides(tmp_path: Path) -> None:
    one, two = run(tmp_path / "1", seed=1), run(tmp_path / "2", seed=2)
    assert not same(one.state, two.state)
    assert same(one.state, run(tmp_path / "3", seed=1).state)


def test_the_numbers_of_the_process_do_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    one = run(tmp_path / "1")
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert same(one.state, run(tmp_path / "2").state)
    assert torch.equal(before, torch.random.get_rng_state())


def test_one_step_is_the_algorithm(tmp_path: Path) -> None:
    """Algorithm 1 of DDPM, AdamW and EMA, written out once more."""
    trained = run(tmp_path, steps=1, lr_schedule="constant", warmup_steps=0)
    net, data, schedule = model(), images(), NoiseSchedule.linear()
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    indices = batch_indices(len(data), 8, 0, 0)
    random = generator_for("train", 0, 0, 0)
    t = torch.randint(1000, (8,), generator=random)
    noise = torch.randn(8, 1, 8, 8, generator=random)
    y = drop_labels(data.labels[indices], 10, 0.1, random)
    x0, kept = data.images[indices], schedule.alphas_cumprod[t].float()[:, None, None, None]
    predicted = net(kept.sqrt() * x0 + (1 - kept).sqrt() * noise, t, y)
    (predicted - noise).square().mean().backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(dict(trained.model.named_parameters())[name], parameter)
        torch.testing.assert_close(trained.ema[name], 0.9 * start[name] + 0.1 * parameter.detach())


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    frozen = run(tmp_path / "1", ema=1.0)
    assert same(frozen.ema, dict(model().named_parameters()))
    at_once = run(tmp_path / "0", ema=0.0)
    assert same(at_once.ema, {n: p.detach() for n, p in at_once.model.named_parameters()})


def test_the_learning_rate_over_time() -> None:
    constant = settings(lr_schedule="constant", warmup_steps=0, steps=100)
    assert {lr_factor(constant, step) for step in range(100)} == {1.0}
    cosine = settings(lr_schedule="cosine", warmup_steps=0, steps=100)
    assert lr_factor(cosine, 0) == 1.0 and lr_factor(cosine, 50) == pytest.approx(0.5)
    assert lr_factor(cosine, 25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    values = [lr_factor(cosine, step) for step in range(101)]
    assert values == sorted(values, reverse=True) and values[-1] == pytest.approx(0)
    if "warmup_steps" in settings().__dataclass_fields__:
        rising = [lr_factor(replace(constant, warmup_steps=4), step) for step in range(6)]
        assert rising == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_every_group_gets_the_rate_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    real = loop.train_step

    def watch(of: Any, step: int) -> torch.Tensor:
        loss = real(of, step)
        seen.append([group["lr"] for group in of.optimizer.param_groups])
        return loss

    def groups(net: DiT) -> list[dict[str, Any]]:
        first, *others = net.parameters()
        return [{"params": [first], "lr": 0.5}, {"params": others}]

    monkeypatch.setattr(loop, "train_step", watch)
    interrupted(tmp_path, at=4, groups=groups)
    run(tmp_path, groups=groups)
    factors = [lr_factor(settings(), step) for step in range(10)]
    assert len(set(factors)) > 5
    assert seen == [[0.5 * factor, 1e-2 * factor] for factor in factors]


def test_labels_are_dropped_with_the_models_probability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = steps.denoising_loss

    def watch(net: Any, schedule: Any, x0: Any, y: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append(y)
        return real(net, schedule, x0, y, *rest, **more)

    monkeypatch.setattr(steps, "denoising_loss", watch)
    run(tmp_path / "1", steps=40, batch_size=32)
    share = float((torch.cat(seen) == 10).float().mean())
    assert 0.07 < share < 0.13
    seen.clear()
    never = DiT(replace(CONFIG, label_dropout=0.0))
    never.load_state_dict(model().state_dict())
    run(tmp_path / "2", start=never, steps=5)
    assert not bool((torch.cat(seen) == 10).any())


def poisoned() -> DiT:
    net = model()
    with torch.no_grad():
        net.final_layer.linear.bias.fill_(math.nan)
    return net


def test_weights_that_are_not_finite_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match=r"final_layer\.linear\.bias is not finite") as caught:
        run(tmp_path, start=poisoned())
    assert caught.value.exit_code == 5 and "--lr" in caught.value.fix
    assert not (tmp_path / "state" / NAME).exists(), "a ruined state was saved"


class Poison:
    """A loss that is not finite at one step, so many times."""

    def __init__(self, at: int, times: int) -> None:
        self.at, self.left, self.steps = at, times, []

    def __call__(self, *arguments: Any, step: int) -> torch.Tensor:
        self.steps.append(step)
        losses = loop.plain_loss(*arguments, step=step)
        if step == self.at and self.left:
            self.left -= 1
            return losses * math.nan
        return losses


@pytest.mark.parametrize("save_every", [0, 1, 3])
def test_a_loss_that_is_not_finite_once_costs_one_return_to_the_last_state(save_every: int, tmp_path: Path) -> None:
    poison = Poison(at=5, times=1)
    trained = run(tmp_path / "1", save_every=save_every, loss=poison)
    assert same(trained.state, run(tmp_path / "2").state)
    back = {0: 0, 1: 5, 3: 3}[save_every]
    assert poison.steps == [*range(6), *range(back, 10)]
    (entry,) = [e for e in read_log(tmp_path / "1" / "log.jsonl") if "not_finite_at_step" in e]
    assert entry["step"] == back and entry["not_finite_at_step"] == 6
    assert entry["images_of_that_step"] == batch_indices(len(images()), 8, 5, 0).tolist()


def test_a_loss_that_is_not_finite_twice_is_an_error_and_the_state_stays(tmp_path: Path) -> None:
    with pytest.raises(ComputationError, match="not finite at step 6") as caught:
        run(tmp_path, save_every=2, loss=Poison(at=5, times=2))
    assert caught.value.exit_code == 5 and "--lr" in caught.value.fix
    assert read_metadata(tmp_path / "state" / NAME)["step"] == 4
    assert same(run(tmp_path).state, run(tmp_path / "unbroken").state)


def test_a_loss_that_is_not_finite_between_two_log_entries_is_noticed(tmp_path: Path) -> None:
    """1,000 steps log every fifth; the interruption comes before the first entry."""
    with pytest.raises(ComputationError):
        run(tmp_path, loss=Poison(at=1, times=2), stop_after=2, steps=1000)
    assert read_metadata(tmp_path / "state" / NAME)["step"] == 0


def test_weights_that_the_last_update_ruined_are_noticed(tmp_path: Path) -> None:
    """Its loss was computed before the update, and was finite."""
    with pytest.raises(ComputationError, match="after step 1"):
        run(tmp_path, steps=1, lr=1e39, warmup_steps=0, lr_schedule="constant")


def test_half_precision_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    trained = run(tmp_path / "1", dtype="bfloat16")
    assert {p.dtype for p in trained.model.parameters()} == {torch.float32}
    assert not same(trained.state, run(tmp_path / "2").state)


def test_the_log_holds_each_entry_once_whatever_happens(tmp_path: Path) -> None:
    run(tmp_path / "unbroken", heldout=lambda net: 1.5)
    interrupted(tmp_path / "broken", at=5, heldout=lambda net: 1.5)
    run(tmp_path / "broken", heldout=lambda net: 1.5)

    def entries(name: str) -> list[Any]:
        return [
            {key: value for key, value in entry.items() if key != "seconds"}
            for entry in read_log(tmp_path / name / "log.jsonl")
        ]

    assert entries("broken") == entries("unbroken")
    steps = [entry["step"] for entry in entries("unbroken") if "heldout_loss" in entry]
    assert steps == [0, 4, 8, 10]
    assert [entry["step"] for entry in entries("unbroken") if "loss" in entry] == list(range(1, 11))


def test_the_heldout_loss_is_of_the_average(tmp_path: Path) -> None:
    outputs = []

    def heldout(net: Any) -> float:
        outputs.append(net(torch.ones(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1])).detach())
        return 0.0

    trained = run(tmp_path, heldout=heldout)
    averaged = model()
    averaged.load_state_dict(trained.ema)
    torch.testing.assert_close(outputs[-1], averaged(torch.ones(1, 1, 8, 8), torch.tensor([5]), torch.tensor([1])))
    assert not torch.equal(outputs[-1], outputs[0])


def kept(directory: Path) -> dict[int, bytes]:
    return {int(path.stem): path.read_bytes() for path in sorted((directory / "checkpoints").glob("*.safetensors"))}


def test_averages_of_earlier_updates_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "whole", keep_every=3, lr_schedule="constant")
    assert list(kept(tmp_path / "whole")) == [3, 6, 9]
    for update in (3, 6, 9):
        found = load_tensors(tmp_path / "whole" / "checkpoints" / f"{update:06d}.safetensors")
        assert same(found, run(tmp_path / str(update), steps=update, lr_schedule="constant").ema)
        assert not (tmp_path / str(update) / "checkpoints").exists()
    run(tmp_path / "five", keep_every=5)
    assert list(kept(tmp_path / "five")) == [5], "the last update has a file of its own"


def test_kept_averages_are_the_same_after_any_interruption(tmp_path: Path) -> None:
    run(tmp_path / "unbroken", keep_every=2)
    expected = kept(tmp_path / "unbroken")
    for _ in range(9):
        interrupted(tmp_path / "broken", at=1, keep_every=2)
    run(tmp_path / "broken", keep_every=2)
    assert kept(tmp_path / "broken") == expected and list(expected) == [2, 4, 6, 8]
    interrupted(tmp_path / "late", at=5, keep_every=2)
    shutil.copytree(tmp_path / "late" / "state", tmp_path / "saved")
    run(tmp_path / "late", keep_every=2)
    assert kept(tmp_path / "late") == expected
    shutil.rmtree(tmp_path / "late" / "state")
    shutil.copytree(tmp_path / "saved", tmp_path / "late" / "state")
    (tmp_path / "late" / "checkpoints" / "000008.safetensors").write_bytes(b"of a process that was killed")
    run(tmp_path / "late", keep_every=2)
    assert kept(tmp_path / "late") == expected, "what lies beyond the state is written again"


def test_an_average_is_kept_before_the_state_that_lies_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a process that is killed between the two would leave it out for ever."""
    real = loop.save_state

    def watch(directory: Path, position: Any, *arguments: Any, **options: Any) -> None:
        assert list(kept(tmp_path)) == [*range(2, min(position.step + 1, 10), 2)]
        real(directory, position, *arguments, **options)

    monkeypatch.setattr(loop, "save_state", watch)
    run(tmp_path, keep_every=2, save_every=1)


def test_ruined_weights_are_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ComputationError):
        run(tmp_path, keep_every=2, loss=Poison(at=1, times=2), steps=1000)
    assert not kept(tmp_path)
    run(tmp_path / "1", keep_every=2, loss=Poison(at=3, times=1))
    run(tmp_path / "2", keep_every=2)
    assert kept(tmp_path / "1") == kept(tmp_path / "2")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, at=2)
    with pytest.raises(InputError, match="not the state of this model") as caught:
        run(tmp_path, start=model(replace(CONFIG, depth=3)))
    assert "--no-resume" in caught.value.fix


def test_a_truncated_state_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, at=2)
    state = tmp_path / "state" / NAME
    state.write_bytes(state.read_bytes()[:-7])
    with pytest.raises(InputError, match="truncated"):
        run(tmp_path)


def test_training_learns(tmp_path: Path) -> None:
    data, net = images(), model()
    trained = run(tmp_path, start=net, steps=120, lr_schedule="constant", weight_decay=0.0, batch_size=16, data=data)

    def loss(of: DiT) -> float:
        noise = torch.randn(data.images.shape, generator=generator_for("x", 0))
        t = torch.arange(len(data)) * 25 % 1000
        with torch.no_grad():
            return float(denoising_loss(of, NoiseSchedule.linear(), data.images, data.labels, t, noise).mean())

    assert loss(trained.model) < 0.6 * loss(model())
