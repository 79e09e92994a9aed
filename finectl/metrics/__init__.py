"""The metrics that `--metrics` names: one file each, listed without importing them."""

from __future__ import annotations

from finectl.registry import Entry, Registry

METRICS = Registry(
    "metric",
    {
        "loss": Entry("finectl.metrics.heldout_loss", "held-out denoising loss, lower is better"),
        "frechet": Entry("finectl.metrics.frechet", "Fréchet distance in the bundled digits features, lower is better"),
        "accuracy": Entry("finectl.metrics.accuracy", "share of images classified as their label, higher is better"),
    },
)

# The metrics that need generated images.
SAMPLE_METRICS = ("frechet", "accuracy")
