"""The training pairs that stand for all: nearest to the centres of clusters, by CLIP's features or by small pixels.

Reference: E2GAN, arXiv 2401.06127, section 3.4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finectl.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.data.pairs import Pairs

IMAGES_AT_ONCE = 32


def subset_clip_digest(subset: int, clip: str | None) -> str:
    """Return the digest of the CLIP model by whose features a subset is chosen; empty where it is by pixels.

    Raises:
        UsageError: there is no subset to choose.
        InputError: the model is not there.
    """
    from finectl.metrics.features import FeatureOptions
    from finectl.metrics.features.clip import describe

    if clip is None:
        return ""
    if not subset:
        raise UsageError("--subset-clip: all pairs are used, and none is chosen", fix="--subset 400")
    return describe(FeatureOptions(clip=clip)).digest


def representative_pairs(pairs: Pairs, count: int, seed: int, clip: str | None, device: torch.device) -> Tensor:
    """Return the training images to use: all, or so many that stand for them.

    Args:
        pairs: The images.
        count: How many; 0 for all.
        seed: Of the clusters' first centres.
        clip: The CLIP model whose features they are compared by, as `--clip` names it; None for pixels.
        device: Where it runs.

    Returns:
        int64 (N,), rows of the pairs in ascending order.

    Raises:
        UsageError, InputError: the model cannot be read.
    """
    from finectl.data.subset import representative_rows

    rows = pairs.rows("train")
    if not 0 < count < len(rows):
        return rows
    images = pairs.source_rows(rows)
    features = None if clip is None else clip_features(images, clip, device)
    return rows[representative_rows(images, count, seed, features)]


def clip_features(images: Tensor, clip: str, device: torch.device) -> Tensor:
    """Return the features of images uint8 (N, 3, H, W), of length 1, float64 (N, d): k-means goes by their angles."""
    import torch
    from torch.nn.functional import normalize

    from finectl.metrics.features import FeatureOptions
    from finectl.metrics.features.clip import describe, load

    options = FeatureOptions(clip=clip)
    model, found = load(describe(options), options, device), []
    for part in images.split(IMAGES_AT_ONCE):
        prepared = torch.stack([model.prepare(image.permute(1, 2, 0).numpy()) for image in part])
        found.append(model.forward(prepared, ("features",))["features"])
    return normalize(torch.cat(found).double(), dim=1)
