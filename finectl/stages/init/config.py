"""The options of `finectl init`, and what `--variant` and `--set` make of a method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from finectl.errors import UsageError
from finectl.initializers import METHODS
from finectl.registry import nearest
from finectl.training.settings import DataFields
from finectl.training.text_settings import TextFields

# Options that only some methods read, and what they are for the others.
UNREAD: dict[str, Any] = {
    "sigma": "random",
    "depth_scale": 0.0,
    "tune_steps": 0,
    "tune_samples": None,
    "tune_lr": 0.0,
    "tune_biases": False,
    "width_map": "rows",
    "flip": False,
    "batch_size": None,
}


@dataclass(frozen=True)
class Config(DataFields, TextFields):
    """The options of `finectl init`; None is a default that depends on the input or the data."""

    method: str
    variant: str | None
    set: str | None
    depth: int | None
    model: str | None
    sigma: str | None
    depth_scale: float
    tune_steps: int | None
    tune_samples: int | None
    tune_lr: float
    tune_biases: bool
    width_map: str
    flip: bool
    batch_size: int | None
    seed: int
    sigma_from: str | None = None
    prompt: str | None = None
    process: str | None = None


def variant_of(config: Config) -> str | None:
    """Return the variant of the method, the usual one where none is named.

    Raises:
        UsageError: the method has no such variant.
    """
    known = METHODS[config.method].variants
    if config.variant is None:
        return known[0] if known else None
    if config.variant not in known:
        raise UsageError(
            f"--method {config.method} has no variant {config.variant!r}{nearest(config.variant, list(known))}",
            expected=f"one of: {', '.join(known)}" if known else "no --variant",
        )
    return config.variant


def constants_of(config: Config) -> dict[str, float]:
    """Return the numbers in the method's definition, with what `--set` changes.

    Raises:
        UsageError: the method has no such number, or the value is none.
    """
    known = METHODS[config.method].constants_of(variant_of(config))
    given: dict[str, float] = {}
    for part in filter(None, (config.set or "").split(",")):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in known:
            raise UsageError(
                f"--method {config.method} has no number {name!r} to --set{nearest(name, list(known))}",
                expected=f"one of: {', '.join(known)}" if known else "no --set",
            )
        try:
            given[name] = float(value)
        except ValueError as error:
            raise UsageError(f"--set {part}: {value!r} is no number", expected=f"{name}={known[name]:g}") from error
        if not math.isfinite(given[name]):
            raise UsageError(f"--set {part}: {value!r} is not finite", expected=f"{name}={known[name]:g}")
    return {**known, **given}


def changed_constants(config: Config) -> str | None:
    """Return `--set` in its one way of writing: what differs from the usual values, in the order of the table."""
    usual = METHODS[config.method].constants
    return ",".join(f"{name}={value:g}" for name, value in constants_of(config).items() if value != usual[name]) or None
