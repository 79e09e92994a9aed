"""A few images that stand for many: the nearest to the centres of k-means clusters.

Reference: E2GAN, arXiv 2401.06127, section 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8
"""Images are compared at this size."""


def representative_rows(images: Tensor, count: int, seed: int, features: Tensor | None = None) -> Tensor:
    """Return which images stand for all: one of each cluster, in ascending order.

    Args:
        images: uint8 (N, 3, H, W).
        count: How many, at least 1; all where there are no more than that.
        seed: Of the clusters' first centres.
        features: What they are compared by, float64 (N, d); small pixels by default.

    Returns:
        int64 (min(count, N),).
    """
    if count >= len(images):
        return torch.arange(len(images))
    from sklearn.cluster import KMeans

    features = pixel_features(images) if features is None else features
    clusters = KMeans(count, n_init=1, random_state=seed).fit(features.numpy())
    distances = torch.from_numpy(clusters.transform(features.numpy()))  # (N, count)
    chosen: list[int] = []
    for centre in range(count):  # equal images can be nearest to two centres
        order = distances[:, centre].argsort(stable=True).tolist()
        chosen.append(next(row for row in order if row not in chosen))
    return torch.tensor(sorted(chosen))


def pixel_features(images: Tensor) -> Tensor:
    """Return images brought to 8 pixels as float64 (N, 192)."""
    parts = [F.adaptive_avg_pool2d(part.double(), SIDE) for part in images.split(256)]
    return torch.cat(parts).flatten(1)
