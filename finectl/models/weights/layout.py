"""How the tensors of a LoRA lie in blocks of equal length: one table, from which packing and unpacking read all.

Layers are visited in a fixed order. A group of tensors is laid out one number after another and filled up with zeros to
whole blocks, so that no block holds numbers of two groups.

Reference: Gong et al., Efficient Training with Denoised Neural Weights, arXiv 2407.11966, section 4.2 and table 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

RULES = (1, 2, 3)
"""1: a layer's tensors in turn are one group. 2: the same, its two matrices interleaved by rank. 3: each is a group."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
SCALE, SHIFT = ".weight", ".bias"


class LayerSpec(Protocol):
    """What the layout needs of an adapted layer; `finectl.adapters.lora.LoraLayer` is one."""

    @property
    def name(self) -> str: ...
    @property
    def a_shape(self) -> tuple[int, ...]: ...
    @property
    def b_shape(self) -> tuple[int, ...]: ...
    @property
    def norm(self) -> str | None: ...
    @property
    def norm_size(self) -> int: ...


@dataclass(frozen=True)
class Part:
    """A tensor of a group.

    Args:
        tensor: Its name.
        shape: Its shape.
        offset: Numbers of the group before its first one; with `interleaved`, before the group's first one of a pair.
        interleaved: 0, or r where it and its neighbour lie rank by rank: r rows of the one, r columns of the other.
        stride: Numbers that both have a rank, where interleaved.
    """

    tensor: str
    shape: tuple[int, ...]
    offset: int
    interleaved: int = 0
    stride: int = 0

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Tensors that share blocks.

    Args:
        name: That of the layer, or with rule 3 of the tensor.
        parts: Its tensors.
        length: Numbers.
        first_block: Its first block.
        blocks: Blocks.
        pad: Zeros at its end.
    """

    name: str
    parts: tuple[Part, ...]
    length: int
    first_block: int
    blocks: int
    pad: int


@dataclass(frozen=True, eq=False)
class Layout:
    """The table of all tensors and blocks.

    Args:
        rule: 1, 2 or 3.
        block_size: b, numbers a block.
        groups: In the order of the blocks.
    """

    rule: int
    block_size: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, layers: Sequence[LayerSpec], rule: int = 1, block_size: int = 256) -> Layout:
        """Lay out the tensors of adapted layers.

        Args:
            layers: In their fixed order.
            rule: How tensors are grouped.
            block_size: Numbers a block.

        Raises:
            UsageError: there is no such rule, or a block would hold nothing.
            InputError: two layers share a tensor.
        """
        if rule not in RULES:
            raise UsageError(f"--rule {rule}", expected=f"one of: {', '.join(map(str, RULES))}")
        if block_size < 1:
            raise UsageError(f"--block-size {block_size}", expected="at least 1")
        groups: list[Group] = []
        first = 0
        for name, parts in (found for layer in layers for found in _grouped(layer, rule)):
            length = sum(part.size for part in parts)
            blocks = -(-length // block_size)
            groups.append(Group(name, parts, length, first, blocks, blocks * block_size - length))
            first += blocks
        names = [part.tensor for group in groups for part in group.parts]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the tensor {twice!r} belongs to two layers", expected="each tensor once")
        return cls(rule, block_size, tuple(groups))

    @property
    def blocks(self) -> int:
        """N, the number of blocks."""
        return sum(group.blocks for group in self.groups)

    @property
    def length(self) -> int:
        """The number of weights."""
        return sum(group.length for group in self.groups)

    @property
    def padding(self) -> int:
        """The number of zeros that fill groups up."""
        return sum(group.pad for group in self.groups)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in the order of the blocks."""
        return {part.tensor: part.shape for group in self.groups for part in group.parts}

    @cached_property
    def positions(self) -> dict[str, Tensor]:
        """Where each number of a tensor lies among all N b of them, int64 (numbers of the tensor,)."""
        return {
            part.tensor: group.first_block * self.block_size + _places(part)
            for group in self.groups
            for part in group.parts
        }

    @cached_property
    def mask(self) -> Tensor:
        """Which numbers are weights and not filling, bool (N, b)."""
        return self.tensor_ids >= 0

    @cached_property
    def tensor_ids(self) -> Tensor:
        """The tensor that each number belongs to, by its place in `shapes`, int64 (N, b); -1 for filling."""
        import torch

        ids = torch.full((self.blocks * self.block_size,), -1, dtype=torch.int64)
        for index, places in enumerate(self.positions.values()):
            ids[places] = index
        return ids.reshape(self.blocks, self.block_size)

    def pack(self, lora: Mapping[str, Tensor]) -> Tensor:
        """Lay a LoRA out in blocks.

        Args:
            lora: Name to tensor, float32.

        Returns:
            float32 (N, b); filling is 0.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        return self.pack_all({name: tensor[None] for name, tensor in lora.items()})[0]

    def pack_all(self, stacked: Mapping[str, Tensor]) -> Tensor:
        """Lay several LoRAs out in blocks.

        Args:
            stacked: Name to the tensors of all of them, float32 (K, *shape).

        Returns:
            float32 (K, N, b); filling is 0.

        Raises:
            InputError: a tensor is missing or has another shape.
        """
        import torch

        self.require_fit({name: tuple(tensor.shape[1:]) for name, tensor in stacked.items()})
        first = stacked[next(iter(self.positions))]
        flat = torch.zeros(len(first), self.blocks * self.block_size, device=first.device)
        for name, places in self.positions.items():
            flat[:, places.to(first.device)] = stacked[name].detach().float().flatten(1)
        return flat.reshape(-1, self.blocks, self.block_size)

    def unpack(self, blocks: Tensor) -> dict[str, Tensor]:
        """Take the tensors of a LoRA out of its blocks, bit for bit as `pack` put them there.

        Args:
            blocks: float32 (N, b).

        Raises:
            InputError: the blocks are not those of this layout.
        """
        if tuple(blocks.shape) != (self.blocks, self.block_size):
            raise InputError(
                f"{tuple(blocks.shape)} blocks do not fit the layout", expected=f"({self.blocks}, {self.block_size})"
            )
        flat, shapes = blocks.flatten(), self.shapes
        return {
            name: flat[places.to(flat.device)].reshape(shapes[name]).contiguous()
            for name, places in self.positions.items()
        }

    def require_fit(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that a LoRA has exactly the tensors of this layout.

        Raises:
            InputError: one is missing, unknown or of another shape; the message names it.
        """
        wanted = self.shapes
        odd = sorted(set(wanted) ^ set(shapes)) or [name for name in wanted if wanted[name] != shapes[name]]
        if odd:
            name = odd[0]
            raise InputError(
                f"the LoRA's tensor {name!r} is {shapes.get(name, 'missing')}, and {len(odd)} do not fit in all",
                expected=f"{wanted.get(name, 'no such tensor')}",
                fix="take weights of the same base and of the same ranks",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values."""
        return {
            "rule": self.rule,
            "block_size": self.block_size,
            "blocks": self.blocks,
            "padding": self.padding,
            "groups": [
                {
                    "name": group.name,
                    "first_block": group.first_block,
                    "blocks": group.blocks,
                    "pad": group.pad,
                    "parts": [
                        {
                            "tensor": part.tensor,
                            "shape": list(part.shape),
                            "offset": part.offset,
                            **({"rank": part.interleaved, "stride": part.stride} if part.interleaved else {}),
                        }
                        for part in group.parts
                    ],
                }
                for group in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Layout:
        """Build it from what `to_dict` returned.

        Raises:
            InputError: it is none, or its blocks overlap or leave gaps.
        """
        try:
            size = int(values["block_size"])
            groups = tuple(_group_from(group, size) for group in values["groups"])
            layout = cls(int(values["rule"]), size, groups)
            firsts = [sum(group.blocks for group in groups[:index]) for index in range(len(groups))]
            if firsts != [group.first_block for group in groups] or layout.blocks != values["blocks"]:
                raise ValueError("blocks overlap or leave gaps")
            if any(group.pad != given["pad"] for group, given in zip(groups, values["groups"], strict=True)):
                raise ValueError("the tensors do not fill their blocks")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the layout table is damaged: {error}", fix="make the artifact again with --force"
            ) from error
        return layout


def _grouped(layer: LayerSpec, rule: int) -> list[tuple[str, tuple[Part, ...]]]:
    """Return the groups of a layer: name and tensors."""
    tensors = [(layer.name + DOWN, tuple(layer.a_shape)), (layer.name + UP, tuple(layer.b_shape))]
    norm = [(layer.norm + end, (layer.norm_size,)) for end in (SCALE, SHIFT)] if layer.norm is not None else []
    if rule == 1:
        return [(layer.name, _in_turn([*tensors, *norm]))]
    if rule == 2:
        rank = layer.a_shape[0]
        (down, a_shape), (up, b_shape) = tensors
        row, column = math.prod(a_shape) // rank, math.prod(b_shape) // rank
        pair = (Part(down, a_shape, 0, rank, row + column), Part(up, b_shape, row, rank, row + column))
        return [(layer.name, (*pair, *_in_turn(norm, rank * (row + column))))]
    parts = [(name, _in_turn([(name, shape)])) for name, shape in tensors]
    return [*parts, (str(layer.norm), _in_turn(norm))] if norm else parts


def _in_turn(tensors: Sequence[tuple[str, tuple[int, ...]]], offset: int = 0) -> tuple[Part, ...]:
    parts = []
    for name, shape in tensors:
        parts.append(Part(name, shape, offset))
        offset += parts[-1].size
    return tuple(parts)


def _places(part: Part) -> Tensor:
    """Return where the numbers of a tensor lie in its group, in the tensor's own order."""
    import torch

    if not part.interleaved:
        return part.offset + torch.arange(part.size)
    rank = part.interleaved
    run = part.size // rank
    places = part.offset + part.stride * torch.arange(rank)[:, None] + torch.arange(run)  # (r, run)
    # The rows of A belong to a rank, of B the columns.
    return places.flatten() if part.tensor.endswith(DOWN) else places.T.flatten()


def _group_from(values: Mapping[str, Any], block_size: int) -> Group:
    parts = tuple(
        Part(
            str(part["tensor"]),
            tuple(int(side) for side in part["shape"]),
            int(part["offset"]),
            int(part.get("rank", 0)),
            int(part.get("stride", 0)),
        )
        for part in values["parts"]
    )
    length, blocks = sum(part.size for part in parts), int(values["blocks"])
    return Group(str(values["name"]), parts, length, int(values["first_block"]), blocks, blocks * block_size - length)
