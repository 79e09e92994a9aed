"""The command table: every subcommand, where it is and its one line of help, without importing any of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from finectl.registry import Entry, Registry


@dataclass(frozen=True)
class CommandGroup:
    """A command that has steps of its own, `finectl COMMAND STEP`.

    Args:
        steps: Where each step is; nothing of it is imported for help.
        help: What help says about all of them.
        default: Where the command is that runs without a step (`module:attribute`); empty for none.
    """

    steps: Registry[Entry]
    help: str
    default: str = ""

    def load_default(self) -> Any:
        """Import the command that runs without a step."""
        module, _, attribute = self.default.partition(":")
        return getattr(importlib.import_module(module), attribute)


COMMANDS = Registry(
    "command",
    {
        "encode": Entry("finectl.cli.encode:encode", "Turn images into an autoencoder's latents."),
        "condense": Entry(
            "finectl.cli.condense:condense", "Pre-train a model whose layers share their factors (FINE)."
        ),
        "extract": Entry("finectl.cli.extract:extract", "Take the size-free learngene out of a condensed model."),
        "init": Entry("finectl.cli.init:init", "Initialise a model of any depth."),
        "train": Entry("finectl.cli.train:train", "Train a model."),
        "bank": Entry("finectl.cli.bank:bank", "Sample a model once, for fine-tuning that retains what it knows."),
        "finetune": Entry(
            "finectl.cli.finetune:finetune", "Fine-tune a model on other data without forgetting (Diff-Tuning)."
        ),
        "finetune-ranges": Entry(
            "finectl.cli.finetune_ranges:finetune_ranges", "Fine-tune a model into experts of timestep ranges (DeMe)."
        ),
        "merge": Entry("finectl.cli.merge:merge", "Merge experts, or fine-tuned models, into one model."),
        "analyse": Entry("finectl.cli.analyse:GROUP", "Look at what fine-tuning did to experts or models."),
        "sample": Entry("finectl.cli.sample:sample", "Generate images with a model."),
        "evaluate": Entry("finectl.cli.evaluate:evaluate", "Measure and compare models."),
        "convert": Entry(
            "finectl.cli.convert:convert", "Import other people's checkpoints, or export a model to them."
        ),
        "gen-weights": Entry(
            "finectl.cli.gen_weights:GROUP", "Generate the initial weights of a task's model from its text."
        ),
        "ls": Entry("finectl.cli.ls:ls", "List the artifacts of the workspace."),
        "show": Entry("finectl.cli.show:show", "Show what an artifact is and where it comes from."),
        "verify": Entry("finectl.cli.verify:verify", "Hash artifacts again and check them."),
        "doctor": Entry("finectl.cli.doctor:doctor", "Check the installation and this machine."),
        "completion": Entry("finectl.cli.completion:completion", "Print the completion script of a shell."),
    },
)


def section_of(path: str) -> str:
    """Return the name under which recipes and manifests know a command: `gen-weights prompts` is gen-weights-prompts.

    Args:
        path: The command as it is typed, with or without the program's name before it.
    """
    return "-".join(path.split()[1 if path.startswith("finectl ") else 0 :])


def typed(stage: str) -> str:
    """Return how a stage of a manifest is typed: gen-weights-prompts is `finectl gen-weights prompts`."""
    if stage not in COMMANDS:
        for name in COMMANDS:
            if stage.startswith(f"{name}-"):
                return f"finectl {name} {stage.removeprefix(f'{name}-')}"
    return f"finectl {stage}"
