"""Task vectors read stretch by stretch: their norms, quantiles and inner products, by block and by kind of layer.

Memory does not depend on the models' size. Quantiles of |tau| come out of a histogram over the upper 16 bits of
float32, whose bins are 2^-7 of their value wide; norms and inner products are added up in float64.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finectl.artifacts.merging.numbers import Array, byte_count, decode
from finectl.artifacts.merging.sources import Extended, Source, TensorFile, check_same
from finectl.errors import ComputationError
from finectl.models.parts import UNET_PREFIX, Parts, block_of, missing_projections

CHUNK = 1 << 20
BINS = 1 << 15
"""The sign of |tau| is 0, which leaves 15 of the upper 16 bits."""
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
# From the input of a network to its output.
ORDER = (
    "x_embedder", "t_embedder", "y_embedder", "conv_in", "time_embedding", "class_embedding", "blocks",
    "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out", "final_layer", "projections",
)  # fmt: skip
STACKS = ("blocks", "down_blocks", "mid_block", "up_blocks")
PROJECTIONS = "projections"


@dataclass
class Sums:
    """What is added up over a group of parameters.

    Args:
        gram: (n, n), float64, inner products of the task vectors.
        histogram: (n, bins), int64, of |tau|.
        base: Sum of the squares of theta_0.
        parameters: Their number.
    """

    gram: Array
    histogram: Array
    base: float = 0.0
    parameters: int = 0

    @classmethod
    def zero(cls, count: int) -> Sums:
        return cls(np.zeros((count, count)), np.zeros((count, BINS), np.int64))

    def norms(self) -> list[float]:
        """Return |tau| of each model."""
        return [math.sqrt(max(value, 0.0)) for value in np.diagonal(self.gram).tolist()]

    def relative(self) -> list[float | None]:
        """Return |tau| / |theta_0| of each model; None where theta_0 is 0."""
        return [norm / math.sqrt(self.base) if self.base else None for norm in self.norms()]

    def cosines(self) -> list[list[float]]:
        """Return the cosines of all pairs of task vectors; 0 beside one that is 0."""
        norms = self.norms()
        return [
            [
                min(1.0, max(-1.0, value / (norms[i] * norms[j]))) if norms[i] * norms[j] > 0 else 0.0
                for j, value in enumerate(row)
            ]
            for i, row in enumerate(self.gram.tolist())
        ]

    def quantiles(self) -> list[list[float]]:
        """Return the quantiles of |tau| at `SHARES`, of each model, to half a bin."""
        found = []
        for row in self.histogram:
            reached = np.cumsum(row)
            places = [int(np.searchsorted(reached, share * max(self.parameters, 1))) for share in SHARES]
            found.append([_middle(min(place, BINS - 1)) for place in places])
        return found

    def described(self) -> dict[str, Any]:
        """Return the norms of the group as JSON."""
        return {
            "parameters": self.parameters,
            "theta_0": math.sqrt(self.base),
            "norms": self.norms(),
            "relative": self.relative(),
            "quantiles": self.quantiles(),
        }


@dataclass
class Vectors:
    """What was added up over all parameters, over each block, and over each kind of layer."""

    whole: Sums
    blocks: dict[str, Sums] = field(default_factory=dict)
    layers: dict[str, Sums] = field(default_factory=dict)


def read_vectors(
    parts: Parts,
    *,
    further: Sequence[Path] = (),
    check: Callable[[], None],
    progress: Callable[[int], None] = lambda count: None,
) -> Vectors:
    """Read theta_0 and all models once.

    Args:
        parts: The models around their base.
        further: Files of models that are no part of it, such as a merged one; they come after its own.
        check: Called between stretches; it ends the work by raising.
        progress: Called with the number of parameters read since the last time.

    Raises:
        InputError: a file is damaged, or does not fit the others.
        ComputationError: a value is not finite.
    """
    if parts.base is None:
        raise ValueError("task vectors without theta_0")
    paths = [*parts.files, *further]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(contextlib.closing(TensorFile(path))) for path in paths]
        theta_0 = stack.enter_context(contextlib.closing(TensorFile(parts.base)))
        base = Extended(theta_0, missing_projections(parts.config), files[0].entries)
        for file in files:
            check_same(base, file)
        found = Vectors(Sums.zero(len(files)))
        for name, entry in base.entries.items():
            if not entry.is_float:
                continue
            block, layer = block_of(name), layer_of(name)
            groups = (
                found.whole,
                found.blocks.setdefault(block, Sums.zero(len(files))),
                found.layers.setdefault(layer, Sums.zero(len(files))),
            )
            for first in range(0, entry.count, CHUNK):
                check()
                count = min(CHUNK, entry.count - first)
                origin = _read(base, name, first, count)
                vectors = np.stack([_read(file, name, first, count) - origin for file in files])  # (n, count)
                if not np.isfinite(vectors).all():
                    culprit = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                    raise ComputationError(f"{name} of {paths[culprit]}, or of its base, is not finite")
                _add(groups, origin, vectors)
                progress(count)
    return found


def layer_of(name: str) -> str:
    """Return what kind of layer a parameter is of: `attn.qkv`, `resnets.conv1`, whatever block it is in."""
    parts = [part for part in name.removeprefix(UNET_PREFIX).split(".")[:-1] if not part.isdecimal()]
    if parts[:1] == [PROJECTIONS]:
        return PROJECTIONS
    inside = parts[1:] if parts[:1] and parts[0] in STACKS else parts
    return ".".join(inside or [name])


def in_order(name: str) -> tuple[int, int, str]:
    """Return a key that sorts blocks and layers from the network's input to its output."""
    head, _, number = name.partition(".")
    rank = ORDER.index(head) if head in ORDER else ORDER.index("blocks")  # kinds of layers inside of blocks
    return rank, int(number) if number.isdecimal() else 0, name


def _read(source: Source, name: str, first: int, count: int) -> Array:
    """Return a stretch of a tensor, (count,), float64."""
    code = source.entries[name].code
    raw = np.empty(byte_count(code, count), np.uint8)
    source.read(name, first, raw)
    values = np.empty(count, np.float64)
    decode(raw, code, values)
    return values


def _add(groups: Sequence[Sums], origin: Array, vectors: Array) -> None:
    """Add a stretch, theta_0 (count,) and the task vectors (n, count), to the sums of its groups."""
    gram, squares = vectors @ vectors.T, float(origin @ origin)
    bits = np.abs(vectors).astype(np.float32).view(np.uint32) >> np.uint32(16)
    counts = np.stack([np.bincount(row, minlength=BINS) for row in bits])  # (n, bins)
    for sums in groups:
        sums.gram += gram
        sums.base += squares
        sums.parameters += origin.size
        sums.histogram += counts


def _middle(place: int) -> float:
    """Return the value in the middle of a bin; that of the lowest, of 0, is 0."""
    return float(np.uint32((place << 16) | 0x8000).view(np.float32)) if place else 0.0
