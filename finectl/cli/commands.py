"""The command table: every subcommand, where it is and its one line of help, without importing any of them."""

from __future__ import annotations

from finectl.registry import Entry, Registry

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
        "finetune-ranges": Entry(
            "finectl.cli.finetune_ranges:finetune_ranges", "Fine-tune a model into experts of timestep ranges (DeMe)."
        ),
        "merge": Entry("finectl.cli.merge:merge", "Merge experts, or fine-tuned models, into one model."),
        "analyse": Entry("finectl.cli.analyse:analyse", "Look at what fine-tuning did to experts or models."),
        "sample": Entry("finectl.cli.sample:sample", "Generate images with a model."),
        "evaluate": Entry("finectl.cli.evaluate:evaluate", "Measure and compare models."),
        "convert": Entry(
            "finectl.cli.convert:convert", "Import other people's checkpoints, or export a model to them."
        ),
        "ls": Entry("finectl.cli.ls:ls", "List the artifacts of the workspace."),
        "show": Entry("finectl.cli.show:show", "Show what an artifact is and where it comes from."),
        "verify": Entry("finectl.cli.verify:verify", "Hash artifacts again and check them."),
        "doctor": Entry("finectl.cli.doctor:doctor", "Check the installation and this machine."),
        "completion": Entry("finectl.cli.completion:completion", "Print the completion script of a shell."),
    },
)
