"""LiGO: each layer of the target is a learned mixture of all of a dense ancestor's, through learned maps of channels.

Depth: layer l has W_l = sum_j w_lj W_j and b_l = sum_j v_lj b_j, with coefficients of its own for every linear layer of
a block, queries, keys and values apart, and others for weights than for biases. Width: W' = B_out W B_in^T and
b' = B_out b, where the same map serves the residual stream and the condition in the whole network, each of adaLN's six
parts included, and one each is for queries, keys, values (which go into the output layer) and hidden units. Embedders
and final layer go through the stream's map too. In a wider target the old channels are copied and each new one starts
as a random average of them.

The ancestor's weights are frozen. Coefficients and maps are tuned for `--tune-steps` updates on the denoising loss of
the target's data, coefficients at `--tune-lr`, maps at the usual rate of weights; then the weights are written out.
Without updates, coefficients are what they start as: one layer with a little of all others, up to `--set noise=0.03`
each. Without noise, and at the ancestor's own width, layers are copied.

Reference: Wang et al., Learning to Grow Pretrained Models for Efficient Transformer Training, arXiv 2303.00980: the
linear growth operator, its ties, and its start by stacking (in its authors' code, the noisy one).

Ours, where the paper says nothing of Diffusion Transformers:

- adaLN with its six parts is one layer with one coefficient for each of the ancestor's layers.
- Queries, keys and values are mixed by whole heads, (h', h), and where heads have another size, by a further (k', k)
  for all heads alike.
- The paper only grows. Where the target has fewer layers, its rows start at evenly spaced layers of the ancestor, and
  where it is narrower, its maps start at channels and heads at regular places, as weight selection takes them. A space
  of channels whose size stays has no map.
- Embedders and final layer have no coefficients: they are copied and frozen, or mapped. Those that do not fit the
  target's data start anew and are trained, at the usual rate.
- Maps keep the usual rate in a wider target, too: new channels are averages, no copies that would move together.
- The learning rate falls from `--tune-lr` to 0 without a warm-up. The command that the authors published rises so
  slowly that its 100 updates hardly move the coefficients.

Open: the maps do not keep the ancestor's function in a wider target, as in the paper; nothing is rescaled for larger
sums or for attention's division by the root of a head's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.initializers.growth import BUILT, MODULES, PARTS, Mixture, WidthMaps, whole_layers
from finectl.initializers.room import block_room
from finectl.initializers.transfer import BLOCKS, Ancestor, assemble, count, fitting
from finectl.initializers.tuning import tune
from finectl.initializers.width import same_width, transform
from finectl.models.learngene import evenly_spaced


def initialize(request: Request) -> Initialized:
    """Mix the ancestor's layers at the target's width, tune the mixture and write it out.

    Raises:
        ComputationError: the loss is not finite.
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    config, target = request.job.config, request.target
    ancestor = Ancestor.of(request)
    layers = ancestor.layers
    maps = WidthMaps(ancestor.config, target, generator_for("init-ligo-width", config.seed))
    matrices = {space: None if m is None else m.detach() for space, m in maps.matrices(double=True).items()}
    start = assemble(request, [], mapped(ancestor.rest, matrices))
    rest = {name: value for name, value in start.state.items() if not name.startswith(BLOCKS)}
    copied = set(fitting(request, mapped(ancestor.rest, matrices), rest))
    grown = {} if same_width(ancestor.config, target) else whole_layers(ancestor.rest, copied)
    rows = start_rows(len(layers), target.depth, request.constants["noise"], generator_for("init-ligo", config.seed))
    model = Mixture(target, layers, rest, rows, maps, grown)
    cost: dict[str, Any] = {}
    if config.tune_steps:
        freeze(model, copied if not grown else set())
        # Of a dense model: the operations for mixing and mapping weights, once a batch, are not counted.
        cost = tune(request, model, block_lr=config.tune_lr).cost
    # All of the ancestor's layers enter; a smaller target has no room for all that they hold.
    return replace(
        start,
        state=model.cpu().dense(),
        transferred=block_room(ancestor.config, target),
        transferred_embedders=min(start.transferred_embedders, count(ancestor.rest)),
        cost=cost,
    )


def mapped(rest: Mapping[str, Tensor], matrices: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Return embedders and final layer through the maps; the same tensors where there are none."""
    if not any(matrix is not None for matrix in matrices.values()):
        return dict(rest)
    return transform({name: value.double() for name, value in rest.items()}, matrices, matrices)


def start_rows(layers: int, depth: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the coefficients before the tuning: 1 at one layer, noise at the others, and a sum of 1.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'. From L on, layer l starts at l mod L; below L, layers are evenly spaced.
        noise: Upper end of what the other layers get, before the sum is brought to 1.
        generator: Source of the noise, uniform from 0, another for every row.

    Returns:
        `<module>.weight` and `<module>.bias` -> (L', L), float32, for each of `MODULES`.

    Reference: arXiv 2303.00980, the start by stacking.
    """
    chosen = [index % layers for index in range(depth)] if depth >= layers else evenly_spaced(layers, depth)
    rows = {}
    for name in (f"{module}.{part}" for modules in MODULES.values() for module in modules for part in PARTS):
        row = noise * torch.rand(depth, layers, dtype=torch.float64, generator=generator)
        row[torch.arange(depth), torch.tensor(chosen)] = 1.0
        rows[name] = (row / row.sum(1, keepdim=True)).float()
    return rows


def freeze(model: Mixture, copied: set[str]) -> None:
    """Leave coefficients and maps trainable, and what starts anew outside the blocks."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(BUILT) or name not in copied)
