"""Feature extractors: the networks in whose features sets of images are compared. One file an extractor.

An extractor's module defines `describe(options) -> ExtractorInfo`, without torch, which finds and hashes its weights
while a run is planned, and `load(info, options, device) -> Extractor`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from finectl.errors import UsageError
from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

DIGITS, TORCHVISION = "digits", "torchvision"
EXTRACTORS = Registry(
    "feature extractor",
    {
        "digits": Entry("finectl.metrics.features.digits", "small classifier of 8x8 digits, bundled"),
        "inception": Entry("finectl.metrics.features.inception", "Inception v3 of 2015, as FID has it"),
        "clip": Entry("finectl.metrics.features.clip", "a CLIP model of open_clip"),
        "dinov2": Entry("finectl.metrics.features.dinov2", "DINOv2 ViT-L/14"),
        "torchvision": Entry("finectl.metrics.features.torchvision", "a classifier of torchvision, with your weights"),
    },
)


@dataclass(frozen=True)
class FeatureOptions:
    """What the user says of extractors; None for the usual file in the cache.

    Args:
        inception: File of the Inception network.
        clip: Folder, file or hub id of the CLIP model.
        dino: File of the DINOv2 network.
        network: Name of torchvision's model.
        features_weights: File of that model's weights.
        resize_mode: How images reach Inception: "clean" (PIL's bicubic filter) or "legacy_tensorflow".
        dtype: Arithmetic of the networks: "float32" or "bfloat16".
    """

    inception: str | None = None
    clip: str | None = None
    dino: str | None = None
    network: str = ""
    features_weights: str | None = None
    resize_mode: str = "clean"
    dtype: str = "float32"

    @classmethod
    def of(cls, config: Any) -> FeatureOptions:
        """Return what a stage's options say of the networks; those that it does not have are as usual.

        Raises:
            UsageError: `--features` names none, or comes without weights.
        """
        kind, _, network = (config.features or DIGITS).partition(":")
        if kind not in (DIGITS, TORCHVISION) or (kind == TORCHVISION) != bool(network):
            raise UsageError(f"--features {config.features!r}", expected=f"{DIGITS}, or {TORCHVISION}:NAME")
        if kind == TORCHVISION and config.features_weights is None:
            raise UsageError(
                f"--features {config.features} comes without weights",
                expected="the file of them: --features-weights FILE",
            )
        return cls(
            inception=config.inception,
            clip=getattr(config, "clip", None),
            dino=config.dino,
            network=network,
            features_weights=config.features_weights,
            resize_mode=getattr(config, "fid_mode", "clean"),
            dtype=getattr(config, "features_dtype", "float32"),
        )


@dataclass(frozen=True)
class ExtractorInfo:
    """An extractor as far as it decides values, known before it is loaded.

    Args:
        name: Key of `EXTRACTORS`; torchvision's with the model's name, "torchvision:resnet18".
        digest: sha256 (hex) of the weights.
        resize: How an image reaches the network, such as "clean bicubic 299".
        path: Where the weights are.
        details: What else `load` wants to know, in plain JSON.
    """

    name: str
    digest: str
    resize: str
    path: str
    details: dict[str, Any] = field(default_factory=dict)


class Extractor(Protocol):
    """A loaded network.

    Attributes:
        info: What it is.
        batch_size: Images computed at once. It is the extractor's own and no option, so that rounding depends on
            nothing else; a short batch is padded.
        outputs: Name and width of what `forward` can give.
    """

    info: ExtractorInfo
    batch_size: int
    outputs: Mapping[str, int]

    def prepare(self, image: npt.NDArray[np.uint8]) -> Tensor:
        """Return an image as `forward` takes it, on the CPU; several threads may call this at once.

        Args:
            image: (H, W, C), C 1 or 3, of any size.
        """
        ...

    def forward(self, batch: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Return the outputs that are wanted of prepared images (batch_size, ...), each float32 (batch_size, width)."""
        ...
