"""The metrics that `--metrics` names, listed without importing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finectl.registry import Entry, Registry


@dataclass(frozen=True)
class Metric(Entry):
    """A line of the table of metrics.

    Args:
        target: Where the code is.
        help: What it is, in one line.
        better: Which values are better.
        features: The extractor in whose features it is measured; "chosen": that of `--features`; "" for none.
        output: Which of the extractor's outputs it takes.
        paired: Whether each image is compared with one of the reference, its pair.
        sampled: Whether it needs generated images.
    """

    better: Literal["lower", "higher"] = "lower"
    features: str = ""
    output: str = "features"
    paired: bool = False
    sampled: bool = True


METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "loss": Metric("finectl.metrics.heldout_loss", "held-out denoising loss", sampled=False),
        "frechet": Metric("finectl.metrics.frechet", "Fréchet distance in a classifier's features", features="chosen"),
        "accuracy": Metric(
            "finectl.metrics.accuracy",
            "share of images classified as their label",
            "higher",
            features="chosen",
            output="logits",
        ),
        "fid": Metric("finectl.metrics.frechet", "Fréchet distance in Inception's features", features="inception"),
        "fid-infinity": Metric(
            "finectl.metrics.frechet", "FID extrapolated to infinitely many samples", features="inception"
        ),
        "sfid": Metric(
            "finectl.metrics.frechet",
            "Fréchet distance in Inception's spatial features",
            features="inception",
            output="spatial",
        ),
        "is": Metric("finectl.metrics.inception_score", "Inception Score", "higher", "inception", "logits"),
        "kid": Metric("finectl.metrics.kernel_distance", "kernel Inception distance", features="inception"),
        "precision": Metric("finectl.metrics.neighbours", "samples near a real image", "higher", "inception"),
        "recall": Metric("finectl.metrics.neighbours", "real images near a sample", "higher", "inception"),
        "density": Metric("finectl.metrics.neighbours", "real neighbourhoods a sample lies in", "higher", "inception"),
        "coverage": Metric(
            "finectl.metrics.neighbours", "real neighbourhoods that hold a sample", "higher", "inception"
        ),
        "fdd": Metric("finectl.metrics.frechet", "Fréchet distance in DINOv2's features", features="dinov2"),
        "fd-clip": Metric("finectl.metrics.frechet", "Fréchet distance in CLIP's image features", features="clip"),
        "clip-score": Metric("finectl.metrics.clip_score", "agreement of image and prompt in CLIP", "higher", "clip"),
        "l1": Metric("finectl.metrics.paired", "mean absolute difference of pairs, of the range", paired=True),
        "psnr": Metric("finectl.metrics.paired", "peak signal-to-noise ratio of pairs, dB", "higher", paired=True),
        "ssim": Metric("finectl.metrics.paired", "structural similarity of pairs", "higher", paired=True),
        "lpips": Metric("finectl.metrics.paired", "perceptual distance of pairs in AlexNet's features", paired=True),
    },
)
# Other names under which a condition or a list may ask for a metric.
ALIASES = {"val_loss": "loss"}
