"""Mimetic initialisation: attention starts with the diagonals that trained transformers have; it takes no source.

Written for row vectors, x W. With Z of normal entries of variance 1/d, fresh for each use, and A = P S R^T (SVD):

- in each head, A = alpha_q Z + beta_q I, W_Q = P_k sqrt(S_k), W_K = R_k sqrt(S_k), k = d / heads: the logits of a head
  are x A_k x^T / sqrt(k), where A_k is the matrix of rank k nearest to A, so tokens attend to tokens like themselves;
- in each layer, A = alpha_v Z - beta_v I, W_V = P sqrt(S), W_proj = sqrt(S) R^T: what all heads write together is x A
  for a token that attends to itself. Head i holds the i-th k singular values, from the largest.

A linear layer computes x W^T, so the rows of q, k and v are the columns of W_Q, W_K and W_V, and the weight of `proj`
is the transpose of W_proj. Everything else starts as DiT's own initialisation does; its gates are zero, so the
attention of a block comes into effect as its gate opens.

Reference: Trockman and Kolter, arXiv 2305.09828, its products of weights.

Open: ports disagree on the constants, which `--set alpha_q=0.7,beta_q=0.7,alpha_v=0.4,beta_v=0.4` names. `paper` reads
them as they are; `swapped` exchanges the two pairs, whatever they are set to: queries and keys get alpha_v and beta_v,
values get alpha_q and beta_q. The position embedding is DiT's own and is not rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from scipy.linalg import eigh
from torch import Tensor

from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import BLOCKS, fresh_state
from finectl.models.presets import LAYER_TYPES


class Constants(NamedTuple):
    """Shares of noise (alpha) and of the identity (beta) in the products of queries and keys, and of values."""

    alpha_q: float
    beta_q: float
    alpha_v: float
    beta_v: float


def constants_of(values: Mapping[str, float], variant: str) -> Constants:
    """Return the constants of a variant: `swapped` exchanges those of queries and keys with those of values."""
    found = Constants(**values)
    return Constants(*found[2:], *found[:2]) if variant == "swapped" else found


def initialize(request: Request) -> Initialized:
    """Draw the attention layers of every block with the prescribed products, and the rest as DiT's own.

    Raises:
        Interrupted: a signal came between two layers.
    """
    config, target = request.job.config, request.target
    constants = constants_of(request.constants, config.variant)
    state = fresh_state(request)
    for index in range(target.depth):
        request.job.stop_if_requested()
        generator = generator_for("init-mimetic", config.seed, index)
        qkv, proj = attention_weights(target.width, target.heads, constants, generator)
        state[f"{BLOCKS}{index}.{LAYER_TYPES['qkv']}.weight"] = qkv
        state[f"{BLOCKS}{index}.{LAYER_TYPES['o']}.weight"] = proj
    return Initialized(state)


def attention_weights(
    width: int, heads: int, constants: Constants, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the weights of one layer's attention.

    Args:
        width: d.
        heads: Heads, a divisor of d.
        constants: Shares of noise and identity.
        generator: Source of the noise: one matrix a head, in order, then that of the values.

    Returns:
        The fused query-key-value weight, (3d, d) float32: all heads of q, then of k, then of v; and the weight of the
        projection, (d, d) float32.

    Reference: arXiv 2305.09828.
    """
    size = width // heads
    products = [noisy_identity(width, constants.alpha_q, constants.beta_q, generator) for _ in range(heads)]
    pairs = [balanced_factors(product, size) for product in products]
    values, projection = balanced_factors(
        noisy_identity(width, constants.alpha_v, -constants.beta_v, generator), width
    )  # (d, d) each
    queries, keys = (torch.cat(side, dim=1) for side in zip(*pairs, strict=True))  # (d, heads * k) each
    return torch.cat([queries, keys, values], dim=1).T.contiguous().float(), projection.contiguous().float()


def noisy_identity(width: int, alpha: float, beta: float, generator: torch.Generator) -> Tensor:
    """Return alpha Z + beta I, (d, d) float64, with entries of Z from N(0, 1/d)."""
    noise = torch.randn(width, width, generator=generator, dtype=torch.float64) / math.sqrt(width)
    return alpha * noise + beta * torch.eye(width, dtype=torch.float64)


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return F and G, (d, rank) each, with equal singular values and F G^T the nearest matrix of that rank.

    With A = P S R^T, column i of G is r_i sqrt(s_i) and column i of F is A r_i / sqrt(s_i). So only the largest
    eigenvectors of A^T A are needed, which for a twelfth of them takes about a sixth of the time of a decomposition
    of A. The signs, which are free, make the largest entry of each r_i positive.

    Args:
        matrix: A, (d, d) float64.
        rank: Singular triplets to keep, from the largest, 1..d.
    """
    width = matrix.shape[0]
    largest = (width - rank, width - 1)
    vectors = torch.from_numpy(eigh((matrix.T @ matrix).numpy(), subset_by_index=largest)[1]).flip(1)  # (d, rank)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    images = matrix @ vectors  # columns s_i p_i
    root = images.norm(dim=0).sqrt()  # from the columns: the eigenvalues are not precise where they are small
    return images / root.clamp(min=torch.finfo(root.dtype).tiny), vectors * root
