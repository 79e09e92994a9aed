"""The initialisation methods that `init --method` names: one file each, listed without importing them."""

from __future__ import annotations

from finectl.registry import Entry, Registry

METHODS = Registry(
    "initialisation method",
    {
        "fine": Entry("finectl.initializers.fine:initialize", "from a learngene, sigma tuned briefly (FINE)"),
        "he": Entry("finectl.initializers.he:initialize", "DiT's own random initialisation, the control"),
    },
)

# What each method starts from; it decides which INPUT `init` takes.
SOURCES: dict[str, tuple[str, ...]] = {"fine": ("learngene",), "he": ("learngene", "model", "condensed")}
