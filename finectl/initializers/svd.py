"""Layers of the ancestor, each matrix cut to a low rank on its own: what FINE is without its shared factors.

Every chosen layer's matrix W is replaced by its best approximation of rank r, U_r diag(s_r) V_r^T, from its own
singular value decomposition; biases are kept. The rank is half of the matrix's smaller side, which for the five types
is half of the width. Which layers: `even` (the default), first to last evenly spaced, repeated in a deeper target; or
`first`, the first ones, where what lies beyond the ancestor's depth starts as DiT's own initialisation.

Reference: the ablation without factorisation of FINE, arXiv 2409.19289; singular values as what a matrix is known by
are from SVDiff (arXiv 2303.11305, section 3) and KIND (ICML 2025).

Another width: the layers are first brought to it, channels at a regular distance selected or repeated (`width`), and
then cut to half of the target's rank. At twice the width that is the ancestor's whole rank, so nothing is lost.

Ours: the rank, which the ablation does not state, the choice of layers, and the width. Open: SVDiff then tunes the
singular values, KIND trains in factored form; here nothing is tuned. Repeated hidden units and heads are exact copies.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, Layer, assemble, count
from finectl.initializers.width import axes, counted_once, same_width, select
from finectl.models.learngene import evenly_spaced


def initialize(request: Request) -> Initialized:
    """Build the target from low-rank layers of a dense ancestor; what is counted is the factors and the biases.

    Raises:
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
    """
    ancestor = Ancestor.of(request)
    layers, depth, rest = ancestor.layers, request.target.depth, ancestor.rest
    most = count(layers[0])
    if not same_width(ancestor.config, request.target):
        taken = axes(ancestor.config, request.target)
        layers, rest = [select(layer, taken) for layer in layers], select(rest, taken)
    if request.job.config.variant == "first":
        chosen = list(range(min(depth, len(layers))))
    else:
        chosen = evenly_spaced(len(layers), depth)
    kept = {index: low_rank_layer(layers[index]) for index in sorted(set(chosen))}
    made = counted_once(assemble(request, [kept[index] for index in chosen], rest), ancestor.config, request.target)
    # Of a wider target the ancestor's own layer may be less to keep.
    return replace(made, transferred=sum(min(most, kept_parameters(layer)) for layer in kept.values()))


def low_rank_layer(layer: Layer) -> dict[str, Tensor]:
    """Return a block's parameters with every matrix at half of its full rank."""
    return {name: truncate(value, half_rank(value)) if value.ndim == 2 else value for name, value in layer.items()}


def half_rank(weight: Tensor) -> int:
    """Return half of the smaller side of a matrix, at least 1."""
    return max(1, min(weight.shape) // 2)


def truncate(weight: Tensor, rank: int) -> Tensor:
    """Return the nearest matrix of a rank, in the Frobenius and in the spectral norm.

    Args:
        weight: (m1, m2).
        rank: At least 1; from min(m1, m2) on, the matrix itself is returned up to rounding.

    Returns:
        (m1, m2), of the type of `weight`; computed in float64.

    Reference: Eckart and Young, Psychometrika 1 (1936), pages 211-218.
    """
    U, s, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vt[:rank]).to(weight.dtype)


def kept_parameters(layer: Layer) -> int:
    """Count what has to be stored of a block: r (m1 + m2 + 1) values a matrix, and its biases."""
    return sum(
        half_rank(value) * (sum(value.shape) + 1) if value.ndim == 2 else value.numel() for value in layer.values()
    )
