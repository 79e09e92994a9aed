"""FRONT: the low frequencies of the ancestor's weights, read at another depth. Nothing is trained.

The layers' tensors of one name are standardised, each by its own mean and deviation, stacked, and taken to the
frequency domain by a discrete cosine transform; the low frequencies over depth are kept (higher ones cut off for a
shallower target, zeros added for a deeper one), transformed back, and given a mean and a deviation again. Weights and
biases are treated alike.

The method also transforms rows and columns. Only depth is resized here, no frequency of rows and columns is dropped,
and so those transforms cancel exactly and are left out. Other widths are left out for good: attention heads are whole
groups of rows, which frequencies over rows would mix.

Reference: Shen et al., arXiv 2603.07523 (ICML 2026).

Ours:
- The scale. The transforms here are orthonormal, and sqrt(L' / L) puts values, not coefficients, at the size they had:
  layers that are all alike stay as they are. The authors' code leaves a factor L / L' in the weights.
- Means and deviations are interpolated linearly at the places where the transform has the target's layers: layer l of
  L' lies at (l + 1/2) L / L' - 1/2, within the ancestor's first and last. The authors' code takes those of the first
  L' layers.
- `--variant std`: low frequencies of layers that differ are averages and so smaller than the layers, by sqrt(L' / L)
  where layers are unrelated. This variant gives every tensor exactly the deviation read for it. The default, `plain`,
  leaves it as the frequencies have it.

No result for a diffusion model is published. Open: the training with a spectral penalty that the paper offers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, assemble


def initialize(request: Request) -> Initialized:
    """Resize the layers of a dense ancestor to the target's depth in the frequency domain."""
    ancestor = Ancestor.of(request)
    layers, depth = ancestor.layers, request.target.depth
    unit = request.job.config.variant == "std"
    made: list[dict[str, Tensor]] = [{} for _ in range(depth)]
    for name, first in layers[0].items():
        resized = resize_layers(torch.stack([layer[name] for layer in layers]), depth, unit)
        for index, value in enumerate(resized.to(first.dtype)):
            made[index][name] = value
    return assemble(request, made, ancestor.rest)


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
