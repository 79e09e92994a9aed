"""Which of the two ways to apply W = U diag(sigma) V^T is cheaper (no torch import)."""

from __future__ import annotations

from functools import lru_cache

MATERIALISE = "materialise"
SEQUENCE = "sequence"

PASS_COST = 16.0
"""Multiply-adds of a matrix product in the time in which memory moves one matrix element."""


@lru_cache(maxsize=4096)
def cheaper_way(
    tokens: int,
    outputs: int,
    inputs: int,
    rank: int,
    *,
    train_U: bool,
    train_V: bool,
    train_sigma: bool,
    train_x: bool = True,
) -> str:
    """Return "materialise" or "sequence", whichever costs less in forward and backward together.

    Args:
        tokens: Rows of the input, T.
        outputs: Rows of W, m1.
        inputs: Columns of W, m2.
        rank: Columns of U and V, r.
        train_U: Whether U needs a gradient; `train_V`, `train_sigma` and `train_x` (the input) likewise.
    """
    costs = way_costs(
        tokens, outputs, inputs, rank, train_U=train_U, train_V=train_V, train_sigma=train_sigma, train_x=train_x
    )
    return MATERIALISE if costs[MATERIALISE] < costs[SEQUENCE] else SEQUENCE


def way_costs(
    tokens: int,
    outputs: int,
    inputs: int,
    rank: int,
    *,
    train_U: bool,
    train_V: bool,
    train_sigma: bool,
    train_x: bool = True,
) -> dict[str, float]:
    """Estimate the cost of both ways, in multiply-adds.

    Products count m n k each, and every matrix that is written and read again counts `PASS_COST` an element: with few
    tokens the products are bound by memory, and a built W then costs more than its multiply-adds.

    Args:
        tokens: As in `cheaper_way`, and so the other arguments.

    Returns:
        {"materialise": multiply-adds, "sequence": multiply-adds}.
    """
    T, m1, m2, r = tokens, outputs, inputs, rank
    factors = train_U or train_V
    any_gradient = factors or train_sigma or train_x

    sequence = T * r * (m1 + m2)
    if any_gradient and (train_x or train_V or (train_sigma and not factors)):
        sequence += T * m1 * r  # q = gy U
    sequence += T * r * m2 * (train_x + train_V)
    if factors and (train_U or train_sigma):
        sequence += T * m1 * r  # gradient of U diag(sigma)
    # (T, r) product: written, read; its gradient as well. U diag(sigma): written, read.
    sequence_passes = T * r * (1 + any_gradient) + m1 * r * (1 + factors)

    materialise = m1 * m2 * r + T * m1 * m2 * (1 + train_x)
    materialise_passes = float(m1 * m2 + m1 * r)
    if factors:
        materialise += T * m1 * m2  # gradient of W
        materialise += m1 * m2 * r * (int(train_U or train_sigma) + train_V)
        materialise_passes += m1 * m2 + m1 * r
    elif train_sigma:
        materialise += T * r * (m1 + m2)  # q = gy U and h = x V, instead of the gradient of W
        materialise_passes += 2 * T * r
    return {
        MATERIALISE: materialise + PASS_COST * materialise_passes,
        SEQUENCE: sequence + PASS_COST * sequence_passes,
    }
