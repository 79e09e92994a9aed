"""The samplers that `--scheduler` names: diffusers' schedulers, listed without importing diffusers."""

from __future__ import annotations

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
