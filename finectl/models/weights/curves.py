"""Weights that every layer of a model has of its own (sigma, biases), as blocks at any depth.

A block is a part of one layer type in one layer. What a generator holds for it is interpolated between knots over the
layer's relative position, each with a slope over the logarithm of the model's depth: so layers of different depths
share what is learned, and a depth that was never collected has blocks, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError
from finectl.models.weights.layout import Group, Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

KNOTS = 4
"""Places over the relative position; no more than the deepest collected model has layers."""
CURVE_RULE = 1


@dataclass(frozen=True)
class Grid:
    """Where the knots are.

    Args:
        knots: K, evenly from the first layer to the last.
        centre: Mean of the logarithms of the collected depths.
        spread: Their standard deviation; 0 where there is one depth only, and then nothing depends on it.
    """

    knots: int
    centre: float
    spread: float

    @classmethod
    def of(cls, depths: Sequence[int]) -> Grid:
        """Return the grid of some collected depths."""
        logs = [math.log(depth) for depth in depths]
        centre = sum(logs) / len(logs)
        spread = math.sqrt(sum((one - centre) ** 2 for one in logs) / len(logs))
        return cls(min(KNOTS, max(depths)), centre, spread)

    @property
    def rows(self) -> int:
        """P: the knots, and as many slopes."""
        return 2 * self.knots

    def mix(self, depth: int) -> Tensor:
        """Return what each row counts in each layer of a model, (L, P): two neighbouring knots, and their slopes."""
        import torch

        place = torch.linspace(0, 1, depth) if depth > 1 else torch.tensor([0.5])
        if self.knots == 1:
            hats = torch.ones(depth, 1)
        else:
            knots = torch.linspace(0, 1, self.knots)
            hats = (1 - (place[:, None] - knots).abs() * (self.knots - 1)).clamp(min=0)  # (L, K)
        slope = (math.log(depth) - self.centre) / self.spread if self.spread > 0 else 0.0
        return torch.cat([hats, slope * hats], dim=1)

    def mix_all(self, depths: Sequence[int]) -> Tensor:
        """Return the same of several models, one after another, (sum of all L, P)."""
        import torch

        return torch.cat([self.mix(depth) for depth in depths])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Build it from what `to_dict` returned.

        Raises:
            InputError: it is none.
        """
        try:
            grid = cls(int(values["knots"]), float(values["centre"]), float(values["spread"]))
            if grid.knots < 1 or grid.spread < 0:
                raise ValueError("its knots or its spread")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the grid of a generator of sigma is damaged: {error}") from error
        return grid


def layer_layout(shapes: Mapping[str, tuple[int, ...]], block_size: int) -> Layout:
    """Return the blocks of one layer: a layer type's sigma and its bias are one group.

    Args:
        shapes: `<name>.<type>` to the shape that one layer has of it.
        block_size: Numbers a block.
    """
    groups: list[Group] = []
    first = 0
    for kind in dict.fromkeys(name.partition(".")[2] for name in shapes):
        parts, offset = [], 0
        for name, shape in shapes.items():
            if name.partition(".")[2] == kind:
                parts.append(Part(name, tuple(shape), offset))
                offset += parts[-1].size
        blocks = -(-offset // block_size)
        groups.append(Group(kind, tuple(parts), offset, first, blocks, blocks * block_size - offset))
        first += blocks
    return Layout(CURVE_RULE, block_size, tuple(groups))


def model_layout(kinds: Layout, depths: Sequence[int]) -> Layout:
    """Return the blocks of models of some depths: those of one layer, layer by layer and model by model.

    Args:
        kinds: The blocks of one layer.
        depths: Of the models.
    """
    groups = []
    for layer, prefix in enumerate(prefixes(depths)):
        for group in kinds.groups:
            parts = tuple(Part(prefix + part.tensor, part.shape, part.offset) for part in group.parts)
            first = layer * kinds.blocks + group.first_block
            groups.append(Group(prefix + group.name, parts, group.length, first, group.blocks, group.pad))
    return Layout(kinds.rule, kinds.block_size, tuple(groups))


def prefixes(depths: Sequence[int]) -> list[str]:
    """Return what the names of each layer's tensors begin with, such as `l4.0.` of the first of four layers."""
    return [f"l{depth}.{layer}." for depth in depths for layer in range(depth)]


def by_layer(curves: Mapping[str, Tensor], depth: int, first_axis: int = 0) -> dict[str, Tensor]:
    """Return the tensors of each layer under the names of `model_layout`.

    Args:
        curves: `<name>.<type>` to (..., L, *shape).
        depth: L.
        first_axis: The axis of L.
    """
    return {
        f"l{depth}.{layer}.{name}": values.select(first_axis, layer)
        for layer in range(depth)
        for name, values in curves.items()
    }
