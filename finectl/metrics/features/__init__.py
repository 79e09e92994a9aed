"""Feature extractors: what a distance between sets of images is measured in. One file an extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    import torch

EXTRACTORS = Registry(
    "feature extractor",
    {
        "digits": Entry("finectl.metrics.features.digits:DigitsFeatures", "small classifier of 8x8 digits, bundled"),
    },
)


class Extractor(Protocol):
    """What every entry of `EXTRACTORS` offers once its `load()` has been called."""

    NAME: str
    dim: int
    digest: str

    def extract(self, images: torch.Tensor, batch_size: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features float32 (N, dim) and logits float32 (N, classes) of images (N, C, H, W) in [-1, 1]."""
        ...
