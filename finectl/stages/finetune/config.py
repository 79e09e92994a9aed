"""The options of `finectl finetune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finectl.adapters.peft.table import NONE, PeftOptions
from finectl.training.chain_settings import ChainFields
from finectl.training.settings import DataFields, OptimiserFields, TrainFields
from finectl.training.text_settings import CaptionFields

SMALL = {"steps": 600, "batch_size": 64, "lr": 5e-4, "warmup_steps": 0}
PAPER = {"steps": 24_000, "batch_size": 32, "lr": 1e-4}
LOCATIONS = ("data", "text_encoder", "bank")
OWN = "own"
"""The bank's images under the classes of which they were made; otherwise under none."""
UNCHANGED = {"bank_labels": None}
"""`Stage.unchanged_at`."""


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields, CaptionFields, ChainFields):
    """The options of `finectl finetune`; None is a default that depends on the others."""

    weights: str
    shots: int | None = None
    label_rows: str | None = None
    bank_labels: str | None = None
    peft: str = NONE
    peft_set: Sequence[str] | None = None


def peft_of(config: Config) -> PeftOptions:
    """Return what `--peft` and `--peft-set` ask for.

    Raises:
        UsageError: there is no such method or setting.
    """
    return PeftOptions.parse(config.peft, config.peft_set or ())


def canonical(peft: PeftOptions) -> tuple[str, ...] | None:
    """Return all settings as `--peft-set` takes them, so that the same ones give the same artifact."""
    written = {True: "yes", False: "no"}
    texts = [f"{name}={written[value] if isinstance(value, bool) else value}" for name, value in peft.settings.items()]
    return tuple(texts) or None
