"""The resume state: what is in it, and what is left out because it never moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.errors import InputError
from finectl.training.state import NAME, Position, load_state, save_state
from finectl.training.step import Ema, make_optimizer


def begun(seed: int) -> tuple[nn.Sequential, Ema, torch.optim.Optimizer]:
    """Return a model with a frozen first layer, one update after its start."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    ema, optimizer = Ema(model.named_parameters(), 0.5), make_optimizer(model.parameters(), 0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    ema.update()
    return model, ema, optimizer


def test_frozen_parameters_are_not_written_and_the_rest_comes_back(tmp_path: Path) -> None:
    model, ema, optimizer = begun(0)
    save_state(tmp_path, Position(step=7), model, ema, optimizer)
    names = set(load_tensors(tmp_path / NAME))
    assert names == {
        f"{kind}/1.{part}"
        for kind in ("model", "ema", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/step")
        for part in ("weight", "bias")
    }
    other, average, moments = begun(1)
    first = other[0].weight.detach().clone()
    assert load_state(tmp_path, other, average, moments) == Position(step=7)
    assert torch.equal(other[1].weight, model[1].weight)
    assert torch.equal(other[0].weight, first)
    assert torch.equal(average.shadow["1.weight"], ema.shadow["1.weight"])
    assert torch.equal(moments.state[other[1].weight]["exp_avg"], optimizer.state[model[1].weight]["exp_avg"])


def test_a_state_that_holds_the_frozen_parameters_too_is_read(tmp_path: Path) -> None:
    model, ema, optimizer = begun(0)
    save_state(tmp_path, Position(step=7), model, ema, optimizer)
    frozen = model[0].state_dict().items()
    more = {f"{kind}/0.{name}": value.clone() for kind in ("model", "ema") for name, value in frozen}
    save_tensors(tmp_path / NAME, {**load_tensors(tmp_path / NAME), **more}, read_metadata(tmp_path / NAME))
    other, average, moments = begun(1)
    assert load_state(tmp_path, other, average, moments) == Position(step=7)
    assert torch.equal(average.shadow["1.bias"], ema.shadow["1.bias"])


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, ema, optimizer = begun(0)
    save_state(tmp_path, Position(), model, ema, optimizer)
    whole = begun(0)[0].requires_grad_(True)
    with pytest.raises(InputError, match="not the state of this model"):
        load_state(tmp_path, whole, Ema(whole.named_parameters(), 0.5), make_optimizer(whole.parameters(), 0.1))
