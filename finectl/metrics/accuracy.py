"""Class accuracy of generated images: how many a classifier takes for the class that was asked for."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics.measured import Measured

if TYPE_CHECKING:
    import torch


def class_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> Measured:
    """Count the images whose largest logit is that of the requested class.

    Args:
        logits: float (N, classes), from an extractor's classifier.
        labels: int64 (N,), the class each image was asked to be, 0..classes-1.

    Returns:
        Share of right answers, 0..1, with its Wilson interval; details: n and correct.

    Raises:
        InputError: the shapes do not fit, there are no images, or a label names a class unknown to the classifier.
        ComputationError: a logit is not finite.
    """
    if logits.ndim != 2 or tuple(labels.shape) != (logits.shape[0],):
        raise InputError(
            f"logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}",
            expected="shapes (N, classes) and (N,)",
        )
    if not logits.shape[0]:
        raise InputError("no images to measure the class accuracy of", expected="at least 1 image")
    if not bool(logits.isfinite().all()):
        raise ComputationError("the images' logits are not finite", fix="look at the images: finectl sample")
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise InputError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}",
            expected=f"0..{logits.shape[1] - 1}, the {logits.shape[1]} classes that the classifier knows",
        )
    correct, count = int((logits.argmax(dim=1) == labels.to(logits.device)).sum()), int(logits.shape[0])
    return share(correct, count, {"correct": correct})


def share(successes: int, trials: int, details: dict[str, Any] | None = None) -> Measured:
    """Return successes / trials with its 95 % Wilson interval and, among the details, n = trials.

    Args:
        successes: Number of successes, 0..trials.
        trials: Number of trials, at least 1.
        details: What else to keep with it.

    Raises:
        UsageError: a number is out of its range.
    """
    low, high = wilson_interval(successes, trials)
    return Measured(successes / trials, low, high, {"n": trials, **(details or {})})


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a binomial proportion.

    Args:
        successes: Number of successes, 0..trials.
        trials: Number of trials, at least 1.
        confidence: Confidence, above 0 and below 1.

    Returns:
        Lower and upper end, each 0..1.

    Raises:
        UsageError: a number is out of its range.

    Reference: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, Journal of the
        American Statistical Association 22 (1927).
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise UsageError(
            f"{successes} successes of {trials} trials at confidence {confidence}",
            expected="0 <= successes <= trials, at least 1 trial, a confidence between 0 and 1",
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate = successes / trials
    middle = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # At 0 and at `trials` successes one end is exactly 0 or 1; rounding must not move it.
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high
