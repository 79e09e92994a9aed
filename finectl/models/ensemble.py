"""One model out of the experts of all timestep ranges: each timestep goes to its expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors
from finectl.errors import InputError
from finectl.models.experts import expert_of, read_experts
from finectl.models.io import CONFIG, ModelConfig, build_model, misfits


class Ensemble(nn.Module):
    """The experts behind the interface of one network; it computes what one does and holds all of them.

    Args:
        experts: One network a range, of one architecture.
        borders: The N + 1 borders of the ranges.

    Reference: DeMe, arXiv 2410.06664, Eq. 7.
    """

    def __init__(self, experts: Sequence[Any], borders: tuple[int, ...]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.borders = borders
        self.config: ModelConfig = experts[0].config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict with the expert of each timestep.

        Args:
            x: (B, C, H, W), float.
            t: (B,), timesteps in 0..T-1; in sampling they are all the same.
            y: (B,), int64 labels.

        Returns:
            (B, out_channels, H, W).
        """
        first, last = (expert_of(int(end), self.borders) for end in torch.aminmax(t))
        if first == last:
            return self.experts[first](x, t, y)
        output: Tensor | None = None
        for index in range(first, last + 1):
            inside = ((t >= self.borders[index]) & (t < self.borders[index + 1])).nonzero()[:, 0]  # (b,)
            if not len(inside):
                continue
            part = self.experts[index](x[inside], t[inside], y[inside])
            if output is None:
                output = part.new_empty(len(t), *part.shape[1:])
            output[inside] = part
        if output is None:
            raise IndexError("no timesteps")
        return output


def load_ensemble(artifact: Artifact, weights: str = "ema") -> Ensemble:
    """Build the experts of an artifact and load their weights.

    Args:
        artifact: Of kind `experts`.
        weights: `ema` or `raw`.

    Raises:
        InputError: an expert is missing, or its weights are not those of the architecture in config.json.
    """
    found = read_experts(artifact, weights)
    networks = []
    for index, file in enumerate(found.files):
        network, state = build_model(found.config), load_tensors(file)
        problems = misfits(network, state)
        if problems:
            raise InputError(
                f"the weights of expert {index} of {artifact.path} do not fit its {CONFIG}: {problems[0]}",
                fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
            )
        network.load_state_dict(state)
        networks.append(network)
    return Ensemble(networks, found.borders)
