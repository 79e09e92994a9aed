"""The options of `finectl evaluate`, and the conditions that `--fail-if` and `--reach` take."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finectl.errors import UsageError
from finectl.metrics import ALIASES, METRICS
from finectl.training.pretrained import PretrainedFields
from finectl.training.settings import DataFields
from finectl.training.text_settings import TextFields

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
MADE = ("samples", "bank")
"""Kinds of artifacts that are images already."""
CONDITION = re.compile(r"\s*([\w-]+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True)
class Config(DataFields, TextFields, PretrainedFields):
    """The options of `finectl evaluate`; the digests are of what others name, and are found while planning."""

    metrics: str | None
    weights: str
    draws: int
    ranges: int
    samples: int
    scheduler: str
    sampling_steps: int
    guidance: float
    vae: str | None
    reference: str | None
    images: str | None
    features: str | None
    features_weights: str | None
    inception: str | None
    clip: str | None
    dino: str | None
    lpips: str | None
    fid_mode: str
    features_dtype: str
    allow_few: bool
    steps_every: int
    reach: str | None
    batch_size: int
    format: str | None
    fail_if: str | None
    seed: int
    extractors_digest: str = ""
    reference_digest: str = ""
    images_digest: str = ""
    vae_digest: str = ""
    labels: str | None = None


@dataclass(frozen=True)
class Condition:
    """A comparison of a metric with a number, such as `fid>30`."""

    metric: str
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        """Tell whether a value meets it."""
        return OPERATORS[self.comparison](value, self.bound)

    @classmethod
    def parse(cls, option: str, text: str, metrics: Sequence[str]) -> Condition:
        """Read a condition on one of the metrics that are measured.

        Raises:
            UsageError: it is none, or its metric is not measured.
        """
        match = CONDITION.fullmatch(text)
        try:
            name, comparison, bound = match.group(1), match.group(2), float(match.group(3))  # type: ignore[union-attr]
        except (AttributeError, ValueError) as error:
            raise UsageError(f"{option} {text!r} is no condition", expected="such as 'loss>0.1'") from error
        name = ALIASES.get(name, name)
        if name not in metrics:
            raise UsageError(f"{option} {text!r} asks for {name!r}", expected=f"one of: {', '.join(metrics)}")
        return cls(name, comparison, bound)


def parse_metrics(text: str) -> list[str]:
    """Return the metrics of a comma-separated list, each once.

    Raises:
        UsageError: there is none, or one is not known.
    """
    names = [ALIASES.get(name.strip(), name.strip()) for name in text.split(",") if name.strip()]
    for name in names:
        METRICS[name]  # an unknown name is an error here
    if not names:
        raise UsageError("--metrics names no metric", expected=f"one or several of: {', '.join(METRICS)}")
    return list(dict.fromkeys(names))
