"""What the forms of sharing have in common, one function a question: modules, start, and the dense layer it stands for.

A model's state holds what layers share as `factors.<type>.<name>` and what a layer has of its own, beside its bias, as
`blocks.<l>.<path>.sigma` (FINE) or `.scalers` (WAVE).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from finectl.models.factorized import (
    SIGMA_SPREAD,
    FactorizedLinear,
    SharedFactors,
    build_weight,
    expand_sigma,
    random_sigma,
    unit_columns,
)
from finectl.models.tied import LineLinear, SharedLine, SharedTemplates, TemplateLinear, join_templates, read_line
from finectl.models.tying import FactorConfig, LineConfig, TemplateConfig, Tying

SHARED = "factors."
SLOPE_STD = 0.02
Shape = tuple[int, int]  # (m1, m2), of a weight


def shared_part(tying: Tying, kind: str, shape: Shape) -> nn.Module:
    """Return the module of what all layers of a type share, all of it zero."""
    if isinstance(tying, FactorConfig):
        return SharedFactors(*shape, tying.rank)
    if isinstance(tying, LineConfig):
        return SharedLine(*shape, tying.slope)
    return SharedTemplates(tying.scalers(kind, *shape)[0], tying.size)


def tied_layer(tying: Tying, kind: str, shared: nn.Module, shape: Shape, place: float) -> nn.Module:
    """Return a layer that refers to what its type shares.

    Args:
        tying: The form.
        kind: The type, such as `qkv`.
        shared: What `shared_part` returned.
        shape: Of its weight.
        place: l / L, where it stands in the model.
    """
    if isinstance(tying, FactorConfig):
        return FactorizedLinear(cast(SharedFactors, shared), tying.sigma_sharing)
    if isinstance(tying, LineConfig):
        return LineLinear(cast(SharedLine, shared), place)
    return TemplateLinear(cast(SharedTemplates, shared), tying.scalers(kind, *shape))


def draw_shared(
    tying: Tying, kind: str, name: str, size: torch.Size, shape: Shape, generator: torch.Generator
) -> Tensor:
    """Draw the start of what a type's layers share.

    U and V get columns of length 1; theta_B is DiT's own start, with zeros for adaLN, and theta_A N(0, 0.02), zero for
    adaLN; templates are normal with Xavier's variance 2 / (m1 + m2).

    Args:
        tying: The form.
        kind: The type, such as `qkv`.
        name: The parameter, such as `U`.
        size: Its shape.
        shape: Of the type's weights.
        generator: Source of the random numbers.
    """
    if isinstance(tying, FactorConfig):
        return unit_columns(size[0], size[1], generator)
    if isinstance(tying, TemplateConfig):
        return _normal(size, generator) * math.sqrt(2 / sum(shape))
    if kind == "adaln":
        return torch.zeros(size)
    return xavier_uniform(size, generator) if name == "base_weight" else SLOPE_STD * _normal(size, generator)


def draw_own(
    tying: Tying, size: torch.Size, shape: Shape, drawn: dict[str, Tensor], kind: str, generator: torch.Generator
) -> Tensor:
    """Draw the start of what one layer has of its own: sigma or scalers, near those of its type's other layers.

    Layers have to start apart, and yet on a curve over depth that can be read at other depths: they differ by a tenth.

    Args:
        tying: The form.
        size: Shape of the parameter.
        shape: Of the weight.
        drawn: What the layers of each type have in common; the first layer of a type adds it.
        kind: The type.
        generator: Source of the random numbers.
    """
    if isinstance(tying, FactorConfig):
        return random_sigma(size.numel(), *shape, tying.rank, generator)
    if kind not in drawn:
        drawn[kind] = _normal(size, generator) / math.sqrt(size[0])
    noise = _normal(size, generator) / math.sqrt(size[0])
    return (drawn[kind] + SIGMA_SPREAD * noise) / math.sqrt(1 + SIGMA_SPREAD**2)


def written_out(
    tying: Tying, shared: Mapping[str, Tensor], own: Mapping[str, Tensor], place: float
) -> dict[str, Tensor]:
    """Return the weight (m1, m2) of a layer, and its bias (m1,) where that is shared, too.

    Args:
        tying: The form.
        shared: What the layers of its type share, by name.
        own: Its sigma or scalers.
        place: l / L.
    """
    if isinstance(tying, FactorConfig):
        sigma = expand_sigma(own["sigma"], tying.rank, tying.sigma_sharing)
        return {"weight": build_weight(shared["U"], sigma, shared["V"])}
    if isinstance(tying, LineConfig):
        # Without a slope all layers are the same tensors, and files hold each tensor once a layer.
        return {part: read_line(shared, part, place).clone() for part in ("weight", "bias")}
    return {"weight": join_templates(own["scalers"], shared["templates"])}


def xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw uniformly within sqrt(6 / (fan_in + fan_out)), a convolution being taken as a linear layer on patches."""
    fan_out, fan_in = shape[0], math.prod(shape[1:])
    bound = math.sqrt(6 / (fan_in + fan_out))
    return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)


def _normal(size: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, device=generator.device)
