"""Adapted layers for tests of packing."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """A `LayerSpec`."""

    name: str
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    norm: str | None = None
    norm_size: int = 0


def conv(name: str, inputs: int, outputs: int, side: int, rank: int, norm: bool = True) -> Layer:
    shapes = (rank, inputs, side, side), (outputs, rank, 1, 1)
    return Layer(name, *shapes, f"{name}_norm" if norm else None, outputs if norm else 0)


def linear(name: str, inputs: int, outputs: int, rank: int) -> Layer:
    return Layer(name, (rank, inputs), (outputs, rank))


def e2gan(rank: int, ends: int) -> list[Layer]:
    """The 24 layers of the 7,059,971-parameter generator, with another rank at both ends of net and transformer."""
    middle = [linear(f"self.{name}", 256, 256, rank) for name in ("q", "k", "v", "out")]
    middle += [linear("cross.q", 256, 256, rank), linear("cross.k", 768, 256, rank), linear("cross.v", 768, 256, rank)]
    middle += [linear("cross.out", 256, 256, rank), linear("ff.in", 256, 2048, rank), linear("ff.out", 1024, 256, rank)]
    res = [conv(f"res{index}", 256, 256, 3, rank) for index in range(6)]
    return [
        conv("stem", 3, 64, 7, ends),
        conv("down1", 64, 128, 3, rank),
        conv("down2", 128, 256, 3, rank),
        *res[:4],
        conv("reduce", 256, 256, 3, ends),
        *middle,
        conv("enlarge", 256, 256, 3, ends),
        *res[4:],
        conv("up1", 256, 128, 3, rank),
        conv("up2", 128, 64, 3, rank),
        conv("head", 64, 3, 7, ends, norm=False),
    ]


SMALL = [conv("stem", 3, 8, 3, 2), linear("query", 16, 24, 3), conv("head", 8, 3, 7, 1, norm=False)]
