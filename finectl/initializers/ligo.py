"""LiGO over depth: each layer of the target is a learned mixture of all layers of a dense ancestor.

Layer l has W_l = sum_j w_lj W_j and b_l = sum_j v_lj b_j, with coefficients of its own for every linear layer of a
block, and others for weights than for biases. The ancestor's layers are frozen. The coefficients are tuned for
`--tune-steps` updates on the denoising loss of the target's data, at `--tune-lr`; then the mixtures are written out.
Without updates, they are what they start as: one layer with a little of all others.

Reference: Wang et al., Learning to Grow Pretrained Models for Efficient Transformer Training, arXiv 2303.00980: the
depth part of the linear growth operator, and the start by stacking (in its authors' code, the noisy one).

Ours, where the paper says nothing of Diffusion Transformers:

- The fused query-key-value layer is one layer, and so is adaLN with its six parts; the paper's models have separate
  layers for queries, keys and values.
- The paper only grows. Where the target has fewer layers, its rows start at evenly spaced layers of the ancestor.
- Embedders and final layer are copied and frozen; those that do not fit the target's data start anew and are trained
  with the coefficients, at the usual rate.
- The learning rate falls from `--tune-lr` to 0 without a warm-up. The command that the authors published rises so
  slowly that its 100 updates hardly move the coefficients.

Open: the width part of the operator. The target has the ancestor's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finectl.diffusion.random import generator_for
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import BLOCKS, Ancestor, Layer, assemble, fitting
from finectl.initializers.tuning import tune
from finectl.models.dit import Block, DiT
from finectl.models.learngene import evenly_spaced
from finectl.models.presets import LAYER_TYPES, DiTConfig, count_parameters

NOISE = 0.03
"""Upper end of what the other layers get in a row, before its sum is brought to 1."""

PARTS = ("weight", "bias")


class SourceLayers(nn.Module):
    """One type of linear layer of all the ancestor's blocks; frozen, and no part of a state.

    Args:
        weight: (L, m1, m2).
        bias: (L, m1).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)


class MixedLinear(nn.Module):
    """A linear layer whose weight and bias are mixtures of those of the ancestor's layers.

    Args:
        source: What is mixed; it is referred to, not owned, so that it is moved and held once for all layers.
        weight_row: (L,), the start of the weight's coefficients.
        bias_row: (L,), that of the bias's.
    """

    def __init__(self, source: SourceLayers, weight_row: Tensor, bias_row: Tensor) -> None:
        super().__init__()
        self._source = (source,)  # a tuple is no child
        self.weight_row = nn.Parameter(weight_row.detach().clone())
        self.bias_row = nn.Parameter(bias_row.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., m2) to (..., m1)."""
        (source,) = self._source
        # Half precision is for the products with the activations; the mixture itself keeps the weights' own.
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = mix(self.weight_row, source.weight), mix(self.bias_row, source.bias)
        return F.linear(x, weight, bias)

    @torch.no_grad()
    def written_out(self) -> dict[str, Tensor]:
        """Return `weight` (m1, m2) and `bias` (m1,), summed in float64, as float32."""
        (source,) = self._source
        rows = {"weight": self.weight_row, "bias": self.bias_row}
        return {part: mix(row.double(), getattr(source, part).double()).float() for part, row in rows.items()}


class Mixture(DiT):
    """A Diffusion Transformer whose blocks are mixtures of another's.

    Args:
        config: The target, dense, of the ancestor's width.
        layers: The ancestor's blocks, L of them.
        rest: The target's embedders and final layer.
        rows: `<type>.weight` and `<type>.bias` -> (L', L), the start of the coefficients.
    """

    def __init__(
        self, config: DiTConfig, layers: Sequence[Layer], rest: Mapping[str, Tensor], rows: Mapping[str, Tensor]
    ) -> None:
        super().__init__(config)
        sources = {
            kind: SourceLayers(*(torch.stack([layer[f"{path}.{part}"] for layer in layers]).float() for part in PARTS))
            for kind, path in LAYER_TYPES.items()
        }
        self.sources = nn.ModuleDict(sources)
        self.blocks = nn.ModuleList(
            Block(
                config,
                {
                    kind: MixedLinear(source, rows[f"{kind}.weight"][index], rows[f"{kind}.bias"][index])
                    for kind, source in sources.items()
                },
            )
            for index in range(config.depth)
        )
        self.load_state_dict({**self.state_dict(), **rest})

    def dense(self) -> dict[str, Tensor]:
        """Return the state of the dense DiT that computes the same, float32."""
        state = {name: value.detach() for name, value in self.state_dict().items() if not name.startswith(BLOCKS)}
        for index, block in enumerate(self.blocks):
            for path in LAYER_TYPES.values():
                layer = cast(MixedLinear, block.get_submodule(path))
                parts = layer.written_out()
                state.update({f"{BLOCKS}{index}.{path}.{part}": value for part, value in parts.items()})
        return state


def initialize(request: Request) -> Initialized:
    """Mix the layers of a dense ancestor, tune the coefficients and write the dense weights.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came during the tuning; its state is saved.
    """
    config, target = request.job.config, request.target
    ancestor = Ancestor.of(request)
    layers = ancestor.layers
    start = assemble(request, [], ancestor.rest)
    rest = {name: value for name, value in start.state.items() if not name.startswith(BLOCKS)}
    rows = start_rows(len(layers), target.depth, generator_for("init-ligo", config.seed))
    model = Mixture(target, layers, rest, rows)
    cost: dict[str, Any] = {}
    if config.tune_steps:
        freeze(model, set(fitting(request, ancestor.rest, rest)))
        # Of a dense model: two operations a layer and weight for mixing, once a batch, are not counted.
        cost = tune(request, model, block_lr=config.tune_lr).cost
    # All of the ancestor's layers enter; a shallower target has no room for all that they hold.
    blocks = min(len(layers), target.depth)
    transferred = blocks * count_parameters(target)["block"]
    return replace(start, state=model.cpu().dense(), transferred=transferred, cost=cost)


def start_rows(layers: int, depth: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the coefficients before the tuning: 1 at one layer, noise at the others, and a sum of 1.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'. From L on, layer l starts at l mod L; below L, layers are evenly spaced.
        generator: Source of the noise, U(0, 0.03), another for every row.

    Returns:
        `<type>.weight` and `<type>.bias` -> (L', L), float32.

    Reference: arXiv 2303.00980, the start by stacking.
    """
    chosen = [index % layers for index in range(depth)] if depth >= layers else evenly_spaced(layers, depth)
    rows = {}
    for name in (f"{kind}.{part}" for kind in LAYER_TYPES for part in PARTS):
        row = NOISE * torch.rand(depth, layers, dtype=torch.float64, generator=generator)
        row[torch.arange(depth), torch.tensor(chosen)] = 1.0
        rows[name] = (row / row.sum(1, keepdim=True)).float()
    return rows


def mix(row: Tensor, stack: Tensor) -> Tensor:
    """Return sum_j row_j stack_j: (L,) and (L, ...) to (...).

    Reference: arXiv 2303.00980, the depth part of the growth operator.
    """
    return torch.tensordot(row, stack, dims=1)


def freeze(model: Mixture, copied: set[str]) -> None:
    """Leave the coefficients trainable, and what starts anew outside the blocks."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in copied)
