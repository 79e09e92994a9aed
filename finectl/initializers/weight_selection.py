"""Weight selection: whole layers of a larger model, and a regular part of their channels where the target is narrower.

Depth: `first` takes the ancestor's first layers, as the paper does; the layers that a shorter ancestor lacks start as
DiT's own. `even` takes evenly spaced ones, the last that feeds the final layer among them, and repeats layers in a
deeper target.

Width: of m channels, m' are kept at a regular distance. The paper chooses them for each tensor on its own and leaves
attention heads out of account; what depends on DiT is ours. One index set serves the whole residual stream and the
condition, with every chunk of qkv and adaLN selected inside the chunk. Whole heads are kept, and channels inside of a
head where heads are smaller. The hidden units of the feed-forward part have an index set of their own.

Open: the fixed position embedding is the target's own, not the selected channels of the ancestor's; and nothing is
rescaled for the smaller sums, as in the paper.

Reference: Xu et al., Initializing Models with Larger Ones, arXiv 2311.18823, section 3. `even` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from finectl.errors import UsageError
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, assemble
from finectl.models.learngene import evenly_spaced
from finectl.models.presets import LAYER_TYPES, DiTConfig, family_name

QKV_CHUNKS, ADALN_CHUNKS, FINAL_CHUNKS = 3, 6, 2


class Axes(NamedTuple):
    """Which rows and columns of a layer are kept, as int64 indices; None keeps all of them."""

    rows: Tensor | None
    columns: Tensor | None


def initialize(request: Request) -> Initialized:
    """Select layers, and channels where the target is narrower.

    Raises:
        UsageError: the target is wider than the ancestor.
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    ancestor = Ancestor.of(request)
    require_room(ancestor.config, request.target)
    axes = channel_axes(ancestor.config, request.target)
    sources = placement(ancestor.config.depth, request.target.depth, request.job.config.variant)
    layers = ancestor.layers
    return assemble(
        request,
        {index: select(layers[source], axes) for index, source in sources.items()},
        select(ancestor.rest, axes),
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


def regular(count: int, kept: int) -> list[int]:
    """Return which of `count` channels are kept: every (m / m')-th, or the rounded places of an even division.

    Args:
        count: Channels of the ancestor, m.
        kept: Channels of the target, m', from 1 to `count`.

    Reference: arXiv 2311.18823, section 3, uniform element selection.
    """
    if count % kept == 0:
        return list(range(0, count, count // kept))
    return evenly_spaced(count, kept)


def require_room(source: DiTConfig, target: DiTConfig) -> None:
    """Check that the target is a part of the ancestor in every direction of its width.

    Raises:
        UsageError: it is wider, has more heads, larger heads, or more hidden units.
    """
    sizes = {
        "channels": (source.width, target.width),
        "attention heads": (source.heads, target.heads),
        "channels a head": (source.width // source.heads, target.width // target.heads),
        "hidden units": (source.width * source.mlp_ratio, target.width * target.mlp_ratio),
    }
    for what, (available, wanted) in sizes.items():
        if wanted > available:
            raise UsageError(
                f"{family_name(target)} has {wanted} {what} and its source has {available}: "
                "weight-selection takes a part of a larger model and cannot widen one",
                expected=f"at most {available} {what}",
                fix="name a narrower --model, or leave it out to keep the source's width",
            )


def channel_axes(source: DiTConfig, target: DiTConfig) -> dict[str, Axes]:
    """Return what is kept of each layer, by its path in the model, or in its block for layers of blocks.

    Args:
        source: The ancestor's architecture.
        target: One that `require_room` accepts.
    """
    stream = torch.tensor(regular(source.width, target.width))  # (d',)
    hidden = torch.tensor(regular(source.width * source.mlp_ratio, target.width * target.mlp_ratio))
    attention = attention_channels(source, target)
    return {
        LAYER_TYPES["qkv"]: Axes(in_chunks(attention, QKV_CHUNKS, source.width), stream),
        LAYER_TYPES["o"]: Axes(stream, attention),
        LAYER_TYPES["in"]: Axes(hidden, stream),
        LAYER_TYPES["out"]: Axes(stream, hidden),
        LAYER_TYPES["adaln"]: Axes(in_chunks(stream, ADALN_CHUNKS, source.width), stream),
        "x_embedder.proj": Axes(stream, None),
        "t_embedder.mlp.0": Axes(stream, None),  # its inputs are the sinusoids of the timestep
        "t_embedder.mlp.2": Axes(stream, stream),
        "y_embedder.embedding_table": Axes(None, stream),
        "final_layer.linear": Axes(None, stream),
        "final_layer.adaLN_modulation.1": Axes(in_chunks(stream, FINAL_CHUNKS, source.width), stream),
    }


def attention_channels(source: DiTConfig, target: DiTConfig) -> Tensor:
    """Return the channels of q, k or v that are kept, head by head: head i of h' is head floor(i h / h')."""
    size = source.width // source.heads
    heads = torch.tensor([index * source.heads // target.heads for index in range(target.heads)])  # (h',)
    inside = torch.tensor(regular(size, target.width // target.heads))  # (d' / h',)
    return (heads[:, None] * size + inside).flatten()  # (d',)


def in_chunks(indices: Tensor, chunks: int, size: int) -> Tensor:
    """Return indices into `chunks` stacked parts of `size` rows, the same ones in each part."""
    return (torch.arange(chunks)[:, None] * size + indices).flatten()


def select(tensors: Mapping[str, Tensor], axes: Mapping[str, Axes]) -> dict[str, Tensor]:
    """Return the kept rows and columns of weights, and the kept rows of biases.

    Args:
        tensors: Weights (m1, m2, ...) and biases (m1,) by name.
        axes: What is kept, by the name without its `.weight` or `.bias`.
    """
    kept = {}
    for name, value in tensors.items():
        rows, columns = axes[name.rpartition(".")[0]]
        part = value if rows is None else value.index_select(0, rows)
        kept[name] = part if columns is None or value.dim() == 1 else part.index_select(1, columns)
    return kept
