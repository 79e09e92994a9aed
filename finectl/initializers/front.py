"""FRONT: the low frequencies of the ancestor's weights, read at another depth and width. Nothing is trained.

The layers' tensors of one name are standardised, each by its own mean and deviation, stacked, and taken to the
frequency domain by a discrete cosine transform over depth, rows and columns; the low frequencies are kept (higher ones
cut off for a smaller target, zeros added for a larger one), transformed back, and given a mean and a deviation again.
Weights and biases are treated alike. Where an axis keeps its size, its transforms cancel and are left out.

Reference: Shen et al., arXiv 2603.07523 (ICML 2026).

Ours, for depth:
- The scale. The transforms here are orthonormal, and sqrt(L' / L) puts values, not coefficients, at the size they had:
  layers that are all alike stay as they are. The authors' code leaves a factor L / L' in the weights.
- Means and deviations are interpolated linearly at the places where the transform has the target's layers: layer l of
  L' lies at (l + 1/2) L / L' - 1/2, within the ancestor's first and last. The authors' code takes those of the first
  L' layers.

Ours, for width, R being the resizing of values from d to d' channels, sqrt(d' / d) times the orthonormal transforms:
- Rows are resized chunk by chunk, qkv in three and adaLN in six, so that queries do not run into keys. Embedders and
  final layer are resized likewise, without depth: R is the same wherever the stream or the condition is.
- Attention heads stay whole: the transform runs over the channels inside of a head, and heads are selected, or repeated
  with the output's columns divided, at regular places. Heads have no order that a frequency would mean anything in.
- Columns are resized by (d / d') R, since whoever sums over d' channels instead of d sums that much more: a layer's
  matrix becomes R W R+ with R+ = (d / d') R^T, the pseudo-inverse. Constant and slowly varying weights keep the size of
  what they give. In a wider target R+ R = 1 and LayerNorm commutes with R, so all linear parts do what they did; GELU,
  SiLU and the products with adaLN's scales and gates do not commute with R.
- Queries and keys have a factor (k / k')^(1/4) each where heads of k channels become heads of k', for attention's own
  division by the root of k'.

`--variant std`: low frequencies of tensors that vary are averages and so smaller, by sqrt(L' / L) where layers are
unrelated, and by sqrt(d' / d) where rows are. This variant gives every tensor the deviation read for it, over fewer
columns times sqrt(d / d'), which keeps the size of what unrelated weights give. A tensor that only grows loses nothing
and is left alone. The default, `plain`, leaves all as the frequencies have it.

No result for a diffusion model is published. Open: the training with a spectral penalty that the paper offers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, assemble
from finectl.initializers.width import (
    ATTENTION,
    HIDDEN,
    SIDES,
    STREAM,
    VALUES,
    counted_once,
    regular_heads,
    same_width,
    sizes,
    transform,
)
from finectl.models.presets import DiTConfig


def initialize(request: Request) -> Initialized:
    """Resize a dense ancestor to the target's depth and width in the frequency domain.

    Raises:
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    ancestor = Ancestor.of(request)
    layers, depth, rest = ancestor.layers, request.target.depth, ancestor.rest
    unit = request.job.config.variant == "std"
    made: list[dict[str, Tensor]] = [{} for _ in range(depth)]
    for name in layers[0]:
        resized = resize_layers(torch.stack([layer[name] for layer in layers]), depth, unit)
        for index, value in enumerate(resized):
            made[index][name] = value
    if not same_width(ancestor.config, request.target):
        maps = width_maps(ancestor.config, request.target)
        made = [resize_width(layer, maps, unit) for layer in made]
        rest = resize_width(rest, maps, unit)
    return counted_once(assemble(request, made, rest), ancestor.config, request.target)


Maps = dict[str, "Tensor | None"]


class WidthMaps(NamedTuple):
    """How channels are resized, (d', d) float64 for each space as `transform` takes it; None where d = d'.

    Args:
        given: R, for channels that a layer gives.
        taken_in: (d / d') R, for columns.
        scores: The factor of queries, and of keys, that keeps attention's scores.
    """

    given: Maps
    taken_in: Maps
    scores: float


