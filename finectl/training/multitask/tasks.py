"""What all ways to weigh timestep clusters have in common: what a step asks of them, and their state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finectl.errors import InputError


class Tasks:
    """The losses L_1..L_k of clusters of timesteps, made into one: sum_i w_i L_i / k, with w = 1 in plain training.

    Args:
        clusters: k.
        seed: Seed of random choices.
    """

    lr = 0.0
    """Learning rate of `parameters`, over whose course the model's schedule is laid."""

    def __init__(self, clusters: int, seed: int) -> None:
        self.clusters = clusters
        self.seed = seed

    def to(self, device: torch.device) -> None:
        """Put what is used at every step on the device of the training."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what the model's optimiser trains beside the model, by name; `learn` gives the gradients."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next step depends on, by name: the very tensors."""
        return {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take everything from a saved state, bit for bit.

        Raises:
            InputError: it is that of other tasks.
        """
        own = self.state_dict()
        shapes = {name: tuple(value.shape) for name, value in own.items()}
        found = {name: tuple(value.shape) for name, value in state.items()}
        if found != shapes:
            raise InputError(
                f"the saved state has {found or 'nothing'} of the timestep clusters",
                expected=f"{shapes or 'nothing'}",
                fix="drop it: run the same command with --no-resume",
            )
        for name, value in own.items():
            value.copy_(state[name])

    def separates(self, step: int) -> bool:
        """Tell whether a step needs each cluster's gradient by itself (`solve`), not their sum under `weights`."""
        return False

    def separated(self, steps: int) -> int:
        """Return how many of the first so many steps do."""
        return sum(self.separates(step) for step in range(steps))

    def weights(self) -> Tensor:
        """Return w of a step that does not separate, (k,), float32, on the device."""
        raise NotImplementedError

    def learn(self, losses: Tensor) -> None:
        """Set the gradients of `parameters`, after a step that does not separate.

        Args:
            losses: (k,), float64, on the device: L_i / k of the whole batch.
        """

    def solve(self, gram: Tensor, step: int) -> Tensor:
        """Return w of a step that separates, (k,), float64.

        Args:
            gram: (k, k), float64, on the CPU: inner products of the clusters' gradients.
            step: Updates done so far.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, Any]:
        """Return what the manifest keeps of the end of the training."""
        return {}
