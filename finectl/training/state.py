"""The resume state of a training run: one safetensors file, replaced atomically, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.errors import InputError
from finectl.training.distributed import copy_whole, like, whole
from finectl.training.multitask.tasks import Tasks
from finectl.training.run import Loss, StatefulLoss
from finectl.training.step import Ema

NAME = "training.safetensors"
TASKS = "tasks/"
LOSS = "loss/"


@dataclass
class Position:
    """Where a run is.

    Args:
        step: Optimiser updates done.
        wall_s: Seconds of work so far, over all runs.
        loss_sum: Sum of the batch losses since the last log entry.
        loss_count: Batches in it.
    """

    step: int = 0
    wall_s: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0


def save_state(
    directory: Path,
    position: Position,
    model: nn.Module,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    tasks: Tasks | None = None,
    loss: Loss | None = None,
    *,
    leads: bool = True,
) -> None:
    """Write everything that the next step depends on, sharded tensors put together.

    Random numbers and the place in the epoch are functions of the step, so there is nothing of single processes to
    write, and another number of them may go on. Frozen parameters are those that the run started from, and are not
    written. All processes call it; only the one that leads writes.

    Raises:
        ResourceError: the disk is full; the state saved before is intact.
    """
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in _moving(model).items()}
    if ema is not None:
        tensors.update({f"ema/{name}": value for name, value in ema.moving().items()})
    if tasks is not None:
        tensors.update({f"{TASKS}{name}": value for name, value in tasks.state_dict().items()})
    if isinstance(loss, StatefulLoss):
        tensors.update({f"{LOSS}{name}": value for name, value in loss.state_dict().items()})
    for name, slots in _optimizer_slots(_trained(model, tasks), optimizer).items():
        tensors.update({f"optimizer/{slot}/{name}": value for slot, value in slots.items()})
    tensors = whole(tensors)
    if leads:
        save_tensors(directory / NAME, tensors, metadata=asdict(position))


def load_state(
    directory: Path,
    model: nn.Module,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    tasks: Tasks | None = None,
    loss: Loss | None = None,
) -> Position:
    """Put a saved state back; without one, leave everything as it is and return the start.

    Raises:
        InputError: the state is damaged or belongs to another model.
    """
    path = directory / NAME
    if not path.exists():
        return Position()
    tensors = load_tensors(path)
    saved_position = read_metadata(path)
    moving = _moving(model)
    shapes = {f"model/{name}": parameter.shape for name, parameter in moving.items()}
    # States of earlier versions hold the frozen parameters too.
    frozen = {f"model/{name}" for name, _ in model.named_parameters()} - set(shapes)
    found = {name: value.shape for name, value in tensors.items() if name.startswith("model/") and name not in frozen}
    if found != shapes or not isinstance(saved_position, dict):
        raise InputError(
            f"{path} is not the state of this model",
            expected=f"{len(shapes)} tensors of its shapes",
            fix="drop it: run the same command with --no-resume",
        )
    for name, parameter in moving.items():
        copy_whole(parameter, tensors[f"model/{name}"])
    if ema is not None:
        prefix = "ema/"
        ema.load_state_dict({n[len(prefix) :]: value for n, value in tensors.items() if n.startswith(prefix)})
    if tasks is not None:
        tasks.load_state_dict({n[len(TASKS) :]: value for n, value in tensors.items() if n.startswith(TASKS)})
    if isinstance(loss, StatefulLoss):
        loss.load_state_dict({n[len(LOSS) :]: value for n, value in tensors.items() if n.startswith(LOSS)})
    slots: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer/"):
            _, slot, parameter_name = name.split("/", 2)
            slots.setdefault(parameter_name, {})[slot] = value
    optimizer.state.clear()
    for name, parameter in _trained(model, tasks).items():
        if name in slots:
            saved = slots[name]
            optimizer.state[parameter] = {
                slot: like(parameter, value) if slot != "step" or optimizer.defaults.get("fused") else value
                for slot, value in saved.items()
            }
    return Position(**saved_position)


def _moving(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are not frozen, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _trained(model: nn.Module, tasks: Tasks | None) -> dict[str, nn.Parameter]:
    """Return what the optimiser trains, by name: of the model, and beside it."""
    beside = {} if tasks is None else tasks.parameters()
    return {**dict(model.named_parameters()), **{f"{TASKS}{name}": parameter for name, parameter in beside.items()}}


def _optimizer_slots(
    trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Return the optimiser's tensors by parameter name and slot (`step`, `exp_avg`, `exp_avg_sq`)."""
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in trained.items()}
    return {name: {s: v for s, v in state.items() if isinstance(v, Tensor)} for name, state in states.items() if state}
