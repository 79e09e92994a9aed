"""FINE, phase 2: a dense model of any depth from a learngene.

U and V are frozen; each layer of the target gets a sigma, which starts from the ancestor's curve over depth and is
tuned for a few hundred updates on a small, fixed part of the target data, or is generated from a task's text. Then
W = U diag(sigma) V^T is written out.

Reference: FINE, arXiv 2409.19289, section 3.3.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.expansion import expand
from finectl.initializers.generated import generated_curves


def initialize(request: Request) -> Initialized:
    """Place U and V, read and tune sigma, and write the dense weights.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    if request.job.config.sigma_from is not None:
        return expand(request, generated_curves(request))
    return expand(request)
