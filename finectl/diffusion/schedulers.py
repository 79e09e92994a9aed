"""The samplers that `--scheduler` names: diffusers' schedulers, listed without importing diffusers."""

from __future__ import annotations

import math

from finectl.errors import UsageError
from finectl.registry import Entry, Registry

SCHEDULERS = Registry(
    "scheduler",
    {
        "ddpm": Entry("diffusers:DDPMScheduler", "ancestral sampling (Ho et al., arXiv 2006.11239)"),
        "ddim": Entry("diffusers:DDIMScheduler", "deterministic, few steps (Song et al., arXiv 2010.02502)"),
        "pndm": Entry("diffusers:PNDMScheduler", "pseudo-numerical, few steps (Liu et al., arXiv 2202.09778)"),
        "dpm-solver++": Entry("diffusers:DPMSolverMultistepScheduler", "second order (Lu et al., arXiv 2211.01095)"),
    },
)

NO_SAMPLE_PREDICTION = ("pndm",)
"""Schedulers that cannot use a model which predicts the clean image."""


def require_scheduler(name: str, prediction: str) -> None:
    """Check that there is a scheduler of this name and that it goes with what a model predicts.

    Raises:
        UsageError: it does not; the message names those that do.
    """
    SCHEDULERS[name]  # an unknown name is an error here
    if prediction == "sample" and name in NO_SAMPLE_PREDICTION:
        raise UsageError(
            f"--scheduler {name} does not work with a model that predicts the clean image",
            expected=f"one of: {', '.join(other for other in SCHEDULERS if other not in NO_SAMPLE_PREDICTION)}",
        )


def steps_handed_over(share: float, steps: int) -> int:
    """Return how many of the reverse steps, the last ones, another model makes.

    Of S steps, counted from the end, those of an index below x S: a share above 0 is at least one step.

    Args:
        share: x, in [0, 1].
        steps: S.
    """
    return math.ceil(round(share * steps, 6))  # 0.55 of 20 steps are 11, whatever floats make of it
