"""Weights of single blocks in a merge (`--block-weights`). No torch."""

from __future__ import annotations

from finectl.artifacts.tensors import tensor_shapes
from finectl.errors import UsageError
from finectl.models.parts import Parts, block_of
from finectl.registry import nearest
from finectl.stages.merge.config import Config, parse_block_weights


def tensor_weights(config: Config, parts: Parts) -> dict[str, tuple[float, ...]]:
    """Return the weights of the tensors whose block has its own (`--block-weights`).

    Raises:
        UsageError: there is no such block.
    """
    given = parse_block_weights(config.block_weights, parts.count)
    names = list(tensor_shapes(parts.files[0]))
    blocks = dict.fromkeys(map(block_of, names))
    for block in given:
        if block not in blocks:
            raise UsageError(
                f"--block-weights: there is no block {block!r}{nearest(block, list(blocks))}",
                expected=f"some of: {', '.join(blocks)}",
            )
    return {name: given[block_of(name)] for name in names if block_of(name) in given}
