"""Share Init: every block of the target is the one tied block of an auxiliary model, with its embedders.

The auxiliary model (`condense --method share`) applies one block, with all five matrices and biases, at every depth,
as ALBERT does. All layers of the target start identical and separate through their different gradients. `scaled`
(ours) multiplies the residual branches by (L / L')^0.75, as FINE's `--depth-scale` does.

Reference: Lan et al., ALBERT, arXiv 1909.11942, section 3.1; the row "Share Init" of FINE, arXiv 2409.19289.
"""

from __future__ import annotations

from finectl.initializers.base import Initialized, Request
from finectl.initializers.expansion import expand_scaled


def initialize(request: Request) -> Initialized:
    """Copy the tied block to every layer, and the embedders and the final layer."""
    return expand_scaled(request)
