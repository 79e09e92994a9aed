"""The network of the `digits` extractor."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

FEATURE_DIM = 64
NUM_CLASSES = 10


class DigitsNet(nn.Module):
    """Three smooth convolutions, one hidden layer of 64 features, one linear layer to 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 2 * 2, FEATURE_DIM)
        self.classifier = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Return float32 features (B, 64) of images (B, 1, 8, 8) in [-1, 1]."""
        x = functional.silu(self.conv1(images))  # (B, 32, 8, 8)
        x = functional.avg_pool2d(functional.silu(self.conv2(x)), 2)  # (B, 32, 4, 4)
        x = functional.avg_pool2d(functional.silu(self.conv3(x)), 2)  # (B, 48, 2, 2)
        return functional.silu(self.hidden(x.flatten(1)))  # (B, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, 64) and logits (B, 10) of images (B, 1, 8, 8) in [-1, 1]."""
        features = self.features(images)
        logits: Tensor = self.classifier(features)
        return features, logits
