"""A dense model of any depth, read off a learngene: what the methods share that start from one.

What layers share is placed as it is; what each layer has of its own (sigma or scalers, biases) is read off the
ancestor's curves over depth and may be tuned for a few updates, with the shared parts frozen. Then dense weights are
written out.

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
from finectl.initializers.learngene_width import Mapped, at_width, axes_of
from finectl.initializers.transfer import BRANCH_ENDS, count, fitting, scale_branches
from finectl.initializers.tuning import tune
from finectl.initializers.width import same_width, spread_state
from finectl.models.dit import DiT, dense_state_dict, initialize_
from finectl.models.io import read_dit_config
from finectl.models.learngene import Learngene, evenly_spaced, load_learngene
from finectl.models.presets import LAYER_TYPES
from finectl.models.sharing import SHARED
from finectl.models.tying import OWN

LEARNED = "learned"
"""The `--width-map` of maps that are tuned."""


def expand(request: Request, curves: Mapping[str, Tensor] | None = None) -> Initialized:
    """Build the target with shared parts, place what the learngene holds, tune what layers own, and write it dense.

    Args:
        request: What is to be made.
        curves: What layers own, by parameter name; None reads it off the ancestor's curves.

    Raises:
        InputError: a file of the learngene is missing or damaged.
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    config = request.job.config
    kept = load_learngene(cast(Artifact, request.source))
    learngene = at_width(kept, request.target)
    if curves is None:
        curves = place_curves(learngene, request.target.depth, config.sigma, config.depth_scale)
    plain, rest = condensed_model(request, learngene, curves)
    model_config = plain.config
    model = Mapped(model_config, kept, plain.state_dict(), rest) if config.width_map == LEARNED else plain
    cost: dict[str, Any] = {}
    if config.tune_steps:
        freeze(model, copied=rest, biases=config.tune_biases)
        # Adam moves a parameter by about its learning rate an update, so sigma, of scale 1, and the biases that go with
        # it get a rate of their own; maps and parts that start anew have the usual one.
        cost = tune(request, model, block_lr=config.tune_lr, source=kept.config).cost
    dense = model.dense() if isinstance(model, Mapped) else dense_state_dict(model, model_config)
    state = {name: value.cpu() for name, value in dense.items()}
    if not same_width(kept.config, request.target):
        # Copies of a channel with equal columns would have equal gradients for ever.
        generator = generator_for("init-spread", config.seed)
        state = spread_state(state, axes_of(kept.config, request.target), generator)
    return Initialized(
        state,
        transferred=count(kept.factors) + (count(kept.curves) if curves else 0),
        transferred_embedders=min(count(rest), count(kept.rest)),  # what a wider target repeats is not counted again
        cost=cost,
    )


def condensed_model(
    request: Request, learngene: Learngene, curves: Mapping[str, Tensor]
) -> tuple[DiT, dict[str, Tensor]]:
    """Return the target with the shared parts of a learngene, and those of its embedders and final layer that fit.

    Args:
        request: What is to be made.
        learngene: Of the target's width.
        curves: What layers own, by parameter name; what is left out starts at random.
    """
    config = replace(request.target, factorized=learngene.config.factorized)
    model = initialize_(DiT(config), generator_for("init", request.job.config.seed))
    rest = fitting(request, learngene.rest, model.state_dict())
    shared = {f"{SHARED}{name}": value for name, value in learngene.factors.items()}
    model.load_state_dict({**model.state_dict(), **shared, **rest, **curves})
    return model, rest


def expand_scaled(request: Request) -> Initialized:
    """Expand a learngene whose layers own nothing; the variant `scaled` scales residual branches to the depth.

    A target of depth L' gets its residual branches times (L / L')^x with the constant x, `exponent`, as FINE does with
    `--depth-scale`; the papers leave them as they are.
    """
    made = expand(request)
    if request.job.config.variant != "scaled":
        return made
    layers = read_dit_config(cast(Artifact, request.source)).depth
    return scale_branches(made, (layers / request.target.depth) ** request.constants["exponent"])


def place_curves(learngene: Learngene, depth: int, sigma: str, depth_scale: float) -> dict[str, Tensor]:
    """Return sigma (or scalers) and biases of every target layer, read from the ancestor's curves over depth.

    A residual network of L' layers has to do with L' updates of its stream what its ancestor did with L. So sigma and
    bias of the two layers that end a residual branch (`o` and `out`) are multiplied by (L / L')^x. With x = 0 they
    stay as read, as in the paper; x = 1 keeps the sum of the updates where all layers pull the same way, x = 0.5 its
    length where they do not. `nearest` changes no layer, so a layer that is read k times gets (1 / k)^x instead.

    Args:
        learngene: With curves (L, ...).
        depth: Layers of the target, L'.
        sigma: `interpolated` along depth, `nearest` (whole layers, evenly spaced), `identical` (the mean over depth),
            or `random`: nothing is read, and the random start of the condensed model stays.
        depth_scale: The exponent x.
    """
    if sigma == "random":
        return {}
    return by_parameter(curves_at(learngene, depth, sigma, depth_scale))


def by_parameter(curves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the curves of a model, `<name>.<type>` to (L, ...), by the names of its parameters."""
    return {
        f"blocks.{index}.{LAYER_TYPES[kind]}.{what}": values[index]
        for name, values in curves.items()
        for what, kind in [name.split(".")]
        for index in range(len(values))
    }


def curves_at(learngene: Learngene, depth: int, sigma: str, depth_scale: float) -> dict[str, Tensor]:
    """Return the curves of a model of another depth, `<name>.<type>` to (L', ...); see `place_curves`.

    Args:
        learngene: With curves (L, ...).
        depth: Layers of the target, L'.
        sigma: `interpolated`, `nearest` or `identical`.
        depth_scale: The exponent x.
    """
    layers = learngene.config.depth
    scale = torch.full((depth, 1), layers / depth)  # (L', 1)
    chosen = evenly_spaced(layers, depth)
    if sigma == "nearest":
        scale = torch.tensor([[1 / chosen.count(layer)] for layer in chosen])
    scale = scale**depth_scale
    placed = {}
    for name, values in learngene.curves.items():
        kind = name.partition(".")[2]
        curve = values.flatten(1)  # (L, n)
        if sigma == "nearest":
            rows = curve[chosen]
        elif sigma == "interpolated":
            rows = interpolate(curve, depth)
        else:
            rows = curve.mean(0, keepdim=True).expand(depth, -1)
        rows = rows * scale if kind in BRANCH_ENDS else rows
        placed[name] = rows.reshape(depth, *values.shape[1:]).contiguous()
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
    """Leave trainable what may be tuned: sigma or scalers, by option the biases, maps, embedders that start anew."""
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.")
        is_own = name.rpartition(".")[2] in OWN
        is_bias = in_block and name.endswith(".bias")
        is_anew = not in_block and not name.startswith(SHARED) and name not in copied
        parameter.requires_grad_(is_own or (is_bias and biases) or is_anew)
