"""The initialisation methods that `init --method` names: one file each, listed without importing them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    from finectl.models.presets import DiTConfig

ANCESTORS = ("model", "condensed")
# Updates of a method's own tuning where `--tune-steps` does not say, on bundled data and on other data.
SMALL_TUNE_STEPS = 50
PAPER_TUNE_STEPS = 300


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
        width_range: Which other widths, in a few words, where not every one.
        options: Which of the options it reads that only some methods do.
        constants: The numbers in its definition that `--set NAME=VALUE` changes, with their usual values.
        whole_data: Whether it is tuned on all training images where `--tune-samples` does not say, not on a part.
        check: Where the function is that refuses a target which does not fit its source, from their architectures alone
            and without torch; empty where every target fits.
        variant_options: The options of a variant that reads others than `options`.
        variant_constants: Names of the constants of a variant that does not read all of them.
        tune_share: Updates it makes where `--tune-steps` does not say, as a share of those that its ancestor cost; 0
            for a few hundred at most.
        condensed: By which `condense --method` its learngene must be made; empty where any will do, or none.
        fitted: Whether its learngene must be that of a dense ancestor (`condense --from`).
    """

    sources: tuple[str, ...] = ANCESTORS
    reference: str = ""
    variants: tuple[str, ...] = ()
    anew: bool = False
    widths: bool = False
    width_range: str = "any"
    options: tuple[str, ...] = ()
    whole_data: bool = False
    check: str = ""
    constants: Mapping[str, float] = field(default_factory=dict)
    variant_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    variant_constants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tune_share: float = 0.0
    condensed: str = ""
    fitted: bool = False

    def require_fit(self, source: DiTConfig, target: DiTConfig) -> None:
        """Check that the method can make the target of the source.

        Raises:
            UsageError: it cannot.
        """
        if self.check:
            module, _, name = self.check.partition(":")
            getattr(importlib.import_module(module), name)(source, target)

    def options_of(self, variant: str | None) -> tuple[str, ...]:
        """Return which of the options a variant reads that only some methods do."""
        return self.variant_options.get(variant or "", self.options)

    def constants_of(self, variant: str | None) -> dict[str, float]:
        """Return the numbers in the definition of a variant, with their usual values."""
        names = self.variant_constants.get(variant or "", tuple(self.constants))
        return {name: self.constants[name] for name in names}

    def tunes(self, variant: str | None) -> bool:
        """Tell whether a variant makes optimiser updates of its own (`--tune-steps`)."""
        return "tune_steps" in self.options_of(variant)


