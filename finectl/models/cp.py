"""CP decomposition of stacked weights: W^(l) = U diag(sigma^(l)) V^T by alternating least squares.

The matrices of one type from all layers are a tensor (L, m1, m2); sharing U and V among the layers is a rank-r CP
decomposition of it. With a metric C^(l) for each layer, the second moments of the layer's inputs, the error that is
minimised is that of the layers' outputs, sum over l of ||(W^(l) - U diag(sigma^(l)) V^T) C^(l)^(1/2)||^2.

Reference: Kolda and Bader, Tensor decompositions and applications, SIAM Review 51(3), 2009, section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STARTS = ("mean", "layers")
SHORT_ITERATIONS = 20
"""Sweeps of every start before the best one goes on alone."""

RIDGE = 1e-13
METRIC_RIDGE = 1e-6
CG_ITERATIONS = 3
EXACT = 1e-15
"""Squared relative error below which float64 tells nothing more."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A stack of weights as shared factors.

    Args:
        U: (m1, r), columns of length 1.
        sigma: (L, r).
        V: (m2, r), columns of length 1.
        error: Relative error over all layers, in the metric.
        layer_errors: (L,), the same layer by layer.
        history: Relative error at the start and after every sweep.
        start: The start that was kept.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor
    error: float
    layer_errors: Tensor
    history: tuple[float, ...]
    start: str


def decompose(
    weights: Tensor,
    rank: int,
    *,
    metric: Tensor | None = None,
    iterations: int = 200,
    tolerance: float = 1e-6,
    generator: torch.Generator | None = None,
    between: Callable[[], None] | None = None,
) -> Decomposition:
    """Fit shared factors to a stack of weights, in float64.

    Args:
        weights: (L, m1, m2), finite, the matrices of one type.
        rank: Columns of U and V, at least 1; it may exceed m1 and m2.
        metric: (L, m2, m2), finite, symmetric and positive semidefinite; None is the identity.
        iterations: Most sweeps over U, V and sigma.
        tolerance: Stop when a sweep lowers the squared error by a smaller part of it.
        generator: Source of the columns that no singular vector fills; by default one with a fixed seed.
        between: Called after every sweep, for example to look for signals.

    Returns:
        The best of what the starts led to.

    """
    random = generator or torch.Generator().manual_seed(0)
    fit = _Fit(weights.double(), metric)
    short = min(SHORT_ITERATIONS, iterations)
    states = [fit.run(fit.start(kind, rank, random), short, tolerance, between) for kind in STARTS]
    best = min(states, key=lambda state: state.errors[-1])
    best = fit.run(best, iterations - len(best.errors) + 1, tolerance, between)
    return Decomposition(
        best.U,
        best.sigma,
        best.V,
        error=fit.relative(best.errors[-1]),
        layer_errors=(best.layers / fit.layer_norms.clamp(min=_tiny(fit.layer_norms))).sqrt(),
        history=tuple(fit.relative(error) for error in best.errors),
        start=best.kind,
    )


def relative_errors(weights: Tensor, U: Tensor, sigma: Tensor, V: Tensor, metric: Tensor | None = None) -> Tensor:
    """Return the relative error of U diag(sigma) V^T in each layer, (L,), formed from the difference itself.

    Args:
        weights: (L, m1, m2).
        U: (m1, r).
        sigma: (L, r).
        V: (m2, r).
        metric: (L, m2, m2), or None.
    """
    errors = []
    for layer, weight in enumerate(weights.double()):
        rest = weight - (U.double() * sigma[layer].double()) @ V.double().t()  # (m1, m2)
        squares = [(x * x).sum() if metric is None else (x @ metric[layer] * x).sum() for x in (rest, weight)]
        errors.append((squares[0] / squares[1].clamp(min=_tiny(weights))).clamp(min=0).sqrt())
    return torch.stack(errors)


@dataclass
class _State:
    """Where a fit is; `errors` are squared, `layers` (L,) the last of them by layer."""

    kind: str
    U: Tensor
    sigma: Tensor
    V: Tensor
    errors: list[float]
    layers: Tensor


