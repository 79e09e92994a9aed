"""FINE, phase 2: a dense model of any depth from a learngene.

U and V are frozen; each layer of the target gets a sigma, which starts from the ancestor's curve over depth and is
tuned for a few hundred updates on a small, fixed part of the target data. Then W = U diag(sigma) V^T is written out.

Reference: FINE, arXiv 2409.19289, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from finectl.artifacts.store import Artifact
from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import count, fitting
from finectl.initializers.tuning import tune
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.learngene import Learngene, evenly_spaced, load_learngene
from finectl.models.presets import LAYER_TYPES

BRANCH_ENDS = ("o", "out")


def initialize(request: Request) -> Initialized:
    """Build the factorised target, place what the learngene holds, tune sigma and write the dense weights.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    config = request.job.config
    learngene = load_learngene(cast(Artifact, request.source))
    model_config = replace(request.target, factorized=learngene.config.factorized)
    model = initialize_(DiT(model_config), generator_for("init", config.seed))
    rest = fitting(request, learngene.rest, model.state_dict())
    factors = {f"factors.{name}": value for name, value in learngene.factors.items()}
    curves = place_curves(learngene, request.target.depth, config.sigma, config.depth_scale)
    model.load_state_dict({**model.state_dict(), **factors, **rest, **curves})
    cost: dict[str, Any] = {}
    if config.tune_steps:
        freeze(model, copied=rest, biases=config.tune_biases)
        # Adam moves a parameter by about its learning rate an update, so sigma, of scale 1, and the biases that go with
        # it get a rate of their own; parts that start anew keep the usual one.
        cost = tune(request, model, block_lr=config.tune_lr).cost
    return Initialized(
        {name: value.cpu() for name, value in dense_state_dict(model, model_config).items()},
        transferred=count(factors) + (count(learngene.curves) if curves else 0),
        transferred_embedders=count(rest),
        cost=cost,
    )


def place_curves(learngene: Learngene, depth: int, sigma: str, depth_scale: float) -> dict[str, Tensor]:
    """Return sigma and biases of every target layer, read from the ancestor's curves over depth.

    A residual network of L' layers has to do with L' updates of its stream what its ancestor did with L. So sigma and
    bias of the two layers that end a residual branch (`o` and `out`) are multiplied by (L / L')^x. With x = 0 they
    stay as read, as in the paper; x = 1 keeps the sum of the updates where all layers pull the same way, x = 0.5 its
    length where they do not. `nearest` changes no layer, so a layer that is read k times gets (1 / k)^x instead.

    Args:
        learngene: With curves (L, n).
        depth: Layers of the target, L'.
        sigma: `interpolated` along depth, `nearest` (whole layers, evenly spaced), `identical` (the mean over depth),
            or `random`: nothing is read, and the random start of the condensed model stays.
        depth_scale: The exponent x.
    """
    if sigma == "random":
        return {}
    layers = learngene.config.depth
    scale = torch.full((depth, 1), layers / depth)  # (L', 1)
    chosen = evenly_spaced(layers, depth)
    if sigma == "nearest":
        scale = torch.tensor([[1 / chosen.count(layer)] for layer in chosen])
    scale = scale**depth_scale
    placed = {}
    for name, curve in learngene.curves.items():
        what, kind = name.split(".")
        if sigma == "nearest":
            rows = curve[chosen]
        elif sigma == "interpolated":
            rows = interpolate(curve, depth)
        else:
            rows = curve.mean(0, keepdim=True).expand(depth, -1)
        rows = rows * scale if kind in BRANCH_ENDS else rows
        for index in range(depth):
            placed[f"blocks.{index}.{LAYER_TYPES[kind]}.{what}"] = rows[index]
    return placed


def interpolate(curve: Tensor, depth: int) -> Tensor:
    """Read a curve over L layers at L' places from its first to its last layer: (L, n) to (L', n).

    Layer l' of the target, counted from 1, lies at 1 + (l' - 1)(L - 1) / (L' - 1); a single layer lies in the middle.

    Reference: FINE, arXiv 2409.19289, the linear rule of its table 5.
    """
    layers = curve.shape[0]
    places = torch.linspace(0, layers - 1, depth) if depth > 1 else torch.tensor([(layers - 1) / 2])
    lower = places.floor().long().clamp(max=layers - 1)
    upper = (lower + 1).clamp(max=layers - 1)
    share = (places - lower).to(curve.dtype)[:, None]  # (L', 1)
    return curve[lower] * (1 - share) + curve[upper] * share


def freeze(model: DiT, copied: Mapping[str, Tensor], biases: bool) -> None:
    """Leave trainable what phase 2 may change: sigma, by option the biases, and embedders that start anew."""
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.")
        is_bias = in_block and name.endswith(".bias")
        is_anew = not in_block and not name.startswith("factors.") and name not in copied
        parameter.requires_grad_(name.endswith(".sigma") or (is_bias and biases) or is_anew)
