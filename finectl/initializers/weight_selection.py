"""Weight selection: whole layers of a larger model, and a regular part of their channels where the target is narrower.

Depth: `first` takes the ancestor's first layers, as the paper does; the layers that a shorter ancestor lacks start as
DiT's own. `even` takes evenly spaced ones, the last that feeds the final layer among them, and repeats layers in a
deeper target.

Width: of m channels, m' are kept at a regular distance. The paper chooses them for each tensor on its own and leaves
attention heads out of account; what depends on DiT is ours. One index set serves the whole residual stream and the
condition, with every chunk of qkv and adaLN selected inside the chunk. Whole heads are kept, and channels inside of a
head where heads are smaller. The hidden units of the feed-forward part have an index set of their own.

Open: nothing is rescaled for the smaller sums, as in the paper; and the fixed position embedding is the target's own.
At an integer factor that is the selected channels of the ancestor's; at others, nearly.

Reference: Xu et al., Initializing Models with Larger Ones, arXiv 2311.18823, section 3. `even` is ours.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.room import require_room
from finectl.initializers.transfer import Ancestor, assemble
from finectl.initializers.width import axes, select
from finectl.models.learngene import evenly_spaced


def initialize(request: Request) -> Initialized:
    """Select layers, and channels where the target is narrower.

    Raises:
        UsageError: the target is wider than the ancestor.
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    ancestor = Ancestor.of(request)
    require_room(ancestor.config, request.target)
    taken = axes(ancestor.config, request.target)
    sources = placement(ancestor.config.depth, request.target.depth, request.job.config.variant)
    layers = ancestor.layers
    return assemble(
        request,
        {index: select(layers[source], taken) for index, source in sources.items()},
        select(ancestor.rest, taken),
    )


def placement(layers: int, depth: int, variant: str) -> dict[int, int]:
    """Return which layer of the ancestor each layer of the target comes from, both counted from 0.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'.
        variant: `first` (the same place; a layer beyond the ancestor's is missing) or `even`.
    """
    if variant == "even":
        return dict(enumerate(evenly_spaced(layers, depth)))
    return {index: index for index in range(min(layers, depth))}
