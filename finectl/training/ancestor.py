"""A factorised model fitted to a dense one: the start of `condense --from`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors, read_metadata, save_tensors
from finectl.data.dataset import ImageSet
from finectl.diffusion.random import generator_for
from finectl.errors import ComputationError
from finectl.models.cp import Decomposition, decompose, relative_errors
from finectl.models.dit import DiT
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig
from finectl.training.distributed import agree, join
from finectl.training.moments import input_moments

TOLERANCE = 1e-5


@dataclass
class Fitted:
    """A dense model as a factorised one.

    Args:
        state: Of the factorised model: shared factors and sigma, and everything else as it was.
        errors: Type -> relative error over all layers (`error`; `weights`: of the weights themselves), of each layer
            (`layers`), sweeps and the start that was kept.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, dict[str, Any]] = field(default_factory=dict)


def fit_ancestor(
    job: Job[Any],
    ancestor: DiT,
    config: DiTConfig,
    data: ImageSet | None,
    *,
    iterations: int,
    seed: int,
    device: torch.device,
) -> Fitted:
    """Decompose the weights of an ancestor, type by type; what an earlier run finished is read from the state.

    Of several processes the one that leads does it, and the others wait.

    Args:
        job: Where the state goes, and whether a signal asks to stop.
        ancestor: The dense model.
        config: The factorised one.
        data: Training images, whose way through the ancestor gives the weights of errors; None weighs all alike.
        iterations: Most sweeps a type.
        seed: Of all random numbers.
        device: Where to compute.

    Raises:
        ComputationError: the ancestor's weights, or its outputs on the data, are not finite.
        Interrupted: a signal came; finished types are saved.
    """
    join(job.world, device)
    if job.world.leads:
        _fit_missing(job, ancestor, config, data, iterations, seed, device)
    agree(job.world, False)  # a process that comes here first waits
    fitted = Fitted({name: value.detach().clone() for name, value in ancestor.cpu().state_dict().items()})
    for kind in _types(config):
        tensors = load_tensors(job.state / _file(kind))
        fitted.errors[kind] = read_metadata(job.state / _file(kind))
        fitted.state[f"factors.{kind}.U"], fitted.state[f"factors.{kind}.V"] = tensors["U"], tensors["V"]
        for index in range(config.depth):
            layer = f"blocks.{index}.{LAYER_TYPES[kind]}"
            del fitted.state[f"{layer}.weight"]
            fitted.state[f"{layer}.sigma"] = tensors["sigma"][index].clone()
    return fitted


def print_errors(job: Job[Any], errors: Mapping[str, Mapping[str, Any]], weighted: bool) -> None:
    """Show the relative error of each type and layer."""
    depth = max(len(row["layers"]) for row in errors.values())
    columns = ["type", "sweeps", "weights", *(["outputs"] if weighted else []), *(f"l{i}" for i in range(1, depth + 1))]
    rows = []
    for kind, row in errors.items():
        shown = [row["weights"], *([row["error"]] if weighted else []), *row["layers"]]
        rows.append([kind, str(row["sweeps"]), *(f"{value:.3f}" for value in shown)])
    job.console.table(
        f"Relative error of the fit, by layer that of the {'outputs' if weighted else 'weights'}", columns, rows
    )


def _fit_missing(
    job: Job[Any],
    ancestor: DiT,
    config: DiTConfig,
    data: ImageSet | None,
    iterations: int,
    seed: int,
    device: torch.device,
) -> None:
    """Fit the types whose result is not in the state yet, and save each."""
    kinds = _types(config)
    missing = [kind for kind in kinds if not (job.state / _file(kind)).exists()]
    if not missing:
        return

    def between() -> None:
        job.stop_if_requested(lambda: None)  # each finished type is saved already

    moments: Mapping[str, Tensor] = {}
    if data is not None:
        moments = input_moments(ancestor, data, seed=seed, device=device, between=between)
    ancestor.to(device)
    rank = cast(FactorConfig, config.factorized).rank
    with job.console.progress("fitting", len(kinds), unit="type", done=len(kinds) - len(missing)) as progress:
        for kind in missing:
            path = LAYER_TYPES[kind]
            weights = [block.get_submodule(path).get_parameter("weight").detach().double() for block in ancestor.blocks]
            stack = torch.stack(weights)  # (L, m1, m2)
            metric = moments.get(kind)
            if not bool(torch.isfinite(stack).all() and (metric is None or torch.isfinite(metric).all())):
                raise ComputationError(
                    f"the weights of type {kind}, or the inputs they get, are not finite",
                    expected="finite weights",
                    fix="take another model for --from",
                )
            found = decompose(
                stack,
                rank,
                metric=metric,
                iterations=iterations,
                tolerance=TOLERANCE,
                generator=generator_for("cp", seed, list(LAYER_TYPES).index(kind)),
                between=between,
            )
            _save(job, kind, found, stack)
            progress.advance()


def _save(job: Job[Any], kind: str, found: Decomposition, stack: Tensor) -> None:
    """Write a type's factors, in float32, and what is reported of them."""
    raw = relative_errors(stack, found.U, found.sigma, found.V)  # (L,)
    norms = stack.square().sum((1, 2))
    report = {
        "error": found.error,
        "weights": math.sqrt(float((raw.square() * norms).sum() / norms.sum().clamp(min=1e-300))),
        "layers": found.layer_errors.tolist(),
        "sweeps": len(found.history) - 1,
        "start": found.start,
    }
    tensors = {name: getattr(found, name).float().cpu().contiguous() for name in ("U", "sigma", "V")}
    job.state.mkdir(parents=True, exist_ok=True)
    save_tensors(job.state / _file(kind), tensors, metadata=report)


def _types(config: DiTConfig) -> tuple[str, ...]:
    return config.factorized.types if config.factorized else ()


def _file(kind: str) -> str:
    return f"cp-{kind}.safetensors"