def width_maps(source: DiTConfig, target: DiTConfig) -> WidthMaps:
    """Return how the channels of each space are resized."""
    heads, size, hidden = sizes(source)
    new_heads, new_size, new_hidden = sizes(target)
    given: Maps = {STREAM: _resizing(source.width, target.width), HIDDEN: _resizing(hidden, new_hidden)}
    taken_in = {space: None if map_ is None else map_ / len(map_) * map_.shape[1] for space, map_ in given.items()}
    if (heads, size) == (new_heads, new_size):
        none: Maps = dict.fromkeys(ATTENTION)
        return WidthMaps({**given, **none}, {**taken_in, **none}, 1.0)
    chosen = torch.eye(heads, dtype=torch.float64)[regular_heads(heads, new_heads)]  # (h', h)
    inside = resize(torch.eye(size, dtype=torch.float64), new_size)  # (k', k)
    values = torch.kron(chosen, inside)
    times = chosen.sum(0)[chosen.argmax(1)]  # (h',), how often each head is there
    output = torch.kron(chosen / times[:, None], inside * size / new_size)
    attention: Maps = dict.fromkeys(ATTENTION, values)
    return WidthMaps({**given, **attention}, {**taken_in, VALUES: output}, (size / new_size) ** 0.25)


def _resizing(size: int, wanted: int) -> Tensor | None:
    return None if size == wanted else resize(torch.eye(size, dtype=torch.float64), wanted)


def resize_width(tensors: Mapping[str, Tensor], maps: WidthMaps, unit: bool = False) -> dict[str, Tensor]:
    """Resize rows and columns of layers.

    Args:
        tensors: Weights and biases, as `transform` takes them.
        maps: From `width_maps`.
        unit: Whether a tensor that gets smaller has its deviation back.

    Returns:
        The same names, float64.
    """
    whole = {name: value.double() for name, value in tensors.items()}
    made = transform(whole, maps.given, maps.taken_in)
    for name, value in made.items():
        sides = SIDES[name.rpartition(".")[0]]
        if unit and value.numel() < whole[name].numel():
            made[name] = _restored(value, whole[name], summed=value.dim() > 1 and not sides.table)
        if sides.rows == ATTENTION:
            queries, keys, values = made[name].chunk(3)
            made[name] = torch.cat([maps.scores * queries, maps.scores * keys, values])
    return made


def _restored(value: Tensor, before: Tensor, *, summed: bool) -> Tensor:
    """Bring a resized tensor to the deviation that it had, over columns that are summed times sqrt(d / d')."""
    fan = before.shape[1] / value.shape[1] if summed else 1.0
    wanted = before.std(correction=0) * min(fan, math.sqrt(fan))  # more columns hold no more than the fewer did
    mean = value.mean()
    return mean + (value - mean) * wanted / _or_one(value.std(correction=0))


def resize_layers(stack: Tensor, depth: int, unit: bool = False) -> Tensor:
    """Read tensors over L layers at L' layers: standardise, resize over depth, restore mean and deviation.

    Args:
        stack: (L, ...).
        depth: L', at least 1.
        unit: Whether the resized tensors are brought to deviation 1 before theirs is restored.

    Returns:
        (L', ...), float64.

    Reference: arXiv 2603.07523.
    """
    flat = stack.double().flatten(1)  # (L, n)
    mean, deviation = flat.mean(1, keepdim=True), _deviation(flat)  # (L, 1)
    resized = resize((flat - mean) / _or_one(deviation), depth)  # (L', n)
    if unit:
        resized = resized / _or_one(_deviation(resized))
    restored = read_at(mean, depth) + read_at(deviation, depth) * resized
    return restored.unflatten(1, stack.shape[1:])


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II as a matrix, (size, size) float64: row k holds frequency k.

    Entry (k, i) is sqrt(2 / n) cos(pi k (2 i + 1) / (2 n)), and sqrt(1 / n) for k = 0; the transpose is the inverse.
    """
    index = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / (2 * size) * index[:, None] * (2 * index + 1)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


def resize(values: Tensor, size: int) -> Tensor:
    """Resize the first axis through the low frequencies, keeping the size of the values: (L, n) to (L', n).

    Args:
        values: (L, n), float64.
        size: L'. The same size is the identity; a constant stays one; a cosine of a kept frequency is the same cosine.
    """
    layers = values.shape[0]
    kept = min(layers, size)
    coefficients = dct_matrix(layers)[:kept] @ values  # (kept, n)
    return math.sqrt(size / layers) * (dct_matrix(size)[:kept].T @ coefficients)


def read_at(curve: Tensor, size: int) -> Tensor:
    """Read a curve over L layers linearly at (l + 1/2) L / L' - 1/2, held at its ends: (L, 1) to (L', 1)."""
    return F.interpolate(curve.T[None], size=size, mode="linear", align_corners=False)[0].T


def _deviation(rows: Tensor) -> Tensor:
    return rows.std(1, correction=0, keepdim=True)


def _or_one(deviation: Tensor) -> Tensor:
    """Return what can be divided by: tensors whose entries are all alike, such as unused biases, have deviation 0."""
    return torch.where(deviation > 0, deviation, 1.0)
