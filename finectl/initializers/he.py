"""Random initialisation, the control, which takes nothing from anywhere.

- `xavier`: DiT's own. Matrices are Xavier-uniform; embeddings and the timestep MLP N(0, 0.02); biases, adaLN layers and
  the final layer zero.
- `kaiming`: the four matrices of every block (qkv, o, in, out) are normal with the standard deviation sqrt(2 / fan_in)
  instead; everything else is as in `xavier`.

Reference: Peebles and Xie, arXiv 2212.09748, section 3.2 (`xavier`); He et al., arXiv 1502.01852, equation 10
(`kaiming`); the row "He-Init" of FINE, arXiv 2409.19289.

Open: the paper of FINE does not say which of the two its row is. That the gates of `kaiming` stay zero is ours.
"""

from __future__ import annotations

import math

import torch

from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import BLOCKS, fresh_state
from finectl.models.presets import LAYER_TYPES, layer_shapes

MATRICES = ("qkv", "o", "in", "out")


def initialize(request: Request) -> Initialized:
    """Draw all weights at random."""
    state = fresh_state(request)
    if request.job.config.variant == "kaiming":
        shapes, generator = layer_shapes(request.target), generator_for("init-he", request.job.config.seed)
        for index in range(request.target.depth):
            for kind in MATRICES:
                std = math.sqrt(2 / shapes[kind][1])
                weight = std * torch.randn(shapes[kind], generator=generator)
                state[f"{BLOCKS}{index}.{LAYER_TYPES[kind]}.weight"] = weight
    return Initialized(state)
