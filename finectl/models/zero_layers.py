"""torch's layers, starting at zero, so that building a model draws no random numbers."""

from __future__ import annotations

from torch import nn


class ZeroLinear(nn.Linear):
    """A linear layer that is zero until `load_state_dict`."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroConv2d(nn.Conv2d):
    """A convolution that is zero until `load_state_dict`."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ZeroEmbedding(nn.Embedding):
    """A table that is zero until `load_state_dict`."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
