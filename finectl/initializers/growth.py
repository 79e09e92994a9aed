"""LiGO's growth operator on a Diffusion Transformer: layers mixed over depth, channels mapped over width.

`WidthMaps` holds the maps of the five spaces of channels (`finectl.initializers.width`), `grow_` lets a model's
embedders and final layer be built of a frozen source through them, and `Mixture` is a model whose blocks are, too.
`finectl.initializers.learngene_width` maps what a learngene's layers share in the same way.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finectl.initializers.transfer import BLOCKS, Layer
from finectl.initializers.width import (
    ATTENTION,
    HIDDEN,
    SIDES,
    STREAM,
    VALUES,
    Maps,
    channels,
    division,
    regular,
    regular_heads,
    score_scale,
    sizes,
    transform,
)
from finectl.models.dit import Block, DiT
from finectl.models.presets import LAYER_TYPES, DiTConfig

PARTS = ("weight", "bias")
MODULES = {"qkv": ATTENTION, "o": ("o",), "in": ("in",), "out": ("out",), "adaln": ("adaln",)}
"""Type of a linear layer -> the layers in it that have depth coefficients of their own."""


class WidthMaps(nn.Module):
    """A map for each space of channels that differs: the same one wherever channels of that space go in or out.

    Queries, keys and values mix whole heads, and channels inside of all heads alike where the size of heads differs.

    Args:
        source: The ancestor's architecture.
        target: The target's.
        generator: Source of the new rows; without one, maps start at the choice of `finectl.initializers.width`: old
            channels are repeated, columns that take copies in are divided, and scores of larger heads stay.
    """

    def __init__(self, source: DiTConfig, target: DiTConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        pairs = {STREAM: (source.width, target.width), HIDDEN: (sizes(source)[2], sizes(target)[2])}
        for space in ATTENTION:
            pairs[f"{space}_heads"] = (source.heads, target.heads)
            pairs[f"{space}_inside"] = (sizes(source)[1], sizes(target)[1])
        self._sizes = pairs
        self.maps = nn.ParameterDict(
            {
                name: nn.Parameter(start_map(*pair, generator, heads=name.endswith("_heads")))
                for name, pair in pairs.items()
                if pair[0] != pair[1]
            }
        )
        for name, scale in (kept_function(source, target) if generator is None else {}).items():
            self.register_buffer(name, scale, persistent=False)

    def matrices(self, double: bool = False) -> dict[str, Tensor | None]:
        """Return the matrix of each space, (m', m), as `transform` takes it; None where the space stays."""
        made = {name: self._matrix(name, double) for name in (STREAM, HIDDEN)}
        return {**made, **{space: self._attention(space, double) for space in ATTENTION}}

    def sides(self, double: bool = False) -> tuple[Maps, Maps]:
        """Return the matrices of the channels that layers give, and of those that layers take in.

        They differ by fixed factors of their rows, in maps that started as a repetition, and not at all in others.
        """
        matrices, scales = self.matrices(double), dict(self.named_buffers())

        def scaled(side: str) -> dict[str, Tensor | None]:
            made = dict(matrices)
            for space, matrix in matrices.items():
                scale = scales.get(f"{side}_{space}")
                if matrix is not None and scale is not None:
                    made[space] = scale.to(matrix.dtype)[:, None] * matrix
            return made

        return scaled(GIVEN), scaled(TAKEN_IN)

    def _matrix(self, name: str, double: bool) -> Tensor | None:
        if name not in self.maps:
            return None
        return self.maps[name].double() if double else self.maps[name]

    def _attention(self, space: str, double: bool) -> Tensor | None:
        names = [f"{space}_heads", f"{space}_inside"]
        given = [self._matrix(name, double) for name in names]
        some = next((matrix for matrix in given if matrix is not None), None)
        if some is None:
            return None
        whole = [
            torch.eye(self._sizes[name][0], dtype=some.dtype, device=some.device) if matrix is None else matrix
            for name, matrix in zip(names, given, strict=True)
        ]
        return torch.kron(*whole)  # (h' k', h k)


GIVEN, TAKEN_IN = "given", "taken_in"


def kept_function(source: DiTConfig, target: DiTConfig) -> dict[str, Tensor]:
    """Return what rows of repeated channels are multiplied by, float64, so that a wider model computes the same.

    Returns:
        `given_<space>` and `taken_in_<space>` -> (m',), of queries and keys, and of the spaces that are taken in.
    """
    scores, taken = score_scale(source, target), channels(source, target)
    made = {} if scores is None else {f"{GIVEN}_{s}": v for s, v in zip(ATTENTION, scores.chunk(3), strict=True)}
    shares = {f"{TAKEN_IN}_{space}": division(taken[space]) for space in (STREAM, VALUES, HIDDEN)}
    return {**made, **{name: share for name, share in shares.items() if share is not None}}


def start_map(count: int, wanted: int, generator: torch.Generator | None, *, heads: bool = False) -> Tensor:
    """Return a map before the tuning, float32 (m', m).

    Args:
        count: Channels or heads of the source, m.
        wanted: Those of the target, m'. Up to m, rows pick the channels or heads at regular places. Above m, the first
            m rows copy, and each new one is U(0, 1) brought to a sum of 1; or all are repeated at regular places.
        generator: Source of the new rows; None repeats old ones.
        heads: Whether heads are picked.

    Reference: arXiv 2303.00980, the width part of the growth operator.
    """
    identity = torch.eye(count, dtype=torch.float64)
    if wanted <= count or generator is None:
        return identity[(regular_heads if heads else regular)(count, wanted)].float()
    new = torch.rand(wanted - count, count, dtype=torch.float64, generator=generator)
    return torch.cat([identity, new / new.sum(1, keepdim=True)]).float()


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
    """A linear layer whose weight and bias are mixtures of those of the ancestor's layers, at the target's width.

    Args:
        path: Its path in a block.
        source: What is mixed; it is referred to, not owned, so that it is moved and held once for all layers.
        maps: The maps of the channels, likewise.
        weight_rows: (P, L), the start of the weight's coefficients for each of P equal parts of its rows.
        bias_rows: (P, L), that of the bias's.
    """

    def __init__(
        self, path: str, source: SourceLayers, maps: WidthMaps, weight_rows: Tensor, bias_rows: Tensor
    ) -> None:
        super().__init__()
        self.path = path
        self._shared = (source, maps)  # a tuple is no child
        self.weight_rows = nn.Parameter(weight_rows.detach().clone())
        self.bias_rows = nn.Parameter(bias_rows.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: (..., m2') to (..., m1')."""
        # Half precision is for the products with the activations; the mixture itself keeps the weights' own.
        with torch.autocast(x.device.type, enabled=False):
            made = self.built()
        return F.linear(x, made["weight"], made["bias"])

    def built(self, double: bool = False) -> dict[str, Tensor]:
        """Return `weight` (m1', m2') and `bias` (m1',), in float64 where `double`."""
        source, maps = self._shared
        rows = {"weight": self.weight_rows, "bias": self.bias_rows}
        mixed = {
            f"{self.path}.{part}": mix(_maybe_double(row, double), _maybe_double(getattr(source, part), double))
            for part, row in rows.items()
        }
        matrices = maps.matrices(double)
        return {name.rpartition(".")[2]: value for name, value in transform(mixed, matrices, matrices).items()}


class GrownLayer(nn.Module):
    """An embedder's or the final layer's linear map, convolution or table, at the target's width.

    Args:
        path: Its path in the model.
        tensors: The ancestor's `weight`, and its `bias` where it has one; frozen, and no part of a state.
        maps: The maps of the channels, referred to.
    """

    def __init__(self, path: str, tensors: Mapping[str, Tensor], maps: WidthMaps) -> None:
        super().__init__()
        self.path = path
        self._shared = (maps,)
        for part, value in tensors.items():
            self.register_buffer(f"source_{part}", value.float(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight at the target's width."""
        return self.built()["weight"]

    def built(self, double: bool = False) -> dict[str, Tensor]:
        """Return `weight`, and `bias` where there is one, in float64 where `double`."""
        (maps,) = self._shared
        held = {f"{self.path}.{name[7:]}": _maybe_double(value, double) for name, value in self.named_buffers()}
        return {name.rpartition(".")[2]: value for name, value in transform(held, *maps.sides(double)).items()}

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer as the one that it stands for does: to images, labels or vectors."""
        with torch.autocast(x.device.type, enabled=False):
            made = self.built()
        weight, bias = made["weight"], made.get("bias")
        if SIDES[self.path].table:
            return F.embedding(x, weight)
        return F.conv2d(x, weight, bias, stride=weight.shape[-1]) if weight.dim() == 4 else F.linear(x, weight, bias)


def whole_layers(rest: Mapping[str, Tensor], fit: Container[str]) -> dict[str, Tensor]:
    """Return those of the embedders and the final layer of which weight and bias both fit the target."""
    lacking = {name.rpartition(".")[0] for name in rest if name not in fit}
    return {name: value for name, value in rest.items() if name.rpartition(".")[0] not in lacking}


def grow_(model: DiT, grown: Mapping[str, Tensor], maps: WidthMaps) -> None:
    """Build embedders and final layer of an ancestor's, through the maps, in the places of a model's own.

    Args:
        model: At the target's width.
        grown: What `whole_layers` returned.
        maps: The maps of the channels.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in grown):
        tensors = {part: grown[f"{path}.{part}"] for part in PARTS if f"{path}.{part}" in grown}
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, GrownLayer(path, tensors, maps))


class Mixture(DiT):
    """A Diffusion Transformer that is built of another's layers.

    Args:
        config: The target, dense.
        layers: The ancestor's blocks, L of them.
        rest: The target's embedders and final layer; those of `grown` are not read.
        rows: `<module>.weight` and `<module>.bias` -> (L', L), the start of the coefficients, by `MODULES`.
        maps: The maps of the channels.
        grown: The ancestor's embedders and final layer, as far as they go through the maps, by name.
    """

    def __init__(
        self,
        config: DiTConfig,
        layers: Sequence[Layer],
        rest: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        maps: WidthMaps,
        grown: Mapping[str, Tensor],
    ) -> None:
        super().__init__(config)
        self.width_maps = maps
        sources = {
            kind: SourceLayers(*(torch.stack([layer[f"{path}.{part}"] for layer in layers]).float() for part in PARTS))
            for kind, path in LAYER_TYPES.items()
        }
        self.sources = nn.ModuleDict(sources)
        self.blocks = nn.ModuleList(
            Block(
                config,
                {
                    kind: MixedLinear(
                        LAYER_TYPES[kind],
                        source,
                        maps,
                        *(torch.stack([rows[f"{name}.{part}"][index] for name in MODULES[kind]]) for part in PARTS),
                    )
                    for kind, source in sources.items()
                },
            )
            for index in range(config.depth)
        )
        grow_(self, grown, maps)
        own = self.state_dict()
        self.load_state_dict({**own, **{name: value for name, value in rest.items() if name in own}})

    @torch.no_grad()
    def dense(self) -> dict[str, Tensor]:
        """Return the state of the dense DiT that computes the same, float32; sums are in float64."""
        state = {name: value.detach() for name, value in self.state_dict().items() if not name.startswith(BUILT)}
        for name, module in self.named_modules():
            if isinstance(module, MixedLinear | GrownLayer):
                state.update({f"{name}.{part}": value.float() for part, value in module.built(double=True).items()})
        return state


BUILT = (BLOCKS, "width_maps.")
"""Prefixes of the parameters that a dense model does not have."""


def mix(rows: Tensor, stack: Tensor) -> Tensor:
    """Return sum_j row_j stack_j for each of P equal parts of the rows: (P, L) and (L, m1, ...) to (m1, ...).

    Reference: arXiv 2303.00980, the depth part of the growth operator.
    """
    parts = stack.chunk(len(rows), dim=1)
    return torch.cat([torch.tensordot(row, part, dims=1) for row, part in zip(rows, parts, strict=True)])


def _maybe_double(value: Tensor, double: bool) -> Tensor:
    return value.double() if double else value
