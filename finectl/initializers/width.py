"""What changes a model's width, for every method that can: which channels belong together, and what is taken of them.

A Diffusion Transformer has five spaces of channels. The residual stream and the condition share one (`stream`), because
adaLN scales the stream channel by channel with what it makes of the condition; queries, keys and values have one each,
of whole heads; and the hidden units of the feed-forward part have one. A layer that gives channels of a space maps its
rows, chunk by chunk (three in qkv, six in adaLN, two in the final layer's adaLN), and a layer that takes them in maps
its columns. `SIDES` is that table; everything else follows from a map for each space.

`axes` and `select` map by choice. Where the target is narrower, channels are taken at a regular distance, whole heads,
and channels inside of a head where heads are smaller; nothing is rescaled. Where it is wider, channels are repeated,
whole heads, and channels inside of a head where heads are larger; whoever takes in a repeated channel has its columns
divided by how often it is there, so that the network computes the same function.

The same function exactly, up to rounding, where every size that grows does so by an integer factor:

- LayerNorm has the same mean and variance over channels that are all repeated equally often. At other factors some
  channels count more than others in both.
- Attention divides by the root of the head's size. Queries and keys of larger heads are rescaled, sqrt(k' / k) / c
  shared evenly by both for a channel that is there c times, so that the scores stay. That is exact at any factor.
- The fixed position embedding is the target's own. Copies of a channel lie side by side, so that at an integer factor s
  the first of each s copies has the position embedding that it had; the others have frequencies between that channel's
  and the next one's. So the functions differ by that, on purpose: it is what tells copies in the stream apart. The same
  goes for a narrower target: at an integer factor its positions are those of the selected channels, exactly.

Copies of a hidden unit or of a head, with equal columns, would have equal gradients for ever. `spread` divides
unequally, entry by entry, and leaves the function as it is.

Reference: selection as in Xu et al., arXiv 2311.18823, section 3; repetition as in Chen et al., Net2Net, arXiv
1511.05641, section 2.2 (wider), at regular places instead of random ones. What depends on DiT is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from finectl.initializers.base import Initialized
from finectl.initializers.transfer import BLOCKS
from finectl.models.learngene import evenly_spaced
from finectl.models.presets import LAYER_TYPES, DiTConfig, count_parameters

STREAM, QUERIES, KEYS, VALUES, HIDDEN = "stream", "q", "k", "v", "hidden"
ATTENTION = (QUERIES, KEYS, VALUES)


class Sides(NamedTuple):
    """The spaces that a layer's weight lies between.

    Args:
        rows: The space of each chunk of rows; empty where rows are no channels, such as pixels and labels.
        columns: The space of the columns; None where they are none, such as pixels and sinusoids.
        table: Whether the columns are what the layer gives, as in a table of labels.
    """

    rows: tuple[str, ...]
    columns: str | None
    table: bool = False


SIDES: dict[str, Sides] = {
    LAYER_TYPES["qkv"]: Sides(ATTENTION, STREAM),
    LAYER_TYPES["o"]: Sides((STREAM,), VALUES),
    LAYER_TYPES["in"]: Sides((HIDDEN,), STREAM),
    LAYER_TYPES["out"]: Sides((STREAM,), HIDDEN),
    LAYER_TYPES["adaln"]: Sides((STREAM,) * 6, STREAM),
    "x_embedder.proj": Sides((STREAM,), None),
    "t_embedder.mlp.0": Sides((STREAM,), None),
    "t_embedder.mlp.2": Sides((STREAM,), STREAM),
    "y_embedder.embedding_table": Sides((), STREAM, table=True),
    "final_layer.linear": Sides((), STREAM),
    "final_layer.adaLN_modulation.1": Sides((STREAM,) * 2, STREAM),
}
"""A layer's path in the model, or in its block for layers of blocks -> what its rows and columns are."""


class Axes(NamedTuple):
    """Which rows and columns of a layer are taken, as int64 indices; None takes all of them as they are.

    Args:
        rows: (m1',), into the source's rows.
        columns: (m2',), into the source's columns.
        row_scale: (m1',), what each row, and its bias, is multiplied by.
        column_scale: (m2',), what each column is multiplied by.
    """

    rows: Tensor | None
    columns: Tensor | None
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None


