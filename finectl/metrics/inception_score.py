"""Inception Score: how sure a classifier is of each image, and how many classes it sees among all.

Reference: T. Salimans et al., Improved Techniques for Training GANs, arXiv 1606.03498, section 4.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.measured import Measured


def inception_score(logits: Tensor, splits: int = 10) -> Measured:
    """Return the exponential of the mean divergence of an image's classes from all images' classes.

    The images are cut into consecutive splits and the score is the mean over these, which keeps values comparable with
    the customary ones. The interval is that of this mean; of one split it comes from the images' divergences.

    Args:
        logits: float (N, k) over k classes.
        splits: Number of splits, 1..N. A split's score grows with its images, so only equal N and splits compare.

    Returns:
        The score, 1..k; details: n, splits, and std, the customary standard deviation over the splits.

    Raises:
        UsageError: fewer images than splits, or no split.
        InputError: the shape is not (N, k).
        ComputationError: a logit is not finite.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise InputError(f"logits of shape {tuple(logits.shape)}", expected="shape (N, classes)")
    count = logits.shape[0]
    if not 1 <= splits <= count:
        raise UsageError(
            f"{count} images in {splits} splits", expected="at least 1 split and 1 image in each", fix="more --samples"
        )
    values = logits.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ComputationError("the images' logits are not finite", fix="look at the images: finectl sample")
    borders = [count * split // splits for split in range(splits + 1)]
    divergences = [_divergences(values[first:last]) for first, last in pairwise(borders)]
    scores = torch.stack([part.mean().exp() for part in divergences])
    value = float(scores.mean())
    if splits > 1:
        error = float(scores.std()) / math.sqrt(splits)
    else:
        # The delta method: an image moves the logarithm of the score by its own divergence.
        error = value * float(divergences[0].std()) / math.sqrt(count) if count > 1 else 0.0
    details = {"n": count, "splits": splits, "std": float(scores.std(correction=0))}
    return Measured.around(value, error, details)


def _divergences(logits: Tensor) -> Tensor:
    """Return KL(p(y|x) || p(y)) in nats of each image (n,), p(y) the mean over them."""
    logarithms = logits.log_softmax(dim=1)  # (n, k)
    # In logarithms, so that a class of probability 0 takes part with 0 and not with 0 x infinity.
    marginal = logarithms.logsumexp(dim=0) - math.log(logits.shape[0])  # (k,)
    return (logarithms.exp() * (logarithms - marginal)).sum(dim=1)
