"""The `torchvision` extractor: any classifier of torchvision, with weights that the user has.

Features are what its last linear layer gets, logits what that layer gives.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError, UsageError
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.features.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CleanPreparation,
    check_weights,
    computing,
    fit,
    read_state,
    require_packages,
    uninitialised,
)
from finectl.metrics.features.weights import WITHOUT, content_digest
from finectl.registry import nearest

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

NAME = "torchvision"
EXAMPLE = "resnet50"
PAGE = "https://pytorch.org/vision/stable/models.html"
BATCH_SIZE = 32
# What torchvision's default weights of a network take; planning must know it without importing torchvision.
USUAL_SIZE = 224
SIZES = {
    "efficientnet_b1": 240,
    "efficientnet_b2": 288,
    "efficientnet_b3": 300,
    "efficientnet_b4": 380,
    "efficientnet_b5": 456,
    "efficientnet_b6": 528,
    "efficientnet_b7": 600,
    "efficientnet_v2_s": 384,
    "efficientnet_v2_m": 480,
    "efficientnet_v2_l": 480,
    "inception_v3": 299,
    "regnet_y_128gf": 384,
    "swin_v2_t": 256,
    "swin_v2_s": 256,
    "swin_v2_b": 256,
    "vit_h_14": 518,
}
HALVES = (0.5, 0.5, 0.5)
OF_HALVES = ("efficientnet_v2_l",)
# How torchvision builds a network for its own weights, where that is not how it builds it without any.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
    "vit_h_14": {"image_size": 518},
}
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def describe(options: FeatureOptions) -> ExtractorInfo:
    """Find and hash the weights, without torch.

    Raises:
        UsageError: no network is named.
        InputError: the weights, or the packages that run them, are missing or damaged.
    """
    if not options.network:
        raise UsageError(
            "--features torchvision names no network",
            expected="torchvision:NAME",
            fix=f"--features torchvision:{EXAMPLE} --features-weights FILE",
        )
    require_packages(["torchvision", "cleanfid"], f"torchvision:{options.network}")
    fix = (
        f"--features-weights FILE: a state dict of {options.network} (.pth or .safetensors), yours or one from {PAGE}; "
        f"{WITHOUT}"
    )
    if options.features_weights is None:
        raise InputError(f"torchvision:{options.network} has no weights of its own", expected="a file of them", fix=fix)
    path = Path(options.features_weights).expanduser()
    if not path.is_file():
        raise InputError(
            f"--features-weights {options.features_weights} is {'a folder' if path.is_dir() else 'not there'}", fix=fix
        )
    check_weights(path, fix)
    return ExtractorInfo(
        f"{NAME}:{options.network}",
        content_digest(path),
        f"clean bicubic {SIZES.get(options.network, USUAL_SIZE)}",
        str(path),
        {"network": options.network, "file": path.name},
    )


def load(info: ExtractorInfo, options: FeatureOptions, device: torch.device) -> TorchvisionFeatures:
    """Build the network and read its weights.

    Raises:
        UsageError: torchvision has no classifier of that name.
        InputError: it does not end in a linear layer, or the weights do not fit.
    """
    name, path = str(info.details["network"]), Path(info.path)
    network, last = build(name, read_state(path), path)
    return TorchvisionFeatures(info, network.to(device), last, device, options.dtype)


def build(name: str, state: dict[str, Tensor], where: Path) -> tuple[nn.Module, nn.Linear]:
    """Return a network of torchvision with weights, and its last linear layer.

    Args:
        name: As torchvision calls it.
        state: Its state dict; the number of classes is that of the last layer.
        where: Where the state is, for messages.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UsageError(
            f"torchvision has no classifier {name!r}{nearest(name, known)}", expected=f"one of: {', '.join(known)}"
        )
    state = {OLD_DENSENET.sub(r"\1\2.", key): tensor for key, tensor in state.items()}
    with uninitialised():
        network = models.get_model(name, weights=None, **ARGUMENTS.get(name, {}))
    key, last = _last_linear(network, name)
    weight = state.get(f"{key}.weight")
    if weight is not None and weight.ndim == 2 and len(weight) not in (0, last.out_features):
        with uninitialised():
            network = models.get_model(name, weights=None, num_classes=len(weight), **ARGUMENTS.get(name, {}))
        key, last = _last_linear(network, name)
    fit(network, state, where, f"torchvision's {name}")
    return network.float().eval().requires_grad_(False), last


def _last_linear(network: nn.Module, name: str) -> tuple[str, nn.Linear]:
    """Return the name and the layer; torchvision defines layers in the order in which they are used."""
    from torch import nn

    found = [(key, module) for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not found:
        raise InputError(
            f"{name} does not end in a linear layer, whose input would be the features",
            expected="a classifier that does",
            fix=f"--features torchvision:{EXAMPLE}",
        )
    return found[-1]


class TorchvisionFeatures:
    """The network with its preparation of images; see `Extractor`.

    Args:
        info: What `describe` found.
        network: The network, on the device.
        last: Its last linear layer.
        device: Where it is.
        dtype: "float32" or "bfloat16".
    """

    batch_size = BATCH_SIZE

    def __init__(
        self, info: ExtractorInfo, network: nn.Module, last: nn.Linear, device: torch.device, dtype: str
    ) -> None:
        name = str(info.details["network"])
        size = SIZES.get(name, USUAL_SIZE)
        mean, std = (HALVES, HALVES) if name in OF_HALVES else (IMAGENET_MEAN, IMAGENET_STD)
        self.info = info
        self.outputs: Mapping[str, int] = {"features": last.in_features, "logits": last.out_features}
        self.prepare_clean = CleanPreparation(size, size, mean, std)
        self._network, self._last = network, last
        self._device, self._dtype = device, dtype

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image (H, W, 1 or 3) as float32 (3, size, size)."""
        return self.prepare_clean(image)

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return "features" and "logits" that are wanted, float32, of prepared images (B, 3, size, size)."""
        seen: list[Tensor] = []
        hook = self._last.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        try:
            with computing(self._device, self._dtype):
                logits = self._network(batch.to(self._device))
        finally:
            hook.remove()
        found = {"features": seen[-1], "logits": logits}
        return {name: found[name].float().cpu() for name in wanted}
