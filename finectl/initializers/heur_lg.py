"""Heur-LG: the ancestor's last three blocks become the target's last three; below them all is DiT's own start.

This is the fixed rule that learngene papers report as a baseline, with embedders and final layer copied. A target, or
an ancestor, of fewer blocks gives fewer.

Open: the paper finds those layers by watching, over a sequence of tasks, how the share of large gradients changes from
one task to the next. An ancestor here was trained on one task, and its kept checkpoints hold weights but no gradients,
so that criterion is not computed.

Reference: Wang et al., Learngene: From Open-World to Your Learning Task, AAAI 2022, arXiv 2106.06788.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import copy_layers

KEPT = 3


def initialize(request: Request) -> Initialized:
    """Copy the last blocks, the embedders and the final layer.

    Raises:
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    return copy_layers(request, placement)


def placement(layers: int, depth: int) -> dict[int, int]:
    """Return which layer of the ancestor each filled layer of the target comes from, both counted from 0.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'.
    """
    return {depth - back: layers - back for back in range(min(KEPT, layers, depth), 0, -1)}
