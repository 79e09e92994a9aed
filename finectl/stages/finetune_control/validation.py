"""Validation: images of held-out controls, whose control is measured again.

So it is seen when a ControlNet begins to obey: not in the loss, which hardly changes, but in the generated image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.files import staged
from finectl.artifacts.job import Job
from finectl.data.controls import Extractor
from finectl.data.dataset import ImageSet
from finectl.data.images import make_rows, to_uint8
from finectl.diffusion.losses import Denoiser
from finectl.diffusion.sampling import sample_images
from finectl.metrics.control import DISSIMILARITIES
from finectl.metrics.sudden_convergence import sudden_convergence
from finectl.models.control import Controlled
from finectl.models.vae import Vae
from finectl.training.controls import pixels_of
from finectl.training.log import NAME as LOG
from finectl.training.log import read_log

FOLDER = "validation"
BATCH = 16
SCHEDULER, SEED = "ddim", 0
KEY = "control_{}"
NAMES = ("control", "real", "generated")


@dataclass(frozen=True, eq=False)
class Validation:
    """Held-out conditions and what is asked of images that are made of them.

    Args:
        model: What is trained; its table has their rows.
        rows: int64 (n,), of the held-out images.
        wanted: Their controls, uint8 (n, 3, H, W).
        real: The images themselves, uint8 (n, C, H, W).
        extractor: What measures a control; None for one that cannot be measured.
        measures: How controls are compared, keys of `finectl.metrics.control.DISSIMILARITIES`.
        steps: Steps of the reverse process.
        vae: What decodes latents; None for pixels.
        directory: Where pictures go; None in a process that does not lead.
        check: Called after each step of the reverse process; it ends the work by raising.
    """

    model: Controlled
    rows: Tensor
    wanted: Tensor
    real: Tensor
    extractor: Extractor | None
    measures: tuple[str, ...]
    steps: int
    vae: Vae | None
    directory: Path | None

    @classmethod
    def of(
        cls,
        job: Job[Any],
        model: Controlled,
        held: ImageSet,
        extractor: Callable[[], Extractor] | None,
        measures: tuple[str, ...],
        vae: Vae | None,
    ) -> Validation:
        """Take a fixed, class-balanced part of the held-out images.

        Args:
            job: Its configuration says how many, and in how many steps they are made.
            model: As above, and so `measures` and `vae`.
            held: The held-out images, whose labels are still their classes.
            extractor: Gives what measures a control; None for one that cannot be measured.
        """
        some = held.subset(job.config.validation_images, seed=0)
        levels = model.conditions.controls(some.indices) * 255
        return cls(
            model,
            some.indices,
            levels.round().to(torch.uint8).cpu(),
            pixels_of(some, torch.arange(len(some)), vae),
            extractor() if extractor else None,
            measures if extractor else (),
            job.config.validation_steps,
            vae,
            job.directory if job.world.leads else None,
        )

    def __call__(self, averaged: Denoiser, step: int) -> dict[str, float]:
        """Generate, measure and draw; see `finectl.training.loop.Watch`."""
        made = self.generate(averaged)
        if self.directory is not None:
            folder = self.directory / FOLDER
            folder.mkdir(exist_ok=True)
            with staged(folder / f"{step:06d}.png") as temporary:
                make_rows([self.wanted, self.real, made], NAMES).save(temporary, format="png")
        return {KEY.format(name): value for name, value in self.compare(made).items()}

    def generate(self, averaged: Denoiser) -> Tensor:
        """Return images of the controls, uint8 (n, C, H, W) on the CPU; the noise is the same at every time."""
        config, device = self.model.config, next(self.model.parameters()).device
        made = []
        for first in range(0, len(self.rows), BATCH):
            images = sample_images(
                averaged,
                (config.channels, config.image_size, config.image_size),
                self.rows[first : first + BATCH].tolist(),
                null_label=config.num_classes,
                scheduler=SCHEDULER,
                sampling_steps=self.steps,
                guidance=1.0,
                seed=SEED,
                first=first,
                learned_sigma=config.learn_sigma,
                device=device,
                diffusion=config.diffusion,
                clip=self.vae is None,
            )
            made.append(to_uint8(images if self.vae is None else self.vae.decode(images)).cpu())
        return torch.cat(made)

    def compare(self, images: Tensor) -> dict[str, float]:
        """Return how far the control of images, uint8 (n, C, H, W), is from the one that was asked for, by measure."""
        if self.extractor is None:
            return {}
        found = self.extractor(images)
        wanted = self.wanted[:, : found.shape[1]]  # grey ones were repeated
        return {name: float(DISSIMILARITIES[name](wanted, found).mean()) for name in self.measures}

    def chance(self) -> dict[str, float]:
        """Return the same of real images of other controls: what is to be had without looking at the control."""
        return self.compare(self.real.roll(1, 0))

    def reached(self) -> dict[str, Any]:
        """Return the metrics of a finished run: for each measure its course and the step of sudden convergence."""
        log = read_log((self.directory or Path()) / LOG)
        curves: dict[str, Any] = {}
        chance = self.chance()
        for name in self.measures:
            key = KEY.format(name)
            curve = [(entry["step"], entry[key]) for entry in log if key in entry]
            found = sudden_convergence(curve)
            curves[name] = {
                "first": curve[0][1],
                "last": curve[-1][1],
                "of_real_images_of_other_controls": chance[name],
                "sudden_convergence": found.to_dict() if found else None,
            }
        return {
            "images": len(self.rows),
            "sampling_steps": self.steps,
            "measure": self.measures[0] if self.measures else None,
            "measures": curves,
        }
