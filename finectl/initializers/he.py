"""DiT's own initialisation: Xavier-uniform matrices, adaLN-Zero. The control, which takes nothing from anywhere.

Reference: Peebles and Xie, arXiv 2212.09748, section 3.2; the row "He-Init" of FINE, arXiv 2409.19289.
"""

from __future__ import annotations

from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.models.dit import DiT, initialize_


def initialize(request: Request) -> Initialized:
    """Draw all weights at random."""
    model = initialize_(DiT(request.target), generator_for("init", request.job.config.seed))
    return Initialized(model.state_dict())