def same_width(source: DiTConfig, target: DiTConfig) -> bool:
    """Return whether every space of channels is the same in both."""
    return all(getattr(source, name) == getattr(target, name) for name in ("width", "heads", "mlp_ratio"))


def sizes(config: DiTConfig) -> tuple[int, int, int]:
    """Return a model's heads, channels a head, and hidden units."""
    return config.heads, config.width // config.heads, config.width * config.mlp_ratio


def counted_once(made: Initialized, source: DiTConfig, target: DiTConfig) -> Initialized:
    """Count no more of a layer, and of embedders and final layer, than the source has: copies are not counted again."""
    counts = count_parameters(source)
    return replace(
        made,
        transferred=min(made.transferred, target.depth * counts["block"]),
        transferred_embedders=min(made.transferred_embedders, counts["total"] - counts["blocks"]),
    )


def regular(count: int, wanted: int) -> list[int]:
    """Return which of `count` channels are taken: a regular part of them, or a regular repetition.

    Args:
        count: Channels of the source, m.
        wanted: Channels of the target, m'. Up to m, every (m / m')-th, or the rounded places of an even division; above
            m, channel floor(i m / m'), so that copies lie side by side.

    Reference: arXiv 2311.18823, section 3, uniform element selection.
    """
    if wanted > count:
        return [index * count // wanted for index in range(wanted)]
    if count % wanted == 0:
        return list(range(0, count, count // wanted))
    return evenly_spaced(count, wanted)


def regular_heads(heads: int, wanted: int) -> list[int]:
    """Return which of `heads` heads are taken: head i of h' is head floor(i h / h'), repeated where h' > h."""
    return [index * heads // wanted for index in range(wanted)]


def attention_channels(source: DiTConfig, target: DiTConfig) -> Tensor:
    """Return the channels of q, k or v that are taken, head by head: (d',) int64."""
    heads, size, _ = sizes(source)
    wanted_heads, wanted_size, _ = sizes(target)
    inside = torch.tensor(regular(size, wanted_size))  # (k',)
    return (torch.tensor(regular_heads(heads, wanted_heads))[:, None] * size + inside).flatten()


def channels(source: DiTConfig, target: DiTConfig) -> dict[str, Tensor]:
    """Return the channels of each space that are taken, int64."""
    hidden = regular(sizes(source)[2], sizes(target)[2])
    taken = {STREAM: torch.tensor(regular(source.width, target.width)), HIDDEN: torch.tensor(hidden)}
    return {**taken, **dict.fromkeys(ATTENTION, attention_channels(source, target))}


def axes(source: DiTConfig, target: DiTConfig, taken: Mapping[str, Tensor] | None = None) -> dict[str, Axes]:
    """Return what is taken of each layer, by its path as in `SIDES`, for a target of any width.

    Args:
        source: The architecture that is taken from.
        target: The one that is made.
        taken: The channels of each space, where they are not those of `channels`.
    """
    kept_scores = score_scale(source, target) if taken is None else None
    taken = channels(source, target) if taken is None else taken
    space_size = {STREAM: source.width, HIDDEN: sizes(source)[2], **dict.fromkeys(ATTENTION, source.width)}
    made = {}
    for path, sides in SIDES.items():
        rows = [taken[space] + chunk * space_size[space] for chunk, space in enumerate(sides.rows)]
        columns = None if sides.columns is None else taken[sides.columns]
        made[path] = Axes(
            torch.cat(rows) if rows else None,
            columns,
            kept_scores if sides.rows == ATTENTION else None,
            None if columns is None or sides.table else division(columns),
        )
    return made


def division(indices: Tensor) -> Tensor | None:
    """Return 1 / c for channels that are there c times each, float64; None where none is there twice."""
    counts = torch.bincount(indices)[indices]
    return 1 / counts.double() if bool((counts > 1).any()) else None


def score_scale(source: DiTConfig, target: DiTConfig) -> Tensor | None:
    """Return what the rows of qkv are multiplied by where heads are larger, so that scores stay: (3 d',) float64.

    A channel that is there c times in a head of k' channels instead of k has the factor sqrt(sqrt(k' / k) / c) in both
    queries and keys, and 1 in values; None where heads are not larger.
    """
    size, wanted = sizes(source)[1], sizes(target)[1]
    if wanted <= size:
        return None
    inside = torch.tensor(regular(size, wanted))
    counts = torch.bincount(inside)[inside].double()  # (k',)
    scale = (math.sqrt(wanted / size) / counts).sqrt().repeat(target.heads)  # (d',)
    return torch.cat([scale, scale, torch.ones_like(scale)])


def select(tensors: Mapping[str, Tensor], taken: Mapping[str, Axes]) -> dict[str, Tensor]:
    """Return the taken rows and columns of weights, and the taken rows of biases, multiplied by their scales.

    Args:
        tensors: Weights (m1, m2, ...) and biases (m1,) by name.
        taken: What `axes` returned.
    """
    made = {}
    for name, value in tensors.items():
        rows, columns, row_scale, column_scale = taken[name.rpartition(".")[0]]
        part = value if rows is None else value.index_select(0, rows)
        if row_scale is not None:
            part = part * row_scale.to(part.dtype).view(-1, *[1] * (part.dim() - 1))
        if columns is not None and value.dim() > 1:
            part = part.index_select(1, columns)
            part = part if column_scale is None else part * column_scale.to(part.dtype)
        made[name] = part
    return made


def spread(tensors: Mapping[str, Tensor], taken: Mapping[str, Axes], generator: torch.Generator) -> dict[str, Tensor]:
    """Divide repeated columns unequally: each entry gets another share, and the shares of a channel's copies sum to 1.

    What the network computes stays, and copies no longer have equal gradients.

    Args:
        tensors: What `select` returned.
        taken: What `axes` returned.
        generator: Source of the shares, U(0.5, 1.5) before their sum is brought to 1.
    """
    made = dict(tensors)
    for name, value in tensors.items():
        _, columns, _, scale = taken[name.rpartition(".")[0]]
        if columns is None or scale is None or value.dim() == 1:
            continue
        shares = 0.5 + torch.rand(value.shape, dtype=torch.float64, generator=generator)  # (m1', m2')
        sums = torch.zeros(len(value), int(columns.max()) + 1, dtype=torch.float64).index_add(1, columns, shares)
        made[name] = (value.double() / scale * shares / sums[:, columns]).to(value.dtype)
    return made


def spread_state(
    state: Mapping[str, Tensor], taken: Mapping[str, Axes], generator: torch.Generator
) -> dict[str, Tensor]:
    """Divide the repeated columns of a whole model unequally, as `spread` does.

    Args:
        state: A dense model's, its blocks as `blocks.<l>.<name>`.
        taken: What `axes` returned.
        generator: Source of the shares.
    """
    made = {}
    for name, value in state.items():
        path = name.split(".", 2)[2] if name.startswith(BLOCKS) else name
        made[name] = spread({path: value}, taken, generator)[path]
    return made


Maps = Mapping[str, "Tensor | None"]


def transform(tensors: Mapping[str, Tensor], given: Maps, taken_in: Maps) -> dict[str, Tensor]:
    """Map the rows and columns of layers by a matrix for each space.

    Args:
        tensors: Weights (m1, m2, ...) and biases (m1,), named by a path of `SIDES` and `.weight` or `.bias`.
        given: Space -> (m', m), which maps channels that a layer gives; None leaves a space as it is.
        taken_in: Space -> (m', m), which maps the columns of layers that take channels in.

    Returns:
        M_rows W M_columns^T, chunk by chunk of the rows, and M_rows b.
    """
    made = {}
    for name, value in tensors.items():
        sides = SIDES[name.rpartition(".")[0]]
        mapped = value
        if sides.rows:
            chunks = zip(sides.rows, value.chunk(len(sides.rows)), strict=True)
            mapped = torch.cat([_rows(given[space], chunk) for space, chunk in chunks])
        if sides.columns is not None and value.dim() > 1:
            columns = (given if sides.table else taken_in)[sides.columns]
            mapped = mapped if columns is None else mapped @ columns.T
        made[name] = mapped
    return made


def _rows(matrix: Tensor | None, chunk: Tensor) -> Tensor:
    return chunk if matrix is None else torch.tensordot(matrix, chunk, dims=1)
