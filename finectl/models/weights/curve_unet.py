"""The network of `unet` for blocks at any depth: what it keeps for a block is interpolated between knots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finectl.models.weights.config import WeightUNetConfig
from finectl.models.weights.unet import WeightUNet, sinusoid


class CurveUNet(WeightUNet):
    """A `WeightUNet` whose tables hold knots, and whose blocks are mixtures of them.

    Args:
        config: Its numbers; `blocks` are the knots: all rows of a grid, of each block of a layer.
        mix: (layers, P), what each row of the grid counts in each layer of the models at hand; see `Grid.mix`.
    """

    mix: Tensor

    def __init__(self, config: WeightUNetConfig, mix: Tensor) -> None:
        super().__init__(config)
        self.register_buffer("mix", mix, persistent=False)

    def at(self, mix: Tensor) -> CurveUNet:
        """Let it work on models of other depths, and return it."""
        self.mix = mix.to(self.mix.device)
        return self

    @property
    def kinds(self) -> int:
        """Blocks of one layer."""
        return self.config.blocks // self.mix.shape[1]

    @property
    def places(self) -> int:
        """See `WeightUNet.places`."""
        return self.mix.shape[0] * self.kinds

    def embed_index(self, n: Tensor) -> Tensor:
        """See `WeightUNet.embed_index`."""
        knots = torch.arange(self.config.blocks, device=n.device)
        embedding = self.index(sinusoid(knots, self.config.channels[0]))  # (P kinds, width)
        if self.index_table is not None:
            embedding = embedding + self.index_table.weight
        return self._mixed(embedding, n)

    def rows_of(self, table: nn.Embedding, n: Tensor) -> Tensor:
        """See `WeightUNet.rows_of`."""
        return self._mixed(table.weight, n)

    def _mixed(self, knots: Tensor, n: Tensor) -> Tensor:
        """Return the mixture of each block, (M, width), of what the knots hold, (P kinds, width)."""
        by_kind = knots.unflatten(0, (-1, self.kinds))  # (P, kinds, width)
        every = torch.einsum("lp,pkw->lkw", self.mix, by_kind).flatten(0, 1)  # (places, width)
        return every[n]
