"""The options of `condense`, and what its two ways have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from finectl.errors import UsageError
from finectl.models.presets import DiTConfig, FactorConfig, count_parameters, family_name, layer_shapes
from finectl.models.tying import LAYER_TYPES, OWN, LineConfig, TemplateConfig, Tying
from finectl.training.settings import DataFields, TrainFields


@dataclass(frozen=True)
class Config(DataFields, TrainFields):
    """The options of `finectl condense`; None is a default that depends on the model or the data."""

    method: str
    model: str | None
    depth: int | None
    factorize: str | None
    rank: int | None
    overcomplete: bool
    sigma_sharing: int
    template_size: int | None
    learn_sigma: bool
    frequency_divisor: int
    sigma_lr: float | None
    from_model: str | None = None
    cp_weighting: str = "inputs"
    cp_iterations: int = 200
    distill: str | None = None
    distill_steps: int | None = None


def tying_of(config: Config, dense: DiTConfig) -> Tying:
    """Return how the layers of a dense architecture are to share their parameters.

    Raises:
        UsageError: an option does not go with the method, or is out of range.
    """
    if config.method == "fine":
        refuse(config, ("template_size",))
        return factors_of(config, dense)
    refuse(config, ("overcomplete", "sigma_sharing"))
    if config.method == "wave":
        size = config.template_size or dense.width // 2
        if dense.width % size:
            raise UsageError(
                f"--template-size {size} does not divide the width {dense.width} of {family_name(dense)}",
                expected="a divisor of the width",
                fix=f"--template-size {dense.width // 2}",
            )
        return TemplateConfig.of_rank(types_of(config), size, config.rank or dense.width, layer_shapes(dense))
    refuse(config, ("factorize", "rank", "template_size"))
    return LineConfig(slope=config.method == "tleg")


def refuse(config: Config, names: tuple[str, ...]) -> None:
    """Refuse options that the method does not read, where they are not as they are left out.

    Raises:
        UsageError: one of them is given.
    """
    given = [name for name in names if getattr(config, name) not in (None, False, 1)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} does not go with --method {config.method}", fix=f"leave {option} out")


def types_of(config: Config) -> tuple[str, ...]:
    """Return the types that `--factorize` names; all by default."""
    if config.factorize is None:
        return tuple(LAYER_TYPES)
    return tuple(part.strip() for part in config.factorize.split(",") if part.strip())


def resolved_tying(config: Config, model: DiTConfig) -> dict[str, Any]:
    """Return the options that a form was made of, as the manifest keeps them."""
    tying = model.factorized
    if tying is None or isinstance(tying, LineConfig):
        return {"factorize": None, "rank": None, "template_size": None}
    return {
        "factorize": ",".join(tying.types),
        "rank": config.rank or model.width,
        "template_size": tying.size if isinstance(tying, TemplateConfig) else None,
    }


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
    return FactorConfig(types_of(config), rank, config.sigma_sharing)


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
    """Return the parameter groups of a condensed model: sigma and scalers have a learning rate of their own."""
    named = [(name.rpartition(".")[2] in OWN, parameter) for name, parameter in model.named_parameters()]
    own = [parameter for is_own, parameter in named if is_own]
    groups: list[dict[str, Any]] = [{"params": [parameter for is_own, parameter in named if not is_own]}]
    return [*groups, {"params": own, "lr": config.sigma_lr}] if own else groups
