"""Means over pairs of an edited image and its target: L1, PSNR and SSIM.

The values of single pairs are those of `finectl.metrics.paired`, which rounds to levels as files do; L1 alone is taken
of the images as they are, in the units in which the generators are trained.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from finectl.data.images import to_uint8
from finectl.errors import InputError
from finectl.metrics import paired
from finectl.metrics.measured import Measured

NAMES = ("l1", "psnr", "ssim")
"""Without what is installed on its own and may be missing: `available_names`."""


def available_names(image_size: int) -> tuple[str, ...]:
    """Return the paired metrics that can be measured here: SSIM needs torchmetrics and 11 pixels a side."""
    possible = image_size >= paired.SSIM_WINDOW and importlib.util.find_spec("torchmetrics") is not None
    return NAMES if possible else NAMES[:-1]


def l1(images: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute difference of each pair.

    Args:
        images: float (B, C, H, W) in [-1, 1].
        targets: The same shape and range.

    Returns:
        float64 (B,), 0 to 2, on the CPU.

    Raises:
        InputError: the shapes differ.
    """
    _require_same(images, targets)
    return (images.double() - targets.double()).abs().mean(dim=(1, 2, 3)).cpu()


def paired_means(images: Tensor, targets: Tensor, names: Sequence[str] = NAMES) -> dict[str, Measured]:
    """Return the mean over all pairs of each metric, with its interval.

    Args:
        images: float (N, C, H, W) in [-1, 1], N at least 1.
        targets: The same shape and range.
        names: Of `NAMES`.

    Returns:
        By name: L1 in units of [-1, 1], PSNR in dB, SSIM at most 1; of PSNR see `finectl.metrics.paired`.

    Raises:
        InputError: the shapes differ, or torchmetrics is missing.
    """
    _require_same(images, targets)
    found = {}
    levels = (to_uint8(images), to_uint8(targets)) if set(names) - {"l1"} else ()
    for name in names:
        values = l1(images, targets) if name == "l1" else paired.measure_pairs(name, *levels)
        found[name] = paired.summarize_pairs(name, values)
    return found


def _require_same(images: Tensor, targets: Tensor) -> None:
    if images.shape != targets.shape or images.ndim != 4 or not len(images):
        raise InputError(
            f"pairs of shapes {tuple(images.shape)} and {tuple(targets.shape)}", expected="one shape (N, C, H, W)"
        )
    if not (torch.is_floating_point(images) and torch.is_floating_point(targets)):
        raise InputError(f"pairs of {images.dtype} and {targets.dtype}", expected="float images in [-1, 1]")