TUNING = ("tune_steps", "tune_samples", "batch_size", "flip")
CURVES = (*TUNING, "sigma", "depth_scale", "tune_lr", "tune_biases")
FACTORS = (*CURVES, "width_map")
EXPONENT = {"exponent": 0.75}
METHODS: Registry[Method] = Registry(
    "initialisation method",
    {
        "fine": Method(
            "finectl.initializers.fine:initialize",
            "from a learngene, sigma tuned briefly (FINE)",
            sources=("learngene",),
            reference="arXiv 2409.19289",
            condensed="fine",
            widths=True,
            options=FACTORS,
        ),
        "fine-cp": Method(
            "finectl.initializers.fine:initialize",
            "from a learngene that condense --from fitted to a dense ancestor (ours)",
            sources=("learngene",),
            reference="arXiv 2409.19289; SIAM Review 51(3), 2009, section 3.4",
            condensed="fine",
            widths=True,
            options=FACTORS,
            fitted=True,
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
        "direct": Method(
            "finectl.initializers.direct:initialize",
            "pre-training of this very size with the ancestor's budget, from data alone",
            sources=("learngene", *ANCESTORS),
            reference="arXiv 2409.19289, row Direct PT",
            anew=True,
            widths=True,
            options=("tune_steps", "batch_size", "flip"),
            tune_share=1.0,
        ),
        "mimetic": Method(
            "finectl.initializers.mimetic:initialize",
            "attention with the diagonals that trained transformers have, the rest at random",
            sources=("learngene", *ANCESTORS),
            reference="arXiv 2305.09828",
            variants=("paper", "swapped"),
            anew=True,
            widths=True,
            constants={"alpha_q": 0.7, "beta_q": 0.7, "alpha_v": 0.4, "beta_v": 0.4},
        ),
        "weight-selection": Method(
            "finectl.initializers.weight_selection:initialize",
            "whole layers of a larger model, and a part of its channels where the target is narrower",
            reference="arXiv 2311.18823",
            variants=("first", "even"),
            widths=True,
            width_range="same or narrower",
            check="finectl.initializers.room:require_room",
        ),
        "heur-lg": Method(
            "finectl.initializers.heur_lg:initialize",
            "three layers of the ancestor on top: its last, or those whose gradients change least; random below",
            reference="arXiv 2106.06788",
            variants=("last", "gradients"),
            constants={"layers": 3, "tau": 1e-4, "batches": 8},
            variant_constants={"last": ("layers",)},
        ),
        "auto-lg": Method(
            "finectl.initializers.auto_lg:initialize",
            "the ancestor's first six layers and random ones above, or the layers most like a pseudo-descendant's",
            reference="arXiv 2305.02279",
            variants=("first", "similarity"),
            constants={"layers": 6},
            variant_options={"similarity": TUNING},
            variant_constants={"similarity": ()},
            whole_data=True,
            tune_share=1 / 3,
        ),
        "share": Method(
            "finectl.initializers.share:initialize",
            "every layer the one tied block of an auxiliary model (Share Init)",
            sources=("learngene",),
            condensed="share",
            variants=("paper", "scaled"),
            constants=EXPONENT,
            variant_constants={"paper": ()},
            reference="arXiv 1909.11942; arXiv 2409.19289",
        ),
        "tleg": Method(
            "finectl.initializers.tleg:initialize",
            "every parameter a line over depth, trained as one or fitted to a dense ancestor's layers (TLEG)",
            sources=("learngene", *ANCESTORS),
            condensed="tleg",
            variants=("paper", "scaled"),
            constants=EXPONENT,
            variant_constants={"paper": ()},
            reference="arXiv 2312.05614",
        ),
        "wave": Method(
            "finectl.initializers.wave:initialize",
            "from templates that all layers share, the layers' own scalers tuned briefly (WAVE)",
            sources=("learngene",),
            condensed="wave",
            widths=True,
            width_range="multiples of the template's side",
            check="finectl.initializers.room:require_tiles",
            reference="arXiv 2406.17503",
            options=CURVES,
        ),
        "svd": Method(
            "finectl.initializers.svd:initialize",
            "whole layers, each matrix cut to half of its rank on its own",
            reference="arXiv 2409.19289, ablation; arXiv 2303.11305",
            variants=("even", "first"),
            widths=True,
        ),
        "front": Method(
            "finectl.initializers.front:initialize",
            "low frequencies of an ancestor's weights over depth, rows and columns (FRONT)",
            reference="arXiv 2603.07523",
            variants=("plain", "std"),
            widths=True,
        ),
        "pruned-kd": Method(
            "finectl.initializers.pruned_kd:initialize",
            "evenly spaced layers of the ancestor, tuned towards its predictions: the strong control",
            reference="arXiv 1503.02531; arXiv 2305.15798",
            widths=True,
            options=TUNING,
            whole_data=True,
        ),
        "ligo": Method(
            "finectl.initializers.ligo:initialize",
            "every layer a learned mixture of all of the ancestor's layers, through learned maps of channels (LiGO)",
            reference="arXiv 2303.00980",
            widths=True,
            constants={"noise": 0.03},
            options=(*TUNING, "tune_lr"),
            whole_data=True,
        ),
    },
)
