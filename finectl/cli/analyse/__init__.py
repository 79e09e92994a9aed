"""`finectl analyse`: what it does without a step, and the table of its steps, without importing any of them."""

from __future__ import annotations

from finectl.cli.commands import CommandGroup
from finectl.registry import Entry, Registry

STEPS = Registry(
    "analyse step",
    {
        "forgetting": Entry(
            "finectl.cli.analyse.forgetting:forgetting", "Measure what a fine-tuned model forgot, and where in time."
        ),
    },
)
GROUP = CommandGroup(STEPS, "Look at what fine-tuning did to experts or models.", "finectl.cli.analyse.experts:analyse")
