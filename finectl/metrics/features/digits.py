"""The `digits` extractor: a small convolutional classifier of 8x8 digits whose last hidden layer is the feature.

Its weights are in `digits.safetensors` beside this file; `train_digits.py` makes them from the digits' training split.
Distances in these features compare digits with digits and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn import functional

from finectl.errors import InputError, UsageError

WEIGHTS = Path(__file__).with_name("digits.safetensors")
IMAGE_SHAPE = (1, 8, 8)
FEATURE_DIM = 64
METADATA_KEY = "finectl"
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

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 features (B, 64) of images (B, 1, 8, 8) in [-1, 1]."""
        x = functional.silu(self.conv1(images))  # (B, 32, 8, 8)
        x = functional.avg_pool2d(functional.silu(self.conv2(x)), 2)  # (B, 32, 4, 4)
        x = functional.avg_pool2d(functional.silu(self.conv3(x)), 2)  # (B, 48, 2, 2)
        return functional.silu(self.hidden(x.flatten(1)))  # (B, 64)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (B, 64) and logits (B, 10) of images (B, 1, 8, 8) in [-1, 1]."""
        features = self.features(images)
        logits: torch.Tensor = self.classifier(features)
        return features, logits


class DigitsFeatures:
    """The trained extractor.

    Args:
        net: A trained network.
        digest: sha256 (hex) of the weights' file.
        metadata: What the weights' file says about its training: held-out accuracy, data fingerprint, seed, command.
    """

    NAME = "digits"
    dim = FEATURE_DIM

    def __init__(self, net: DigitsNet, digest: str, metadata: dict[str, Any]) -> None:
        self._net = net.eval().requires_grad_(False)
        self.digest = digest
        self.metadata = metadata

    @classmethod
    def load(cls, path: Path = WEIGHTS, device: str | torch.device = "cpu") -> DigitsFeatures:
        """Read the weights.

        Args:
            path: A file that `train_digits` wrote; by default the one in the package.
            device: Where to compute.

        Raises:
            InputError: the file is missing, damaged, or of another network.
        """
        net = DigitsNet()
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
                net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise InputError(
                f"the digits extractor's weights {path} cannot be read: {error}",
                fix=f"python -m finectl.metrics.features.train_digits --out {path}",
            ) from error
        return cls(net.to(device), digest, metadata)

    def extract(self, images: torch.Tensor, batch_size: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute features and logits in one pass.

        Args:
            images: float (N, 1, 8, 8) in [-1, 1], on any device.
            batch_size: Images a forward pass, at least 1; it changes memory, and results by rounding only.

        Returns:
            Features float32 (N, 64) and logits float32 (N, 10), on the CPU.

        Raises:
            InputError: the images have another shape.
            UsageError: `batch_size` is below 1.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise InputError(
                f"the digits extractor got images of shape {tuple(images.shape)}",
                expected="shape (N, 1, 8, 8): grey images of 8x8 pixels",
                fix="choose an extractor made for these images",
            )
        if batch_size < 1:
            raise UsageError(f"batch size {batch_size}", expected="at least 1")
        device = next(self._net.parameters()).device
        features, logits = [torch.empty(0, FEATURE_DIM)], [torch.empty(0, NUM_CLASSES)]
        with torch.inference_mode():
            for batch in torch.split(images, batch_size):
                batch_features, batch_logits = self._net(batch.to(device, torch.float32))
                features.append(batch_features.cpu())
                logits.append(batch_logits.cpu())
        # Copies made outside inference mode are ordinary tensors.
        return torch.cat(features), torch.cat(logits)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 features (N, 64) of images (N, 1, 8, 8) in [-1, 1]."""
        return self.extract(images)[0]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 logits (N, 10) of images (N, 1, 8, 8) in [-1, 1]."""
        return self.extract(images)[1]
