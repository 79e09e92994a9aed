"""The options of Diff-Tuning, of every stage that fine-tunes with it: what they come to. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finectl.errors import UsageError
from finectl.training.chain import SAMPLING, SHARE, WEIGHT, Chain, retained_of

DIFF_TUNING, FULL = "diff-tuning", "full"
BANK, KD = "bank", "kd"
NO_RETENTION = "none"
POWER = 1.0
OF_THE_CHAIN = ("coefficients", "power", "retention_power", "retention", "retention_weight", "retention_share", "bank")
OF_RETENTION = ("retention_power", "retention_weight", "retention_share", "bank")


@dataclass(frozen=True, kw_only=True)
class ChainFields:
    """The options; None is a default that depends on the others."""

    method: str
    coefficients: str | None = None
    power: float | None = None
    retention_power: float | None = None
    retention: str | None = None
    retention_weight: float | None = None
    retention_share: float | None = None
    bank: str | None = None


def resolve_chain(config: ChainFields) -> dict[str, Any]:
    """Return the fields of the method with those that it uses filled in.

    Raises:
        UsageError: an option is given that the method does not use.
    """
    if config.method == FULL:
        _require_unused(config, OF_THE_CHAIN, f"--method {FULL}", f"--method {DIFF_TUNING}")
        return {}
    coefficients = config.coefficients or SAMPLING
    power = POWER if config.power is None else config.power
    resolved = {"coefficients": coefficients, "power": power, "retention": config.retention or BANK}
    if resolved["retention"] == NO_RETENTION:
        _require_unused(config, OF_RETENTION, f"--retention {NO_RETENTION}", f"--retention {BANK} or {KD}")
        return resolved
    return {
        **resolved,
        "retention_power": power if config.retention_power is None else config.retention_power,
        "retention_weight": WEIGHT[coefficients] if config.retention_weight is None else config.retention_weight,
        "retention_share": SHARE if config.retention_share is None else config.retention_share,
    }


def _require_unused(config: ChainFields, names: Sequence[str], chosen: str, other: str) -> None:
    """Check that options were left out.

    Raises:
        UsageError: one was given.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{option} {value} with {chosen}, which does not use it",
                expected=other,
                fix=f"leave {option} out, or {other}",
            )


def chain_of(config: ChainFields, batch: int) -> Chain | None:
    """Return the coefficients of a resolved configuration; None for plain fine-tuning.

    Args:
        config: The options.
        batch: Images of a batch over all processes.

    Raises:
        UsageError: the batch leaves no image to retain.
    """
    if config.method == FULL:
        return None
    share, power = config.retention_share, POWER if config.power is None else config.power
    return Chain(
        batch=batch,
        retained=0 if share is None else retained_of(batch, share),
        power=power,
        retention_power=power if config.retention_power is None else config.retention_power,
        coefficients=config.coefficients or SAMPLING,
        weight=0.0 if config.retention_weight is None else config.retention_weight,
    )
