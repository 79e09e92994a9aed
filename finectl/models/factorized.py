"""Factorised linear layers W = U diag(sigma) V^T: U and V shared by all layers of a type, sigma one layer's own.

A layer applies its weight in one of two ways, the cheaper by `finectl.models.cost`: it builds W and multiplies once
("materialise"), or it multiplies by V and then by U ("sequence"). Both give the same values and gradients up to
rounding. While U and V are frozen, neither way forms a gradient of W.

Reference: FINE, arXiv 2409.19289, eq. 3.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finectl.models.cost import MATERIALISE, SEQUENCE, cheaper_way

AUTO = "auto"
SIGMA_SPREAD = 0.1
"""Standard deviation of a new layer's sigma over its mean."""


class SharedFactors(nn.Module):
    """U and V of one layer type.

    Args:
        outputs: Rows of W, m1.
        inputs: Columns of W, m2.
        rank: Columns of U and V. Above min(m1, m2) the factors are over-complete: their columns can then be of unit
            length but not orthogonal.
    """

    def __init__(self, outputs: int, inputs: int, rank: int) -> None:
        super().__init__()
        self.U = nn.Parameter(torch.zeros(outputs, rank))  # (m1, r)
        self.V = nn.Parameter(torch.zeros(inputs, rank))  # (m2, r)


