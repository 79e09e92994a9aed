"""`fd_rand`: the Frechet distance in the features of a small random convolutional network that never changes.

It needs no file and is made for a hundred small images: the features are few, at most half as many as there are images,
so that their covariance is no guess. It is no FID, is never called so, and compares with nothing but itself at the same
number of images and features.
"""

from __future__ import annotations

import hashlib
import itertools
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from finectl.diffusion.random import generator_for
from finectl.errors import InputError
from finectl.metrics.frechet import frechet
from finectl.metrics.gaussian import Gaussian
from finectl.metrics.measured import Measured
from finectl.metrics.pairs.names import FD_RAND as NAME

VERSION = 1
WIDTHS = (3, 16, 32)
KERNEL = 3
MOST_FEATURES = 64
LEAST_FEATURES = 4
CHUNK = 64


def features_for(images: int) -> int:
    """Return how many features a set of so many images is compared in: a power of 2, at most half as many, up to 64.

    Raises:
        InputError: there are fewer than 8 images.
    """
    if images < 2 * LEAST_FEATURES:
        raise InputError(
            f"{NAME} of {images} images",
            expected=f"at least {2 * LEAST_FEATURES}, twice its smallest number of features",
        )
    dim = MOST_FEATURES
    while dim > images // 2:
        dim //= 2
    return dim


@lru_cache(maxsize=4)
def kernels(dim: int) -> tuple[Tensor, ...]:
    """Return the network's kernels: normal, of variance 2 / inputs, always the same.

    Args:
        dim: Features.

    Returns:
        Three of float32 (out, in, 3, 3).
    """
    widths = (*WIDTHS, dim)
    made = []
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        shape = (outputs, inputs, KERNEL, KERNEL)
        drawn = torch.randn(shape, generator=generator_for(NAME, VERSION, dim, layer))
        made.append(drawn * (2 / (inputs * KERNEL**2)) ** 0.5)
    return tuple(made)


def digest(dim: int) -> str:
    """Return the sha256 (hex) of the network, which tells apart what its numbers were drawn to be."""
    found = hashlib.sha256()
    for kernel in kernels(dim):
        found.update(kernel.numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def random_features(images: Tensor, dim: int) -> Tensor:
    """Return the features of images: three strided convolutions with ReLU between them, averaged over the image.

    Args:
        images: float (N, 3, H, W) in [-1, 1].
        dim: How many.

    Returns:
        float32 (N, dim), on the CPU.
    """
    parts = []
    for chunk in images.float().cpu().split(CHUNK):
        x = chunk
        for layer, kernel in enumerate(kernels(dim)):
            x = F.conv2d(F.relu(x) if layer else x, kernel, stride=2, padding=1)
        parts.append(F.relu(x).mean(dim=(2, 3)))
    return torch.cat(parts)


def fd_rand(images: Tensor, targets: Tensor) -> Measured:
    """Return the distance of images to their targets.

    Args:
        images: float (N, 3, H, W) in [-1, 1], N at least 8.
        targets: float (M, 3, H, W) likewise; pairs are of no matter.

    Returns:
        The distance with its interval, with the details "features" and "network" (the network's digest).

    Raises:
        InputError: there are too few images.
    """
    dim = features_for(min(len(images), len(targets)))
    measured = frechet(random_features(images, dim), Gaussian.of(random_features(targets, dim)))
    details = {**measured.details, "features": dim, "network": digest(dim)}
    return Measured(measured.value, measured.low, measured.high, details)
