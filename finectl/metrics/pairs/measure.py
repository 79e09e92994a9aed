"""All that is measured of one generator on the held-out pairs of one concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finectl.errors import InputError
from finectl.metrics.features import ExtractorInfo, FeatureOptions
from finectl.metrics.frechet import frechet
from finectl.metrics.gaussian import Gaussian
from finectl.metrics.pairs.fd_rand import fd_rand
from finectl.metrics.pairs.names import CLEAN_FID, FD_RAND
from finectl.metrics.pairs.paired import available_names, paired_means


def metrics_for(count: int, image_size: int, inception: ExtractorInfo | None) -> tuple[str, ...]:
    """Return what can be measured of so many pairs of images of this size."""
    names = available_names(image_size)
    if count >= 8:
        names = (*names, FD_RAND)
    return names if inception is None else (*names, CLEAN_FID)


@dataclass
class PairMeter:
    """Measures generated images against the targets of a concept.

    Args:
        names: Of `metrics_for`.
        inception: The network of `clean_fid`, if that is among them.
        device: Where that network runs.
    """

    names: Sequence[str]
    inception: ExtractorInfo | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _network: Any = None

    def measure(self, images: Tensor, targets: Tensor) -> dict[str, dict[str, Any]]:
        """Return what was measured, as metrics.json keeps it.

        Args:
            images: float (N, 3, H, W) in [-1, 1].
            targets: The same shape and range.
        """
        found = paired_means(images, targets, [name for name in self.names if name in ("l1", "psnr", "ssim")])
        if FD_RAND in self.names:
            found[FD_RAND] = fd_rand(images, targets)
        if CLEAN_FID in self.names:
            reference = Gaussian.of(self._features(targets))
            found[CLEAN_FID] = frechet(self._features(images), reference)
        return {name: found[name].record() for name in self.names}

    def _features(self, images: Tensor) -> Tensor:
        """Return Inception's features (N, 2048) of images in [-1, 1]."""
        from finectl.data.images import to_uint8
        from finectl.metrics.features.inception import load

        if self.inception is None:
            raise InputError(f"{CLEAN_FID} needs the Inception network", fix="--inception FILE")
        if self._network is None:
            self._network = load(self.inception, FeatureOptions(resize_mode="clean"), self.device)
        network = self._network
        arrays = to_uint8(images.cpu()).permute(0, 2, 3, 1).contiguous().numpy()
        rows = []
        for start in range(0, len(arrays), network.batch_size):
            batch = torch.stack([network.prepare(image) for image in arrays[start : start + network.batch_size]])
            short = network.batch_size - len(batch)
            padded = torch.cat([batch, batch[:1].expand(short, *batch.shape[1:])]) if short else batch
            rows.append(network.forward(padded, ("features",))["features"][: len(batch)])
        return torch.cat(rows)
