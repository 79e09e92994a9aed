"""Projections folded into the convolutions before them, exactly: what the network computes stays the same.

W (K * x + b) = (W K) * x + W b, for the convolution of an upsampler; where a residual block's last convolution and that
of its shortcut are added, both take W. What no convolution can take stays as an extra layer, with the reason
(`finectl.models.projections` says where and why). Products are computed in float64 and rounded once, to the dtype of
the weights.

Models are folded after merging: merged products differ from products of merged weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finectl.adapters.projection import Config
from finectl.diffusion.random import generator_for
from finectl.errors import InputError, UsageError
from finectl.models.io import build_model
from finectl.models.projections import NONE, UNFOLDABLE, Place
from finectl.models.unet import PREFIX
from finectl.models.unet_config import TEXT_UNET, UNetConfig

TEXT_TOKENS = 7


class Folded(NamedTuple):
    """A model after folding.

    Args:
        config: Without the projections that are gone.
        state: Its weights; tensors that folding left alone are the given ones.
        kept: Block -> why its projection stays as a layer.
    """

    config: Any
    state: dict[str, Tensor]
    kept: dict[str, str]


def fold(config: Config, state: Mapping[str, Tensor]) -> Folded:
    """Fold all projections that neighbouring convolutions can take.

    Args:
        config: With or without projections.
        state: The model's weights, on any device.

    Returns:
        The model that computes the same. A UNet with nothing kept is a plain network of diffusers.

    Raises:
        InputError: the state lacks a weight, or one has another shape.
    """
    folded = dict(state)
    kept = {place.where: place.reason for place in config.places if not place.convolutions}
    for place in config.places:
        if place.convolutions:
            folded = _folded_one(folded, place)
    if len(kept) == len(config.places):
        return Folded(config, folded, kept)
    return Folded(replace(config, projections=UNFOLDABLE if kept else NONE), folded, kept)


def fold_one(config: Config, state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Fold the projection behind one block and return the state without it.

    Args:
        config: The architecture.
        state: The model's weights.
        where: The block, such as `up_blocks.0`.

    Raises:
        UsageError: there is no such projection, or no convolution can take it; the message says why.
        InputError: the state lacks a weight, or one has another shape.
    """
    places = {place.where: place for place in config.places}
    if where not in places:
        raise UsageError(f"there is no projection behind {where!r}", expected=f"one of: {', '.join(places) or 'none'}")
    if not places[where].convolutions:
        raise UsageError(
            f"the projection behind {where} cannot be folded: {places[where].reason}",
            expected=", ".join(place.where for place in places.values() if place.convolutions)
            or "a block that ends in a convolution, and this model has none",
        )
    return _folded_one(state, places[where])


def fold_difference(config: Config, state: Mapping[str, Tensor], *, seed: int = 0) -> float:
    """Return by how much folding changes what a model computes, in float64: the largest |difference| of an output.

    One image of random noise goes through the model and the folded one; rounding alone gives about 1e-15 of the
    activations' size.

    Args:
        config: With projections.
        state: The model's weights, in any floating-point dtype.
        seed: Of image, timestep and text.
    """
    exact = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}
    folded = fold(config, exact)
    before, after = (
        output_of(one, weights, seed=seed) for one, weights in ((config, exact), (folded.config, folded.state))
    )
    return float((before - after).abs().max())


@torch.no_grad()
def output_of(config: Config, state: Mapping[str, Tensor], *, seed: int) -> Tensor:
    """Return a model's output for one random image, computed in the dtype of its weights.

    Args:
        config: The architecture.
        state: The model's weights.
        seed: Of image, timestep and, where there is one, text.

    Returns:
        (1, out_channels, H, W).
    """
    random = generator_for("fold", seed)
    model = build_model(config)
    dtype = next(value.dtype for value in state.values() if value.is_floating_point())
    model = model.to(dtype).eval()
    model.load_state_dict(dict(state))
    x = torch.randn(1, config.channels, config.image_size, config.image_size, generator=random, dtype=torch.float64)
    t = torch.randint(config.diffusion.timesteps, (1,), generator=random)
    if isinstance(config, UNetConfig) and config.architecture == TEXT_UNET:
        width = config.network.get("cross_attention_dim", 1280)
        text = torch.randn(1, TEXT_TOKENS, width, generator=random, dtype=torch.float64)
        return model(x.to(dtype), t, text.to(dtype))
    return model(x.to(dtype), t, torch.zeros(1, dtype=torch.int64))


def _folded_one(state: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    folded = dict(state)
    projection = _matrix(folded.pop(place.parameter, None), place)
    for convolution in place.convolutions:
        for end in ("weight", "bias"):
            name = f"{PREFIX}{convolution}.{end}"
            if name not in folded:
                if end == "bias":
                    continue  # none, and W 0 = 0
                raise InputError(f"the state lacks {name!r}", expected=f"the convolution that ends {place.where}")
            value = folded[name]
            if value.shape[0] != place.channels:
                raise InputError(f"{name!r} has {value.shape[0]} channels", expected=f"{place.channels}")
            mapped = projection.to(value.device) @ value.detach().double().reshape(place.channels, -1)
            folded[name] = mapped.reshape(value.shape).to(value.dtype)
    return folded


def _matrix(weight: Tensor | None, place: Place) -> Tensor:
    """Return a projection's weight as a matrix in float64."""
    size = place.channels
    if weight is None or weight.numel() != size**2 or weight.shape[0] != size:
        raise InputError(
            f"the state lacks {place.parameter!r}"
            if weight is None
            else f"{place.parameter!r} has shape {tuple(weight.shape)}",
            expected=f"({size}, {size}, 1, 1)",
        )
    return weight.detach().double().reshape(size, size)
