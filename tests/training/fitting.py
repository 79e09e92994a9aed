"""A training run outside of any stage: a tiny model, few images, a job that saves where it is told."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finectl.artifacts.job import Execution, Job
from finectl.artifacts.store import Workspace
from finectl.console import Console
from finectl.data.dataset import ImageSet, load
from finectl.diffusion.random import generator_for
from finectl.models.dit import DiT, initialize_
from finectl.models.presets import DiTConfig, FactorConfig
from finectl.training.loop import Trained, fit, plain_loss
from finectl.training.settings import TrainSettings

CONFIG = DiTConfig(16, 2, 2, 4, 8, 1, 10, factorized=FactorConfig(("qkv", "out"), 8))
SETTINGS = {
    "steps": 10,
    "batch_size": 8,
    "lr": 1e-2,
    "lr_schedule": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "ema": 0.9,
    "eval_every": 4,
    "seed": 0,
}


@dataclass
class StopAfter:
    """An interruption that comes within the given step of this run; 0 never."""

    steps: int
    seen: int = 0

    @property
    def requested(self) -> bool:
        self.seen += 1
        return self.seen == self.steps


def settings(**changed: Any) -> TrainSettings:
    """Return the settings above, which a new field of the settings leaves working."""
    known = TrainSettings.__dataclass_fields__
    return TrainSettings(**{name: value for name, value in {**SETTINGS, **changed}.items() if name in known})


def model(config: DiTConfig = CONFIG) -> DiT:
    return initialize_(DiT(config), generator_for("test", 0))


def images() -> ImageSet:
    return load("digits", "train").subset(40, 0)


def job(
    directory: Path, stop_after: int = 0, save_every: int = 0, dtype: str = "float32", **execution: Any
) -> Job[Any]:
    state = directory / "state"
    state.mkdir(parents=True, exist_ok=True)
    return Job(
        None, Execution("cpu", dtype, save_every, **execution), (), directory, state,
        Console(stream=io.StringIO()), StopAfter(stop_after), Workspace(directory),  # type: ignore[arg-type]
    )  # fmt: skip


def run(
    directory: Path,
    stop_after: int = 0,
    save_every: int = 0,
    start: DiT | None = None,
    heldout: Callable[[Any], float] | None = None,
    dtype: str = "float32",
    data: ImageSet | None = None,
    groups: Callable[[DiT], list[dict[str, Any]]] | None = None,
    execution: dict[str, Any] | None = None,
    loss: Any = plain_loss,
    **changed: Any,
) -> Trained:
    """Train from the same start every time."""
    net = start or model()
    return fit(
        job(directory, stop_after, save_every, dtype, **(execution or {})), net, data or images(), settings(**changed),
        heldout=heldout, groups=groups(net) if groups else None, loss=loss,
    )  # fmt: skip


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Tell whether two states are equal, bit for bit."""
    return set(one) == set(two) and all(torch.equal(value, two[name]) for name, value in one.items())
