"""`finectl bank`: its options, and the bank that `finectl finetune` takes where none is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.command import Call, stage_command
from finectl.errors import FinectlError, Interrupted

if TYPE_CHECKING:
    from finectl.artifacts.store import Artifact
    from finectl.runner import Result

PART = "bank"
"""The words of the processes while they make a bank, apart from those of the command that wants one."""


@stage_command("finectl.stages.bank", groups.text)
def bank(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    samples: opt.BankSize = None,
    labels: opt.Labels = None,
    prompts: opt.PromptsFile = None,
    prompt: opt.BankPrompt = None,
    scheduler: opt.Scheduler = "ddim",
    sampling_steps: opt.SamplingSteps = 50,
    guidance: opt.BankGuidance = None,
    batch_size: opt.ComputeBatchSize = 64,
    shard_size: opt.ShardSize = 256,
    seed: opt.Seed = 0,
) -> None:
    """Sample a pre-trained model once, so that its fine-tuning (finectl finetune) can retain what it knows.

    Images are kept as the model makes them: latents in float16, which no autoencoder has to decode or encode, or pixels
    in 8 bits. Classes take turns, and image k depends on --seed and k alone, so that a small bank is the beginning of a
    large one. A model of text takes --prompt or --prompts, by default the captions that it was trained on. A run that
    stops goes on with the missing files; under torchrun processes share them.
    """


def bank_for(call: Call, model: Artifact | None) -> Path | None:
    """Return the bank of a command that names none: the newest of this very model, or a small one that is made now.

    All processes of a run call this once, or once in each part of their world, and share the work.

    Args:
        call: The command; of its options, `bank_samples` asks for that many images, and `labels` for those classes.
        model: The one that is fine-tuned; None in processes that do not lead, which need not know it.

    Returns:
        Its path; None in processes that do not lead, and in a dry run where it would have to be made.

    Raises:
        Interrupted: a signal came; the same command goes on.
        FinectlError: what `finectl bank` raises.
    """
    options = replace(call.options, out=None, force=False, world=call.options.world.part(PART))
    if model is None:
        wanted = options.world.hear("config")
        if wanted is not None:
            _make(replace(call, options=options), wanted, [])
        return None
    wanted = None
    try:
        found = _newest_of(call, model)
        if found is None:
            wanted = _small(call, model)
    finally:
        options.world.tell("config", None if options.dry_run else wanted)
    if found is not None or wanted is None or options.dry_run:
        return found
    path = str(model.path)
    options = replace(options, command=("finectl", "bank", path, "--samples", str(wanted["samples"])))
    made = _make(replace(call, options=options), wanted, [path])
    if made.interrupted:
        raise Interrupted(
            "interrupted; the bank is made", saved=True, fix="run the same command again: it goes on from there"
        )
    return made.artifact.path if made.artifact else None


def _newest_of(call: Call, model: Artifact) -> Path | None:
    """Return the newest bank in the workspace that this model made, of as many images as are asked for."""
    from finectl.artifacts.store import Workspace, open_artifact
    from finectl.data.bank import KIND, bank_info

    wanted, found = call.values.get("bank_samples"), []
    for path in Workspace(call.options.workspace).paths(KIND):
        try:
            artifact = open_artifact(path, (KIND,))
            info = bank_info(artifact)
        except FinectlError:
            continue  # a damaged one is no reason to refuse the others
        if info.model == model.manifest.digest and wanted in (None, info.count):
            found.append((artifact.manifest.created, str(path), info))
    if not found:
        return None
    _, newest, info = max(found, key=lambda one: one[:2])
    call.console.note(f"no --bank: taking {newest}, {info.count:,} images that {model.path} made")
    return Path(newest)


def _small(call: Call, model: Artifact) -> dict[str, Any]:
    """Return the options of a bank that is made because there is none, and say so."""
    from finectl.models.io import read_config
    from finectl.stages.bank import AUTOMATIC, usual_samples

    usual = usual_samples(read_config(model), bundled=bool(model.manifest.data.get("bundled")))
    asked = call.values.get("bank_samples")
    size = asked or min(usual, AUTOMATIC)
    larger = "" if asked else f"; a larger one: finectl bank {model.path} --samples {max(usual, 10 * size)}"
    verb = "would be sampled" if call.options.dry_run else "are sampled"
    call.console.note(f"no --bank of {model.path}: {size:,} images {verb} first{larger}")
    shared = {name: call.values[name] for name in ("weights", "text_encoder", "labels") if name in call.values}
    return {**_defaults(), **shared, "samples": size}


def _defaults() -> dict[str, Any]:
    """Return the options of `finectl bank` that are not left out."""
    import inspect

    from finectl.stages.bank import Config

    parameters = inspect.signature(bank).parameters
    return {name: parameters[name].default for name in Config.__dataclass_fields__ if name in parameters}


def _make(call: Call, config: dict[str, Any], inputs: list[str]) -> Result:
    from finectl.runner import run_stage
    from finectl.stages.bank import STAGE

    return run_stage(STAGE, STAGE.config(**config), inputs, call.options, call.console)
