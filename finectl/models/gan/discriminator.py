"""The PatchGAN discriminator: it judges overlapping patches of an image beside its source.

Reference: arXiv 1611.07004, section 3.2.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from finectl.models.gan.config import CHANNELS, PATCH_KERNEL, DiscriminatorConfig
from finectl.models.gan.generator import make_norm

SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Strided convolutions, then one more and the verdict; the sizes are those of the configuration.

    Args:
        config: Its sizes.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        inputs = 2 * CHANNELS
        for n, outputs in enumerate(config.widths()):
            stride = 2 if n < config.strided else 1
            self.add_module(f"conv{n + 1}", nn.Conv2d(inputs, outputs, PATCH_KERNEL, stride, padding=1))
            if n:
                self.add_module(f"norm{n + 1}", make_norm(config.norm, outputs))
            inputs = outputs
        self.add_module(f"conv{config.strided + 2}", nn.Conv2d(inputs, 1, PATCH_KERNEL, 1, padding=1))

    def forward(self, pair: Tensor) -> Tensor:
        """Judge pairs.

        Args:
            pair: Source and image, float (B, 6, H, W) in [-1, 1].

        Returns:
            Logits of the patches being real, float (B, 1, h, w).
        """
        x = pair
        for n in range(self.config.strided + 1):
            x = self.get_submodule(f"conv{n + 1}")(x)
            x = F.leaky_relu(self.get_submodule(f"norm{n + 1}")(x) if n else x, SLOPE)
        verdict: Tensor = self.get_submodule(f"conv{self.config.strided + 2}")(x)
        return verdict
