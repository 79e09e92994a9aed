"""`finectl finetune`: its options, and the bank of the model that is made when none is named."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.cli import continual, groups
from finectl.cli import options as opt
from finectl.cli.banked import with_bank
from finectl.cli.command import Call, run_one, stage_command
from finectl.cli.control import with_control

if TYPE_CHECKING:
    from finectl.runner import Result


def run(call: Call) -> Result | None:
    """Fine-tune a model; its bank is found, or made, first.

    What else the command does (another stage with `--control`, data sets in a row with `--then`) is chosen here.
    """
    if call.values["then"]:
        return continual.run(with_method(call), _once)
    continual.require_unused(call)
    return _once(call)


def _once(call: Call) -> Result | None:
    """Fine-tune a model once."""
    ready = with_bank(call, lambda given: with_control(with_method(given)), _wants_bank)
    return run_one(ready) if ready is not None else None


def with_method(call: Call) -> Call:
    """Drop what a recipe says of Diff-Tuning where the command line chooses plain tuning, or no retention."""
    from finectl.training.chain_settings import FULL, NO_RETENTION, OF_RETENTION, OF_THE_CHAIN

    unused: tuple[str, ...] = ()
    if "method" in call.typed and call.values["method"] == FULL:
        unused = (*OF_THE_CHAIN, "bank_samples", "bank_labels")
    elif "retention" in call.typed and call.values["retention"] == NO_RETENTION:
        unused = (*OF_RETENTION, "bank_samples", "bank_labels")
    dropped = dict.fromkeys(name for name in unused if name not in call.typed)
    config = {name: None for name in dropped if name in call.config}
    return replace(call, config={**call.config, **config}, values={**call.values, **dropped})


def _wants_bank(call: Call) -> bool:
    """Tell whether a bank is to be found or made: images are retained, and none is named."""
    values = call.values
    return values["method"] != "full" and values["retention"] in (None, "bank") and values["bank"] is None


@stage_command(
    "finectl.stages.finetune",
    groups.data,
    groups.training,
    groups.optimiser,
    groups.captions,
    groups.control,
    groups.continual,
    groups.training_run,
    run=run,
)
def finetune(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    shots: opt.Shots = None,
    method: opt.FinetuneMethod = "diff-tuning",
    coefficients: opt.Coefficients = None,
    power: opt.ChainPower = None,
    retention_power: opt.RetentionPower = None,
    retention: opt.Retention = None,
    retention_weight: opt.RetentionWeight = None,
    retention_share: opt.RetentionShare = None,
    bank: opt.Bank = None,
    bank_samples: opt.BankSamples = None,
    bank_labels: opt.BankLabels = None,
    label_rows: opt.LabelRows = None,
    peft: opt.Peft = "none",
    peft_set: opt.PeftSet = None,
    steps: opt.FinetuneSteps = None,
    batch_size: opt.FinetuneBatchSize = None,
    lr: opt.FinetuneLr = None,
    warmup_steps: opt.FinetuneWarmup = None,
) -> None:
    """Fine-tune a model on other data, in its own classes, without forgetting what it knows (Diff-Tuning).

    Images that the model itself made (finectl bank) take a fifth of every batch, under no class. They are seen mostly
    at low noise, where knowledge carries over to any data, and new images mostly at high noise. --method full is plain
    fine-tuning; --peft trains few parameters with either.

    With --then the data sets are learned one after another, each from the model before, and a table says what each
    model still knows of the earlier ones.

    With --control a ControlNet learns to obey a control beside the prompt, on a frozen UNet of text (Stable Diffusion,
    unet-text-nano). The artifact is one that diffusers loads; finectl sample makes images with it. Its defaults are 600
    updates of 32 images at 1e-3 on bundled data, else 15,000 of 5 at 1e-5. --control-set takes sigma, low and high of
    edge, sigma, ratio, sharpness and slope of sketch, relief of normal.
    """
