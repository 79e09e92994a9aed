"""Generated images and what is measured on them: Fréchet distance and class accuracy in the digits features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import load
from finectl.data.images import to_uint8
from finectl.diffusion.sampling import sample_images
from finectl.metrics.accuracy import class_accuracy
from finectl.metrics.features.digits import DigitsFeatures
from finectl.metrics.frechet import frechet_with_interval
from finectl.models.dit import DiT
from finectl.models.unet import UNet
from finectl.training.device import arithmetic


@dataclass(frozen=True)
class GeneratedMetrics:
    """How images are generated and against what they are measured.

    Args:
        data: The data set whose training split is the reference.
        samples: Images a model, the classes in turn.
        scheduler: A key of `SCHEDULERS`.
        sampling_steps: Steps of the reverse process.
        guidance: Scale of classifier-free guidance; 1 is none.
        seed: Seed of the images' noise and of the interval's draws.
        batch_size: Images generated at a time.
        device: Where to compute.
    """

    data: str
    samples: int
    scheduler: str
    sampling_steps: int
    guidance: float
    seed: int
    batch_size: int
    device: torch.device

    def sample(self, model: DiT | UNet, dtype: str, after_step: Callable[[], None]) -> tuple[Tensor, list[int]]:
        """Generate the images of a model.

        Args:
            model: On `device`, in evaluation mode.
            dtype: Arithmetic, as `--dtype` names it.
            after_step: Called after each step of the reverse process.

        Returns:
            uint8 levels (N, C, H, W), as an image file would hold them, and the N labels.
        """
        config = model.config
        labels = [index % max(config.num_classes, 1) for index in range(self.samples)]
        batches = []
        for first in range(0, self.samples, self.batch_size):
            with arithmetic(self.device, dtype):
                images = sample_images(
                    model,
                    (config.channels, config.image_size, config.image_size),
                    labels[first : first + self.batch_size],
                    null_label=config.num_classes,
                    scheduler=self.scheduler,
                    sampling_steps=self.sampling_steps,
                    guidance=self.guidance,
                    seed=self.seed,
                    first=first,
                    learned_sigma=config.learn_sigma,
                    device=self.device,
                    after_step=after_step,
                    diffusion=config.diffusion,
                )
            batches.append(to_uint8(images).cpu())
        return torch.cat(batches), labels

    def measure(self, levels: Tensor, labels: Sequence[int], metrics: Sequence[str]) -> dict[str, Any]:
        """Measure generated images, and record all that decides whether two values may be compared.

        Args:
            levels: uint8 (N, 1, 8, 8).
            labels: The N classes that were asked for.
            metrics: Those wanted of `frechet` and `accuracy`.
        """
        extractor = DigitsFeatures.load()
        features, logits = extractor.extract(levels.float() / 127.5 - 1)
        reference = load(self.data, "train")
        source = {
            "count": len(labels),
            "features": extractor.NAME,
            "features_digest": extractor.digest,
            "image_size": int(levels.shape[-1]),
            "resize_filter": reference.info.resize_filter,
            "reference": f"{reference.info.name}/train",
            "reference_fingerprint": reference.info.fingerprint,
            "reference_count": len(reference),
            "scheduler": self.scheduler,
            "sampling_steps": self.sampling_steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }
        measured: dict[str, Any] = {}
        if "frechet" in metrics:
            wanted, _ = extractor.extract(reference.images)
            value, low, high = frechet_with_interval(features, wanted, seed=self.seed)
            measured["frechet"] = {"value": value, "interval": [low, high], **source}
        if "accuracy" in metrics:
            right = class_accuracy(logits, torch.tensor(labels))
            measured["accuracy"] = {"value": right.value, "interval": [right.low, right.high], **source}
        return measured
