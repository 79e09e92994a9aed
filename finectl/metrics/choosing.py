"""Choosing between images by how well each agrees with a prompt.

Reference: Hessel et al., arXiv 2104.08718, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finectl.metrics.features import FeatureOptions
from finectl.metrics.features.clip import describe, load

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.metrics.features.clip import ClipFeatures


@dataclass(frozen=True, eq=False)
class ClipChooser:
    """A CLIP model that chooses."""

    features: ClipFeatures

    @classmethod
    def of(cls, clip: str | None, device: torch.device) -> ClipChooser:
        """Read the model.

        Args:
            clip: What `--clip` names; None for the usual one.
            device: Where it runs.

        Raises:
            UsageError, InputError: it cannot be read.
        """
        options = FeatureOptions(clip=clip)
        return cls(load(describe(options), options, device))

    def scores(self, images: Tensor, prompt: str) -> Tensor:
        """Return the cosine between a prompt and each image, (B,), for images uint8 (B, 3, H, W)."""
        import torch
        from torch.nn.functional import cosine_similarity

        text = self.features.encode_text([prompt])  # (1, d)
        prepared = torch.stack([self.features.prepare(image.permute(1, 2, 0).numpy()) for image in images])
        return cosine_similarity(self.features.forward(prepared, ("features",))["features"], text)

    def best(self, candidates: Sequence[Tensor], prompt: str) -> Tensor:
        """Return, of several batches of the same images, each image where it agrees best with the prompt.

        Args:
            candidates: At least one batch, uint8 (B, 3, H, W) each.
            prompt: The prompt.

        Returns:
            uint8 (B, 3, H, W).
        """
        import torch

        best = torch.stack([self.scores(images, prompt) for images in candidates]).argmax(dim=0)  # (B,)
        return torch.stack(list(candidates))[best, torch.arange(len(best))]
