"""The options of `condense`, and what its two ways have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from finectl.errors import UsageError
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, family_name
from finectl.training.settings import DataFields, TrainFields


@dataclass(frozen=True)
class Config(DataFields, TrainFields):
    """The options of `finectl condense`; None is a default that depends on the model or the data."""

    model: str | None
    depth: int | None
    factorize: str
    rank: int | None
    overcomplete: bool
    sigma_sharing: int
    learn_sigma: bool
    frequency_divisor: int
    sigma_lr: float | None
    from_model: str | None = None
    cp_weighting: str = "inputs"
    cp_iterations: int = 200
    distill_steps: int = 0


def factors_of(config: Config, dense: DiTConfig) -> FactorConfig:
    """Return what of a dense architecture is factorised, and how.

    Raises:
        UsageError: a type is unknown, or the rank is above the width and that is not said to be meant.
    """
    rank = config.rank or dense.width
    if rank > dense.width and not config.overcomplete:
        raise UsageError(
            f"--rank {rank} is above the width {dense.width} of {family_name(dense)}: the factors would be "
            "overcomplete",
            expected=f"a rank of at most {dense.width}",
            fix=f"--rank {dense.width}, or --overcomplete if it is meant",
        )
    types = tuple(part.strip() for part in config.factorize.split(",") if part.strip())
    return FactorConfig(types, rank, config.sigma_sharing)


def parameter_counts(model: DiTConfig) -> dict[str, int]:
    """Return what is shared by all layers, what each layer has of its own, and the size of the dense model."""
    counts = count_parameters(model)
    dense = count_parameters(replace(model, factorized=None))
    return {
        "parameters_shared": counts["factors"],
        "parameters_of_one_layer": counts["block"],
        "parameters_dense": dense["total"],
    }


def groups_of(model: Any, config: Config) -> list[dict[str, Any]]:
    """Return the parameter groups of a condensed model: sigma has a learning rate of its own."""
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if not name.endswith(".sigma")]},
        {"params": [parameter for name, parameter in named if name.endswith(".sigma")], "lr": config.sigma_lr},
    ]
