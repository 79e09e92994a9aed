"""What the controls made of lines have in common: grey levels, and the library that finds lines in them."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from finectl.errors import InputError

GREY = (0.299, 0.587, 0.114)
"""Of red, green and blue: ITU-R BT.601, as in PIL's conversion."""


def require_skimage(control: str) -> None:
    """Check that scikit-image is installed.

    Raises:
        InputError: it is not.
    """
    if importlib.util.find_spec("skimage") is None:
        raise InputError(
            f"scikit-image, which measures --control {control}, is not installed", fix="pip install 'finectl[photos]'"
        )


def to_grey(images: Tensor) -> Tensor:
    """Return images uint8 (B, C, H, W), grey or RGB, as float64 (B, H, W) in [0, 1]."""
    levels = images.double() / 255
    if levels.shape[1] != 3:
        return levels[:, 0]
    weights = torch.tensor(GREY, dtype=torch.float64)
    return (levels * weights[:, None, None]).sum(1)