class _Fit:
    """The least-squares problem: each of U, V and sigma is solved for exactly (V: by conjugate gradients) in turn."""

    def __init__(self, weights: Tensor, metric: Tensor | None) -> None:
        self.W = weights  # (L, m1, m2)
        self.C: Tensor | None = None
        self.WC = weights
        if metric is not None:
            # Directions that no input had cost nothing; a little of the raw error keeps them decided.
            size = metric.shape[-1]
            scale = metric.diagonal(dim1=1, dim2=2).mean().to(weights)
            eye = torch.eye(size, dtype=weights.dtype, device=weights.device)
            self.C = metric.to(weights) + METRIC_RIDGE * scale * eye  # (L, m2, m2)
            self.WC = weights @ self.C
        self.layer_norms = (self.WC * weights).sum((1, 2))  # (L,)
        self.norm = float(self.layer_norms.sum())

    def relative(self, squared: float) -> float:
        return math.sqrt(max(squared, 0.0) / self.norm) if self.norm else 0.0

    def start(self, kind: str, rank: int, random: torch.Generator) -> _State:
        """Return singular vectors of the mean of the layers, or the strongest of all layers, as U and V."""
        whiten, back = self._mean_root()
        white = self.W @ whiten  # (L, m1, m2)
        if kind == "mean":
            left, _, right = torch.linalg.svd(white.mean(0), full_matrices=False)
            U, V = left[:, :rank], right[:rank].t()
        else:
            left, values, right = torch.linalg.svd(white, full_matrices=False)
            top = values.flatten().argsort(descending=True, stable=True)[:rank]
            U = left.transpose(1, 2).flatten(0, 1)[top].t()
            V = right.flatten(0, 1)[top].t()
        U, V = _filled(U, rank, random), back @ _filled(V, rank, random)
        V = V / V.norm(dim=0).clamp(min=_tiny(V))
        sigma, layers = self.solve_sigma(U, V, self._project(V))
        return _State(kind, U, sigma, V, [float(layers.sum())], layers)

    def run(self, state: _State, sweeps: int, tolerance: float, between: Callable[[], None] | None = None) -> _State:
        """Sweep until the error hardly falls; every second sweep tries a longer step, kept where it is better.

        The error never rises: each part is solved for with the others fixed.
        """
        U, sigma, V, layers, errors = state.U, state.sigma, state.V, state.layers, list(state.errors)
        projected = self._project(V)  # (L, m1, r)
        for _ in range(max(sweeps, 0)):
            before_U, before_V, before = U, V, errors[-1]
            U = self.solve_left(sigma, V, projected)
            V = self.solve_right(U, sigma, V)
            U, sigma, V = _balanced(U, sigma, V)
            projected = self._project(V)
            sigma, layers = self.solve_sigma(U, V, projected)
            sweep = len(errors)
            if sweep > 2 and sweep % 2 == 0:
                length = (sweep + 1) ** (1 / 3)
                long_U, _, long_V = _balanced(
                    before_U + length * (U - before_U), sigma, before_V + length * (V - before_V)
                )
                long_projected = self._project(long_V)
                long_sigma, long_layers = self.solve_sigma(long_U, long_V, long_projected)
                if long_layers.sum() < layers.sum():
                    U, sigma, V, layers, projected = long_U, long_sigma, long_V, long_layers, long_projected
            error = float(layers.sum())
            if error > before:  # rounding only: nothing more is to be gained
                break
            state = _State(state.kind, U, sigma, V, [*errors, error], layers)
            errors.append(error)
            if between is not None:
                between()
            if before - error <= tolerance * before or error <= EXACT * self.norm:
                break
        return state

    def solve_left(self, sigma: Tensor, V: Tensor, projected: Tensor) -> Tensor:
        """Return the best U, (m1, r); `projected` is W C V."""
        gram = (self._gram(V) * sigma[:, :, None] * sigma[:, None, :]).sum(0)  # (r, r)
        return _solve(gram, torch.einsum("lmr,lr->rm", projected, sigma)).t()

    def solve_right(self, U: Tensor, sigma: Tensor, V: Tensor) -> Tensor:
        """Return the best V, (m2, r), or with a metric one that is better than `V`.

        With a metric the equations, sum over l of C^(l) V A^(l) = B, do not separate; conjugate gradients start from
        `V` and are preconditioned by the mean of C and the sum of A, which would be exact if all C were equal.
        """
        outer = U.t() @ U * sigma[:, :, None] * sigma[:, None, :]  # A: (L, r, r)
        wanted = torch.zeros_like(V)
        for layer, weight in enumerate(self.WC):
            wanted += weight.t() @ (U * sigma[layer])
        if self.C is None:
            return _solve(outer.sum(0), wanted.t()).t()
        metric = self.C
        inside, outside = _factor(outer.sum(0)), _factor(metric.mean(0))

        def apply(x: Tensor) -> Tensor:
            result = torch.zeros_like(x)
            for layer in range(len(metric)):
                result += metric[layer] @ x @ outer[layer]
            return result

        def precondition(x: Tensor) -> Tensor:
            return torch.cholesky_solve(torch.cholesky_solve(x, outside).t(), inside).t()

        rest = wanted - apply(V)
        direction = precondition(rest)
        product = (rest * direction).sum()
        least = EXACT * product
        for _ in range(CG_ITERATIONS):
            if product <= least:
                break
            image = apply(direction)
            length = product / (direction * image).sum()
            V = V + length * direction
            rest = rest - length * image
            better = precondition(rest)
            product, previous = (rest * better).sum(), product
            direction = better + product / previous * direction
        return V

    def solve_sigma(self, U: Tensor, V: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best sigma, (L, r), and the squared error of each layer, (L,)."""
        gram = U.t() @ U * self._gram(V)  # (L, r, r)
        wanted = torch.einsum("mr,lmr->lr", U, projected)
        sigma = _solve(gram, wanted[:, :, None])[:, :, 0]
        squares = torch.einsum("lr,lrq,lq->l", sigma, gram, sigma)
        return sigma, (self.layer_norms - 2 * (sigma * wanted).sum(1) + squares).clamp(min=0)

    def _project(self, V: Tensor) -> Tensor:
        return self.WC @ V  # (L, m1, r)

    def _gram(self, V: Tensor) -> Tensor:
        """Return V^T C^(l) V, (L or 1, r, r)."""
        return (V.t() @ V)[None] if self.C is None else V.t() @ (self.C @ V)

    def _mean_root(self) -> tuple[Tensor, Tensor]:
        """Return the square root of the mean metric and its inverse, (m2, m2)."""
        if self.C is None:
            eye = torch.eye(self.W.shape[2], dtype=self.W.dtype, device=self.W.device)
            return eye, eye
        values, vectors = torch.linalg.eigh(self.C.mean(0))
        values = values.clamp(min=float(values[-1]) * METRIC_RIDGE)
        return (vectors * values.sqrt()) @ vectors.t(), (vectors * values.rsqrt()) @ vectors.t()


def _factor(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of (..., n, n) with a ridge relative to its diagonal, raised until there is one."""
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=_tiny(gram))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    ridge = RIDGE
    while True:
        factor, failed = torch.linalg.cholesky_ex(gram + ridge * scale * eye)
        if ridge > 1 or not bool(failed.any()):
            return factor
        ridge *= 100


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right, _factor(gram))


def _balanced(U: Tensor, sigma: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the lengths of the columns of U and V into sigma."""
    left, right = (x.norm(dim=0).clamp(min=_tiny(x)) for x in (U, V))
    return U / left, sigma * left * right, V / right


def _filled(columns: Tensor, rank: int, random: torch.Generator) -> Tensor:
    """Add random columns of length 1 until there are `rank`."""
    missing = rank - columns.shape[1]
    if missing <= 0:
        return columns
    noise = torch.randn(columns.shape[0], missing, generator=random, dtype=torch.float64).to(columns)
    return torch.cat([columns, noise / noise.norm(dim=0)], dim=1)


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
