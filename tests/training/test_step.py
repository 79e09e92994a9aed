"""Optimiser and moving average."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from finectl.errors import InputError
from finectl.training.step import Ema, make_optimizer


def test_optimizer_takes_the_published_step_and_leaves_frozen_parameters_out() -> None:
    torch.manual_seed(0)
    ours, reference = nn.Linear(5, 3), nn.Linear(5, 3)
    reference.load_state_dict(ours.state_dict())
    ours.bias.requires_grad_(False)
    optimizer = make_optimizer(ours.parameters(), lr=1e-2, weight_decay=0.1)
    expected = torch.optim.AdamW([reference.weight], lr=1e-2, weight_decay=0.1, foreach=False)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
    for _ in range(5):
        x = torch.randn(4, 5)
        for model, update in ((ours, optimizer), (reference, expected)):
            update.zero_grad()
            model(x).square().sum().backward()
            update.step()
    assert torch.allclose(ours.weight, reference.weight, rtol=1e-5, atol=1e-7)


def test_optimizer_keeps_the_learning_rates_of_groups() -> None:
    fast, slow = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([{"params": [fast], "lr": 0.5}, {"params": [slow]}], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.1]


def test_ema_is_the_closed_form_sum() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = Ema([("p", parameter)], 0.9)
    for value in range(1, 6):
        parameter.data.fill_(value)
        ema.update()
    expected = sum(0.1 * 0.9 ** (5 - value) * value for value in range(1, 6))
    assert ema.shadow["p"].item() == pytest.approx(expected, rel=1e-12)


def partly_frozen() -> nn.Linear:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    return model


def test_frozen_parameters_are_their_own_average_and_take_no_memory() -> None:
    model = partly_frozen()
    weight = model.weight.detach().clone()
    ema = Ema(model.named_parameters(), 0.5)
    model.bias.data.fill_(8.0)
    ema.update()
    assert ema.shadow["weight"].data_ptr() == model.weight.data_ptr()
    assert ema.shadow["bias"].data_ptr() != model.bias.data_ptr()
    assert set(ema.state_dict()) == {"weight", "bias"}
    assert set(ema.moving()) == {"bias"}
    x = torch.ones(1, 3)
    with ema.applied():
        assert torch.equal(model.weight, weight)
        inside = model(x)
    assert torch.equal(model.bias, torch.full((2,), 8.0))
    assert torch.allclose(model(x) - inside, (model.bias - ema.shadow["bias"])[None])


@pytest.mark.parametrize("part", ["moving", "state_dict"])
def test_an_average_comes_back_with_and_without_the_frozen_parameters(part: str) -> None:
    model = partly_frozen()
    ema = Ema(model.named_parameters(), 0.5)
    model.bias.data.fill_(8.0)
    ema.update()
    saved = {name: value.clone() for name, value in getattr(ema, part)().items()}
    again = Ema(model.named_parameters(), 0.5)
    again.load_state_dict(saved)
    assert torch.equal(again.shadow["bias"], ema.shadow["bias"])
    assert not torch.equal(again.shadow["bias"], model.bias)
    with pytest.raises(InputError, match="bias"):
        again.load_state_dict({"weight": model.weight})


def test_resumed_ema_equals_an_unbroken_one_bit_for_bit() -> None:
    def run(model: nn.Linear, ema: Ema, steps: range) -> None:
        for step in steps:
            with torch.no_grad():
                generator = torch.Generator().manual_seed(step)
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator))
            ema.update()

    torch.manual_seed(0)
    whole = nn.Linear(7, 3)
    broken = nn.Linear(7, 3)
    broken.load_state_dict(whole.state_dict())
    one = Ema(whole.named_parameters(), 0.999)
    run(whole, one, range(6))

    first = Ema(broken.named_parameters(), 0.999)
    run(broken, first, range(3))
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    second = Ema(broken.named_parameters(), 0.999)
    second.load_state_dict(saved)
    run(broken, second, range(3, 6))
    assert all(torch.equal(value, second.shadow[name]) for name, value in one.shadow.items())


def test_ema_keeps_float32_for_narrow_parameters() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = Ema([("p", parameter)], 0.999)
    parameter.data.fill_(2)
    ema.update()
    assert ema.shadow["p"].dtype == torch.float32
    assert ema.shadow["p"][0].item() == pytest.approx(1.001)


def test_ema_refuses_a_state_of_another_model() -> None:
    ema = Ema(nn.Linear(2, 2).named_parameters(), 0.9)
    with pytest.raises(InputError, match="odd"):
        ema.load_state_dict({**ema.state_dict(), "odd": torch.zeros(1)})
    with pytest.raises(InputError, match="shape"):
        ema.load_state_dict({**ema.state_dict(), "bias": torch.zeros(3)})


def test_applied_average_is_taken_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    ema = Ema(model.named_parameters(), 0.5)
    raw = torch.full((2, 2), 4.0)
    model.weight.data.copy_(raw)
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert torch.equal(model.weight, ema.shadow["weight"])
        raise RuntimeError("inside")
    assert torch.equal(model.weight, raw)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_stays_with_the_process() -> None:
    program = """
import resource, sys
import numpy
from finectl.training.memory import tune_allocator
if sys.argv[1] == "tuned":
    assert tune_allocator()
for step in range(8):
    if step == 4:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    numpy.empty(34 * 2**20, numpy.uint8).fill(1)
sys.stdout.write(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""

    def page_faults(mode: str) -> int:
        command = [sys.executable, "-c", program, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("tuned") < 0.1 * page_faults("plain")
