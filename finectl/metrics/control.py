"""How far the control of generated images is from the one that was asked for: one number an image, 0 for the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from finectl.data.controls import ACCURACY, MSE, SSIM

WINDOW = 7


def squared_error(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the mean squared difference of maps, uint8 (B, c, H, W), in units of their range: (B,) float64 in [0, 1].

    Args:
        wanted: Those that were asked for.
        found: Those of the generated images.
    """
    return ((wanted.double() - found.double()) / 255).square().flatten(1).mean(1)


def structural(wanted: Tensor, found: Tensor) -> Tensor:
    """Return (1 - SSIM) / 2 of maps, uint8 (B, c, H, W): (B,) float64 in [0, 1], with scikit-image's SSIM.

    The window is 7 pixels wide, less where the maps are smaller. Of maps that are black all over SSIM is 1.

    Reference: Wang et al., Image quality assessment, IEEE TIP 13 (2004).
    """
    from skimage.metrics import structural_similarity

    side = min(*wanted.shape[-2:], WINDOW)
    window = side - (side % 2 == 0)
    similarity = [
        structural_similarity(one.numpy(), other.numpy(), win_size=window, data_range=255, channel_axis=0)
        for one, other in zip(wanted, found, strict=True)
    ]
    return (1 - torch.tensor(similarity, dtype=torch.float64)) / 2


def disagreement(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the share of pixels whose class is another one, of maps of colours, uint8 (B, 3, H, W): (B,) float64."""
    return (wanted != found).any(1).double().flatten(1).mean(1)


DISSIMILARITIES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    MSE: squared_error,
    SSIM: structural,
    ACCURACY: disagreement,
}
