"""What an initialisation method is given and what it gives back: a method is one file with `initialize`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.presets import DiTConfig


@dataclass(frozen=True)
class Request:
    """One model to initialise.

    Args:
        target: Its dense architecture.
        data: The data set of the target task.
        same_labels: Whether the source was trained on the same classes, so that its label table means the same.
        source: What the method starts from; None for a method that starts from nothing.
        job: The run: its options, its state and its signals.
        constants: The numbers in the method's definition, as `--set` has them.
    """

    target: DiTConfig
    data: DataInfo
    same_labels: bool
    source: Artifact | None
    job: Job[Any]
    constants: Mapping[str, float] = field(default_factory=dict)

    def count(self, name: str) -> int:
        """Return one of the constants, a number of things.

        Raises:
            UsageError: it is not a whole number of at least 1.
        """
        value = self.constants[name]
        if value < 1 or value != int(value):
            raise UsageError(f"--set {name}={value:g}", expected=f"a whole number of at least 1, such as {name}=3")
        return int(value)


@dataclass(frozen=True, eq=False)
class Initialized:
    """An initialised model.

    Args:
        state: The dense model's state.
        transferred: Parameters of the blocks that came from the source.
        transferred_embedders: Parameters of embedders and final layer that came from the source.
        cost: Optimiser updates, samples and seconds spent on it.
    """

    state: Mapping[str, Tensor]
    transferred: int = 0
    transferred_embedders: int = 0
    cost: dict[str, Any] = field(default_factory=dict)
