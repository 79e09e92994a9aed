"""One of several processes that measure a held-out loss together: it writes the tables that it got.

Arguments: the file of the tables, the number of draws.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from finectl.artifacts.tensors import save_tensors
from finectl.data.dataset import ImageSet, load
from finectl.diffusion.random import generator_for
from finectl.metrics.heldout_loss import HeldoutLoss, heldout_loss
from finectl.models.dit import DiT, initialize_
from finectl.models.presets import DiTConfig
from finectl.training.distributed import join
from finectl.world import World


def network() -> DiT:
    """Return a network whose outputs are no zeros."""
    net = initialize_(DiT(DiTConfig(16, 2, 2, 4, 8, 1, 10)), generator_for("test", 0)).eval()
    with torch.no_grad():
        net.final_layer.linear.weight.fill_(0.1)
    return net


def images() -> ImageSet:
    """Return some held-out digits."""
    return load("digits", "heldout").subset(50, 0)


def measure(draws: int, world: World | None = None) -> HeldoutLoss:
    """Measure that network on them."""
    return heldout_loss(network(), images(), draws=draws, batch_size=20, world=world)


def main(path: Path, draws: int) -> None:
    """Join the others, measure and write."""
    torch.set_num_threads(1)
    with World.from_environment() as world:
        join(world, torch.device("cpu"))
        measured = measure(draws, world)
        save_tensors(path, {"losses": measured.losses, "timesteps": measured.timesteps})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
