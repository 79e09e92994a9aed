"""Auto-LG: the ancestor's first six blocks become the target's first six; above them all is DiT's own start.

This is the fixed rule that learngene papers report as a baseline, with embedders and final layer copied. A target, or
an ancestor, of fewer blocks gives fewer.

Open: the paper finds those layers by their similarity to a pseudo-descendant, a small model that is trained for the
purpose (FINE's table books a third of a pre-training for it). No pseudo-descendant is trained here, so the rule costs
nothing.

Reference: Wang et al., Learngene: Inheriting Condensed Knowledge from the Ancestry Model to Descendant Models, arXiv
2305.02279.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import copy_layers

KEPT = 6


def initialize(request: Request) -> Initialized:
    """Copy the first blocks, the embedders and the final layer.

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
    return {index: index for index in range(min(KEPT, layers, depth))}
