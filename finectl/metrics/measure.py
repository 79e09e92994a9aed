"""From rows of features to metrics: which function measures what, and what a value's protocol is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from finectl.errors import InputError, UsageError
from finectl.metrics import METRICS
from finectl.metrics.accuracy import class_accuracy
from finectl.metrics.clip_score import clip_score
from finectl.metrics.extraction import IDENTITY, canonical_order
from finectl.metrics.features import ExtractorInfo
from finectl.metrics.frechet import frechet, frechet_infinity
from finectl.metrics.inception_score import inception_score
from finectl.metrics.kernel_distance import kernel_distance
from finectl.metrics.measured import Measured
from finectl.metrics.neighbours import neighbour_metrics
from finectl.metrics.paired import summarize_pairs
from finectl.metrics.statistics import Statistics

LABELS = "labels"
TEXT = "clip/text"
PAIRED = "paired"


@dataclass(frozen=True, eq=False)
class Rows:
    """What was computed of a set of images, one row an image, in the order of the images' hashes.

    Args:
        tensors: `EXTRACTOR/OUTPUT`, `labels`, `clip/text` and `paired/METRIC` to (N, ...).
        count: N.
    """

    tensors: Mapping[str, Tensor]
    count: int
    _shared: dict[str, dict[str, Measured]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Rows:
        """Put rows into their canonical order."""
        order = canonical_order(tensors[IDENTITY])
        return cls({name: rows[order] for name, rows in tensors.items() if name != IDENTITY}, len(order))

    def shared(self, key: str, measure: Callable[[], dict[str, Measured]]) -> dict[str, Measured]:
        """Return what several metrics have in common, computed once."""
        if key not in self._shared:
            self._shared[key] = measure()
        return self._shared[key]


@dataclass(frozen=True, eq=False)
class Against:
    """What rows are measured against.

    Args:
        name: How messages name it.
        statistics: By extractor and output.
    """

    name: str
    statistics: Mapping[tuple[str, str], Statistics]


def measure(name: str, extractor: str, rows: Rows, against: Against, seed: int) -> Measured:
    """Measure one metric of generated images.

    Args:
        name: A key of `METRICS` of which rows hold what it needs.
        extractor: The key of the network that it is measured in.
        rows: Of the images.
        against: The reference; not used by metrics that have none.
        seed: Seed of subsets.

    Raises:
        InputError: the reference holds only moments, or has another number of features.
        UsageError: there are too few images for the metric.
        ComputationError: a number is not finite.
    """
    entry = METRICS[name]
    if entry.paired:
        return summarize_pairs(name, rows.tensors[f"{PAIRED}/{name}"])
    features = rows.tensors[f"{extractor}/{entry.output}"]
    if name in ALONE:
        return ALONE[name](features, rows)
    statistics = against.statistics[extractor, entry.output]
    if name in WITH_ROWS:
        return WITH_ROWS[name](features, statistics.require_rows(name, against.name), rows, seed)
    return (frechet_infinity if name == "fid-infinity" else frechet)(features, statistics.gaussian)


def _neighbours(name: str) -> Callable[[Tensor, Tensor, Rows, int], Measured]:
    """Return the measure of one of four metrics that have their distances in common."""
    return lambda features, reference, rows, _: rows.shared(
        "neighbours", lambda: neighbour_metrics(features, reference)
    )[name]


# What needs no reference.
ALONE: Mapping[str, Callable[[Tensor, Rows], Measured]] = {
    "accuracy": lambda logits, rows: class_accuracy(logits, rows.tensors[LABELS]),
    "is": lambda logits, _: inception_score(logits),
    "clip-score": lambda features, rows: clip_score(features, rows.tensors[TEXT]),
}
# What needs the features of the reference images, not only their moments.
WITH_ROWS: Mapping[str, Callable[[Tensor, Tensor, Rows, int], Measured]] = {
    "kid": lambda features, reference, _, seed: kernel_distance(features, reference, seed=seed),
    **{name: _neighbours(name) for name in ("precision", "recall", "density", "coverage")},
}


def protocol(info: ExtractorInfo | None, dtype: str, count: int, reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return all that two values of a metric must have in common to be comparable."""
    parts: dict[str, Any] = {"n": count}
    if info is not None:
        parts |= {
            "extractor": info.name,
            "extractor_digest": info.digest,
            "resize": info.resize,
            "dtype": dtype,
        }
    return {**parts, **(reference or {})}


# The fewest images for which the formulas give a number; a Fréchet distance takes a covariance.
LEAST = {"fid-infinity": 16, "is": 10, "kid": 2, "precision": 4, "recall": 4, "density": 6, "coverage": 6}
FRECHET = "finectl.metrics.frechet"


def require_enough(name: str, width: int, count: int, whose: str) -> None:
    """Refuse a metric of too few images.

    Args:
        name: A key of `METRICS`.
        width: Number of features, or 0 where few images are allowed. A Fréchet distance of fewer images than features
            is biased by more than what it is to tell apart.
        count: Number of images.
        whose: What they are, for the message.

    Raises:
        UsageError: there are too few.
    """
    is_distance = METRICS[name].target == FRECHET
    least = LEAST.get(name, 2 if is_distance else 1)
    wanted = max(least, width if is_distance else 0)
    if count >= wanted:
        return
    if count < least:
        what, fix = "cannot be computed", "--samples 10000"
    else:
        what = f"in {width:,} features is far from its value for many images"
        fix = "--samples 10000 (50000 is customary), or --allow-few for a value that is marked by its n"
    raise UsageError(f"{name} of {count:,} {whose} {what}", expected=f"at least {wanted:,} images", fix=fix)


def require_labels(labels: Tensor, classes: int) -> None:
    """Check that a network tells the classes of images apart.

    Raises:
        InputError: the images have more classes than the network.
    """
    if len(labels) and int(labels.max()) >= classes:
        raise InputError(
            f"the images have the class {int(labels.max())}, and the network tells {classes} apart",
            expected="a network of the same classes",
        )
