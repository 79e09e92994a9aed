"""The initialisation methods that `init --method` names: one file each, listed without importing them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from finectl.registry import Entry, Registry

ANCESTORS = ("model", "condensed")


@dataclass(frozen=True)
class Method(Entry):
    """A line of the table of methods.

    Args:
        target: Where `initialize` is.
        help: What it does, in one line.
        sources: Kinds of artifact that it starts from; a method that takes nothing from them reads their shapes only.
        reference: Where it is from.
        variants: What `--variant` may be, the default first; empty for a method that has none.
        anew: Whether it takes nothing from its source, so that `--model` can stand in for one.
        widths: Whether the target may have another width than the source (`--model`).
        options: Which of the options it reads that only some methods do.
        constants: The numbers in its definition that `--set NAME=VALUE` changes, with their usual values.
        whole_data: Whether it is tuned on all training images where `--tune-samples` does not say, not on a part.
    """

    sources: tuple[str, ...] = ANCESTORS
    reference: str = ""
    variants: tuple[str, ...] = ()
    anew: bool = False
    widths: bool = False
    options: tuple[str, ...] = ()
    whole_data: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def tunes(self) -> bool:
        """Whether it makes optimiser updates of its own (`--tune-steps`)."""
        return "tune_steps" in self.options


TUNING = ("tune_steps", "tune_samples", "batch_size", "flip")
METHODS: Registry[Method] = Registry(
    "initialisation method",
    {
        "fine": Method(
            "finectl.initializers.fine:initialize",
            "from a learngene, sigma tuned briefly (FINE)",
            sources=("learngene",),
            reference="arXiv 2409.19289",
            options=(*TUNING, "sigma", "depth_scale", "tune_lr", "tune_biases"),
        ),
        "he": Method(
            "finectl.initializers.he:initialize",
            "DiT's own random initialisation, the control",
            sources=("learngene", *ANCESTORS),
            reference="arXiv 2212.09748, section 3.2",
            variants=("xavier", "kaiming"),
            anew=True,
            widths=True,
        ),
        "mimetic": Method(
            "finectl.initializers.mimetic:initialize",
            "attention with the diagonals that trained transformers have, the rest at random",
            sources=("learngene", *ANCESTORS),
            reference="arXiv 2305.09828",
            variants=("paper", "swapped"),
            anew=True,
            widths=True,
        ),
        "weight-selection": Method(
            "finectl.initializers.weight_selection:initialize",
            "whole layers of a larger model, and a part of its channels where the target is narrower",
            reference="arXiv 2311.18823",
            variants=("first", "even"),
            widths=True,
        ),
        "heur-lg": Method(
            "finectl.initializers.heur_lg:initialize",
            "the ancestor's last three layers, those below at random",
            reference="arXiv 2106.06788",
            variants=("last",),
        ),
        "auto-lg": Method(
            "finectl.initializers.auto_lg:initialize",
            "the ancestor's first six layers, those above at random",
            reference="arXiv 2305.02279",
        ),
        "tleg": Method(
            "finectl.initializers.tleg:initialize",
            "every parameter a line over depth, fitted to an ancestor's layers (TLEG)",
            reference="arXiv 2312.05614",
        ),
        "svd": Method(
            "finectl.initializers.svd:initialize",
            "whole layers, each matrix cut to half of its rank on its own",
            reference="arXiv 2409.19289, ablation; arXiv 2303.11305",
            variants=("even", "first"),
        ),
        "front": Method(
            "finectl.initializers.front:initialize",
            "low frequencies over depth of an ancestor's weights (FRONT)",
            reference="arXiv 2603.07523",
            variants=("plain", "std"),
        ),
        "pruned-kd": Method(
            "finectl.initializers.pruned_kd:initialize",
            "evenly spaced layers of the ancestor, tuned towards its predictions: the strong control",
            reference="arXiv 1503.02531; arXiv 2305.15798",
            options=TUNING,
            whole_data=True,
        ),
        "ligo": Method(
            "finectl.initializers.ligo:initialize",
            "every layer a learned mixture of all of the ancestor's layers (LiGO, over depth)",
            reference="arXiv 2303.00980",
            options=(*TUNING, "tune_lr"),
            whole_data=True,
        ),
    },
)