class FactorizedLinear(nn.Module):
    """A linear layer whose weight is U diag(sigma) V^T with shared U and V.

    Args:
        shared: U and V; they are referred to, not owned, so that they appear once in the model's state.
        sharing: Consecutive entries of the diagonal that share one value of `sigma`.

    Attributes:
        sigma: (ceil(r / sharing),).
        bias: (m1,).
        way: "auto" (the cost model chooses), "materialise" or "sequence".
    """

    def __init__(self, shared: SharedFactors, sharing: int = 1) -> None:
        super().__init__()
        outputs, rank = shared.U.shape
        # A tuple keeps the shared module out of this module's children, and deepcopy still follows it.
        self._shared = (shared,)
        self.sharing = sharing
        self.sigma = nn.Parameter(torch.zeros(-(-rank // sharing)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.way = AUTO

    @property
    def shared(self) -> SharedFactors:
        """U and V of this layer's type."""
        return self._shared[0]

    def diagonal(self) -> Tensor:
        """Return the diagonal of W's middle factor, (r,), with shared values repeated."""
        return expand_sigma(self.sigma, self.shared.U.shape[1], self.sharing)

    def weight(self) -> Tensor:
        """Return W, (m1, m2)."""
        return build_weight(self.shared.U, self.diagonal(), self.shared.V)

    def choose(self, x: Tensor) -> str:
        """Return the way, "materialise" or "sequence", in which `forward` would apply W to `x`."""
        if self.way != AUTO:
            return self.way
        U, V = self.shared.U, self.shared.V
        on = torch.is_grad_enabled()
        return cheaper_way(
            x.numel() // x.shape[-1],
            U.shape[0],
            V.shape[0],
            U.shape[1],
            train_U=on and U.requires_grad,
            train_V=on and V.requires_grad,
            train_sigma=on and self.sigma.requires_grad,
            train_x=on and x.requires_grad,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., m2), float.

        Returns:
            (..., m1), in the dtype of `x`, or of autocast.
        """
        return factorized_linear(
            x, self.shared.U, self.diagonal(), self.shared.V, self.bias, materialise=self.choose(x) == MATERIALISE
        )

    def extra_repr(self) -> str:
        """Describe the sizes, for printing a model."""
        (outputs, rank), inputs = self.shared.U.shape, self.shared.V.shape[0]
        return f"in_features={inputs}, out_features={outputs}, rank={rank}, sharing={self.sharing}, way={self.way}"


def factorized_linear(
    x: Tensor, U: Tensor, sigma: Tensor, V: Tensor, bias: Tensor | None, *, materialise: bool
) -> Tensor:
    """Compute x W^T + bias with W = U diag(sigma) V^T.

    Args:
        x: (..., m2), float.
        U: (m1, r).
        sigma: (r,).
        V: (m2, r).
        bias: (m1,), or None.
        materialise: Build W and multiply once, or multiply by V and then by U diag(sigma).

    Returns:
        (..., m1).
    """
    sigma_only = sigma.requires_grad and not (U.requires_grad or V.requires_grad) and torch.is_grad_enabled()
    if sigma_only:
        return cast(Tensor, _SigmaOnly.apply(x, U, sigma, V, bias, materialise))
    if materialise:
        return F.linear(x, build_weight(U, sigma, V), bias)
    # sigma is folded into the small matrix U: scaling the (tokens, r) product would add a pass over it, and one more
    # in the backward.
    return F.linear(F.linear(x, V.t()), U * sigma, bias)  # (..., m2) -> (..., r) -> (..., m1)


class _SigmaOnly(torch.autograd.Function):
    """x W^T + bias where only sigma, bias and x may need gradients.

    With h = x V and q = (dL/dy) U: dL/dsigma = sum over tokens of q * h, and dL/dx = q (V diag(sigma))^T or
    (dL/dy) W. No gradient of W or of U diag(sigma) is formed, and no (tokens, r) matrix is scaled by sigma.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, U: Tensor, sigma: Tensor, V: Tensor, bias: Tensor | None, materialise: bool
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)  # (T, m2)
        U, V = U.to(dtype), V.to(dtype)
        scaled = U * sigma.to(dtype)  # (m1, r)
        offset = None if bias is None else bias.to(dtype)
        if materialise:
            weight = scaled @ V.t()  # (m1, m2)
            kept = (flat, weight)
            y = F.linear(flat, weight, offset)  # (T, m1)
        else:
            h = flat @ V  # (T, r)
            kept = (h, sigma)
            y = F.linear(h, scaled, offset)
        ctx.save_for_backward(U, V, *kept)
        ctx.materialise = materialise
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, sigma.dtype, None if bias is None else bias.dtype)
        return y.reshape(*x.shape[:-1], U.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        U, V, first, second = ctx.saved_tensors
        x_dtype, sigma_dtype, bias_dtype = ctx.dtypes
        gy = gradients[0].reshape(-1, U.shape[0]).to(U.dtype)  # (T, m1)
        dx = dsigma = dbias = None
        q = gy @ U if ctx.needs_input_grad[2] or not ctx.materialise else None  # (T, r)
        if ctx.needs_input_grad[0]:
            flat = gy @ second if ctx.materialise else cast(Tensor, q) @ (V * second.to(V.dtype)).t()  # (T, m2)
            dx = flat.reshape(ctx.shape).to(x_dtype)
        if ctx.needs_input_grad[2] and q is not None:
            h = first @ V if ctx.materialise else first  # (T, r)
            dsigma = _column_sums(q, h).to(sigma_dtype)
        if ctx.needs_input_grad[4]:
            dbias = gy.sum(0, dtype=_wide(gy.dtype)).to(bias_dtype)
        return dx, None, dsigma, None, dbias, None


def _column_sums(q: Tensor, h: Tensor) -> Tensor:
    """Return sum over rows of q * h, (r,), in float32 or wider; `q` is overwritten."""
    return q.mul_(h).sum(0, dtype=_wide(q.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand_sigma(sigma: Tensor, rank: int, sharing: int) -> Tensor:
    """Repeat each of the ceil(rank / sharing) values `sharing` times: (rank,)."""
    return sigma if sharing == 1 else sigma.repeat_interleave(sharing)[:rank]


def build_weight(U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
    """Return W = U diag(sigma) V^T, (m1, m2), from (m1, r), (r,) and (m2, r)."""
    return (U * sigma) @ V.t()


def unit_columns(rows: int, rank: int, generator: torch.Generator) -> Tensor:
    """Draw a random (rows, rank) float32 matrix with columns of length 1, orthogonal when rank <= rows.

    Above that rank no orthogonal columns exist; independent normalised Gaussian ones take their place.
    """
    noise = torch.randn(rows, rank, generator=generator, device=generator.device)
    if rank > rows:
        return noise / noise.norm(dim=0)
    q, r = torch.linalg.qr(noise)
    # A QR routine is free in the signs of its columns; fixing them makes the draw uniform and the same everywhere.
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def random_sigma(count: int, outputs: int, inputs: int, rank: int, generator: torch.Generator) -> Tensor:
    """Draw the diagonal of one layer, (count,) float32: N(1, 0.1) sqrt(2 m1 m2 / (1.01 r (m1 + m2))).

    With columns of unit length in U and V, the entries of W then have Xavier's variance 2 / (m1 + m2). Layers of a
    type, which share U and V, start apart by their draws, but with equal signs: between layers whose signs differ
    sigma has no curve over depth, and a model of another depth that is read off it starts badly.
    """
    noise = torch.randn(count, generator=generator, device=generator.device)
    variance = 2 * outputs * inputs / (rank * (outputs + inputs))
    return (1 + SIGMA_SPREAD * noise) * math.sqrt(variance / (1 + SIGMA_SPREAD**2))


__all__ = [
    "AUTO",
    "MATERIALISE",
    "SEQUENCE",
    "FactorizedLinear",
    "SharedFactors",
    "build_weight",
    "expand_sigma",
    "factorized_linear",
    "random_sigma",
    "unit_columns",
]
