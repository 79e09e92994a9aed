"""The `digits` extractor: a small convolutional classifier of 8x8 digits whose last hidden layer is the feature.

Its weights are in `digits.safetensors` beside this file; `train_digits.py` makes them from the digits' training split.
Distances in these features compare digits with digits and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_file
from finectl.errors import InputError
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.features.networks import computing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from finectl.metrics.features.digits_network import DigitsNet

NAME = "digits"
WEIGHTS = Path(__file__).with_name("digits.safetensors")
METADATA_KEY = "finectl"
IMAGE_SHAPE = (8, 8, 1)
BATCH_SIZE = 512


def describe(options: FeatureOptions, path: Path = WEIGHTS) -> ExtractorInfo:
    """Hash the weights, without torch.

    Args:
        options: None of them matters here: the arithmetic is float32.
        path: A file that `train_digits` wrote; by default the one in the package.

    Raises:
        InputError: the file is missing.
    """
    try:
        return ExtractorInfo(NAME, sha256_file(path), "none", str(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def load(info: ExtractorInfo, options: FeatureOptions, device: torch.device) -> DigitsFeatures:
    """Load the network.

    Args:
        info: What `describe` returned.
        options: As for `describe`.
        device: Where to compute.

    Raises:
        InputError: the file is damaged or of another network.
    """
    from safetensors import SafetensorError, safe_open

    from finectl.metrics.features.digits_network import DigitsNet

    net = DigitsNet()
    try:
        with safe_open(info.path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise _unreadable(Path(info.path), error) from error
    return DigitsFeatures(info, net.to(device), metadata)


class DigitsFeatures:
    """The trained extractor; see `Extractor`.

    Args:
        info: What `describe` returned.
        net: A trained network.
        metadata: What the weights' file says about its training: held-out accuracy, data fingerprint, seed, command.
    """

    batch_size = BATCH_SIZE

    def __init__(self, info: ExtractorInfo, net: DigitsNet, metadata: dict[str, Any]) -> None:
        from finectl.metrics.features.digits_network import FEATURE_DIM, NUM_CLASSES

        self.info = info
        self.metadata = metadata
        self.outputs = {"features": FEATURE_DIM, "logits": NUM_CLASSES}
        self._net = net.eval().requires_grad_(False)

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return a grey image (8, 8, 1) as float32 (1, 8, 8) in [-1, 1].

        Raises:
            InputError: the image has another shape.
        """
        import torch

        if image.shape != IMAGE_SHAPE:
            raise InputError(
                f"the digits extractor got an image of shape {image.shape}",
                expected="shape (8, 8, 1): grey images of 8x8 pixels",
                fix="choose an extractor made for these images",
            )
        return torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 127.5 - 1

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return what is wanted of prepared images (batch_size, 1, 8, 8), float32 on the CPU."""
        device = self._net.hidden.weight.device
        with computing(device, "float32"):
            found = dict(zip(self.outputs, self._net(batch.to(device)), strict=True))
        # Copies made outside inference mode are ordinary tensors.
        return {name: found[name].to("cpu", copy=True) for name in self.outputs if name in wanted}


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"the digits extractor's weights {path} cannot be read: {error}",
        fix=f"python -m finectl.metrics.features.train_digits --out {path}",
    )
