"""A learngene at another width: rows of U and V, or tiles, are taken or repeated as a dense model's channels are.

To take rows P and columns Q of W = U diag(sigma) V^T is to take rows of U and V: (P U) diag(sigma) (Q V)^T, which does
it for every layer at once, and sigma stays. To take whole tiles of W = sum_t S_t (x) T_t is to take rows and columns of
the scalers, and the templates stay.

The channels are those of `finectl.initializers.width`: one set for the residual stream, whole heads, hidden units. WAVE
takes channels tile by tile; its tiles hold whole heads where the tile's side is a multiple of the head's size.

With `--width-map learned`, rows of U and V go through one learned matrix for each space of channels instead, the same
in all layers and types, and so do embedders and final layer (`Mapped`). The matrices start at that choice, columns are
divided as there, and they are tuned with sigma, at the usual rate of weights; U and V themselves stay. Biases start at
the choice and are each layer's own. WAVE has no learned maps: its tiles are fixed, so that there is nothing to mix.

Ours: FINE's paper changes the depth alone, and WAVE's lets the scalers of another width start at random. Learned maps
are those of LiGO (`finectl.initializers.growth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from finectl.initializers.growth import GrownLayer, WidthMaps, grow_, whole_layers
from finectl.initializers.width import (
    ATTENTION,
    HIDDEN,
    SIDES,
    STREAM,
    Axes,
    Maps,
    axes,
    regular,
    same_width,
    select,
    sizes,
)
from finectl.models.dit import DiT
from finectl.models.factorized import FactorizedLinear, SharedFactors, build_weight
from finectl.models.learngene import Learngene
from finectl.models.presets import LAYER_TYPES, DiTConfig, FactorConfig
from finectl.models.tying import TemplateConfig


def at_width(learngene: Learngene, target: DiTConfig) -> Learngene:
    """Return what a learngene of the target's width would hold.

    Args:
        learngene: Of FINE or WAVE.
        target: Its width, heads and hidden units count; `require_width` accepts it.
    """
    source, tying = learngene.config, learngene.config.factorized
    if same_width(source, target):
        return learngene
    tile = tying.size if isinstance(tying, TemplateConfig) else None
    taken = axes_of(source, target)
    of_kind = {kind: taken[path] for kind, path in LAYER_TYPES.items()}
    made = {name: getattr(target, name) for name in ("width", "heads", "mlp_ratio")}
    return Learngene(
        replace(source, **made),
        {name: _factor(name, value, of_kind) for name, value in learngene.factors.items()},
        select(learngene.rest, taken),
        {name: _curve(name, value, of_kind, tile) for name, value in learngene.curves.items()},
    )


def axes_of(source: DiTConfig, target: DiTConfig) -> dict[str, Axes]:
    """Return which rows and columns are taken of the layers that a learngene stands for."""
    tying = source.factorized
    if isinstance(tying, TemplateConfig):
        return axes(source, target, tile_channels(source, target, tying.size))
    return axes(source, target)


def tile_channels(source: DiTConfig, target: DiTConfig, tile: int) -> dict[str, Tensor]:
    """Return the channels of each space that are taken, int64, where whole tiles of `tile` channels are."""

    def channels(count: int, wanted: int) -> Tensor:
        tiles = torch.tensor(regular(count // tile, wanted // tile))
        return (tiles[:, None] * tile + torch.arange(tile)).flatten()

    width = channels(source.width, target.width)
    return {**dict.fromkeys((STREAM, *ATTENTION), width), HIDDEN: channels(sizes(source)[2], sizes(target)[2])}


def _factor(name: str, value: Tensor, taken: Mapping[str, Axes]) -> Tensor:
    """Take rows of U, (m1, r), as rows of W, and rows of V, (m2, r), as columns of W; templates stay."""
    kind, _, what = name.partition(".")
    axis = taken[kind]
    if what == "U":
        return _scaled(value.index_select(0, cast(Tensor, axis.rows)), axis.row_scale)
    if what == "V":
        return _scaled(value.index_select(0, cast(Tensor, axis.columns)), axis.column_scale)
    return value


def _curve(name: str, value: Tensor, taken: Mapping[str, Axes], tile: int | None) -> Tensor:
    """Take biases (L, m1) as rows of W, and scalers (L, N, m1 / w, m2 / w) as its tiles; sigma stays."""
    what, _, kind = name.partition(".")
    axis = taken[kind]
    if what == "bias":
        return _scaled(value.index_select(1, cast(Tensor, axis.rows)).T, axis.row_scale).T
    if what != "scalers" or tile is None:
        return value
    rows, columns = (cast(Tensor, side)[::tile] // tile for side in (axis.rows, axis.columns))
    part = value.index_select(2, rows).index_select(3, columns)
    return part if axis.column_scale is None else part * axis.column_scale[::tile].to(part.dtype)


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale.to(rows.dtype)[:, None]


class MappedFactors(nn.Module):
    """U and V of one layer type at another width: their rows, mapped.

    Args:
        kind: The type.
        U: (m1, r), and V: (m2, r), of the learngene; frozen, and no part of a state.
        maps: The maps of the channels.

    Attributes:
        U: (m1', r), and V: (m2', r), as the maps were when `map_` was last called.
    """

    U: Tensor
    V: Tensor

    def __init__(self, kind: str, U: Tensor, V: Tensor, maps: WidthMaps) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("source_U", U.float(), persistent=False)
        self.register_buffer("source_V", V.float(), persistent=False)
        self.map_(maps)

    def map_(self, maps: WidthMaps) -> None:
        """Compute U and V anew, once for all layers that refer to them."""
        self.U, self.V = self.built(*maps.sides())

    def built(self, given: Maps, taken_in: Maps) -> tuple[Tensor, Tensor]:
        """Return U and V, (m1', r) and (m2', r), in the type of the matrices."""
        sides, held = SIDES[LAYER_TYPES[self.kind]], dict(self.named_buffers())
        chunks = zip(sides.rows, held["source_U"].chunk(len(sides.rows)), strict=True)
        U = torch.cat([_mapped(given[space], chunk) for space, chunk in chunks])
        return U, _mapped(taken_in[cast(str, sides.columns)], held["source_V"])


class Mapped(DiT):
    """A factorised model at another width, whose U and V, embedders and final layer come through maps that are learned.

    Args:
        config: The target, factorised.
        learngene: Of FINE, at its own width.
        state: The model with the maps' start written out; what goes through the maps is not read.
        fit: Names of the embedders and the final layer in it that are the learngene's, at the target's width.
    """

    def __init__(
        self, config: DiTConfig, learngene: Learngene, state: Mapping[str, Tensor], fit: Mapping[str, Tensor]
    ) -> None:
        super().__init__(config)
        self.width_maps = WidthMaps(learngene.config, config, None)
        grow_(self, whole_layers(learngene.rest, fit), self.width_maps)
        sharing = cast(FactorConfig, config.factorized).sigma_sharing
        for kind in self.factors:
            mapped = MappedFactors(
                kind, learngene.factors[f"{kind}.U"], learngene.factors[f"{kind}.V"], self.width_maps
            )
            self.factors[kind] = mapped
            parent, _, name = LAYER_TYPES[kind].rpartition(".")
            for block in self.blocks:
                layer = FactorizedLinear(cast(SharedFactors, mapped), sharing)
                setattr(block.get_submodule(parent), name, layer)
        own = self.state_dict()
        self.load_state_dict({**own, **{name: value for name, value in state.items() if name in own}})

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict as a DiT does, with U and V as the maps now are."""
        # Half precision is for the products with the activations; the maps keep the weights' own.
        with torch.autocast(x.device.type, enabled=False):
            for factors in self.factors.values():
                cast(MappedFactors, factors).map_(self.width_maps)
        return super().forward(x, t, y)

    @torch.no_grad()
    def dense(self) -> dict[str, Tensor]:
        """Return the state of the dense DiT that computes the same, float32; sums are in float64."""
        held = self.state_dict().items()
        state = {name: value for name, value in held if not name.startswith("width_maps.")}
        for name, module in self.named_modules():
            if isinstance(module, GrownLayer):
                state.update({f"{name}.{part}": value.float() for part, value in module.built(double=True).items()})
        sides = self.width_maps.sides(double=True)
        for kind, factors in self.factors.items():
            U, V = (part.double() for part in cast(MappedFactors, factors).built(*sides))
            for index, block in enumerate(self.blocks):
                path = LAYER_TYPES[kind]
                layer = cast(FactorizedLinear, block.get_submodule(path))
                del state[f"blocks.{index}.{path}.sigma"]
                state[f"blocks.{index}.{path}.weight"] = build_weight(U, layer.diagonal().double(), V).float()
        return state


def _mapped(matrix: Tensor | None, rows: Tensor) -> Tensor:
    return rows if matrix is None else matrix @ rows.to(matrix.dtype)
