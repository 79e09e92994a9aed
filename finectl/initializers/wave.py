"""WAVE: every matrix is a sum of Kronecker products of shared templates with a layer's own scalers.

W = sum_t S_t (x) T_t. The templates T, trained once by `condense --method wave`, are frozen; scalers and biases start
from the ancestor's curves over depth and are tuned for `--tune-steps` updates on a part of the target data. Then the
dense weights are written out.

Reference: Feng et al., WAVE: Weight Templates for Adaptive Initialization of Variable-sized Models, arXiv
2406.17503.

Ours: the paper does not say how scalers start. They are read off the auxiliary model's curves as FINE's sigma is
(`--sigma`, `--depth-scale`), and biases go with them.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.expansion import expand


def initialize(request: Request) -> Initialized:
    """Place the templates, read and tune the scalers, and write the dense weights.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    return expand(request)
