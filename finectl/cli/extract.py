"""`finectl extract`: its options."""

from __future__ import annotations

from finectl.cli import options as opt
from finectl.cli.command import stage_command


@stage_command("finectl.stages.extract")
def extract(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    depths: opt.Depths = "4,6,8,10,12",
) -> None:
    """Take the size-free learngene out of a condensed model.

    Kept apart and counted apart: the shared factors (the learngene proper), the rest that does not depend on depth
    (embedders, final layer), and the curves of sigma and biases over depth.
    """
