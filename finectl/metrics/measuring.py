"""A search's objective at work: many models, one after another, measured the same way.

The noise is a function of (seed, noise number, image) alone, so that all candidates are measured on the same noise, and
a candidate on fresh noise under another number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.metrics import METRICS
from finectl.metrics.extraction import IDENTITY, FeatureExtraction, canonical_order
from finectl.metrics.features import EXTRACTORS, FeatureOptions
from finectl.metrics.frechet import Gaussian, frechet_change
from finectl.metrics.heldout_loss import heldout_loss
from finectl.metrics.measure import FRECHET, LABELS, Against, Rows, measure
from finectl.metrics.measured import Measured
from finectl.metrics.objective import LOSS, Objective
from finectl.metrics.reference import ReferenceInfo
from finectl.metrics.sources import DataImages, GeneratedImages, Source
from finectl.metrics.statistics import Statistics, load, load_npz
from finectl.models.vae import Vae
from finectl.training.generate import Generator
from finectl.training.texts import Prompts

EXTRACTION_IMAGES = 512


@dataclass(eq=False)
class Measuring:
    """An objective at work.

    Args:
        objective: What is measured.
        sampling: How images are generated, as `Generator` takes it: scheduler, sampling_steps, guidance.
        heldout: The held-out images, for the loss.
        train: The training images, where they are the reference.
        vae: What decodes latents.
        features: What the user says of the networks.
        seed: Seed of the noise.
        device: Where to compute.
        dtype: Arithmetic of sampling.
        workers: Threads that read and resize.
        check: Called between batches; it ends the work by raising.
        prompts: What models of text generate images of.
    """

    objective: Objective
    sampling: dict[str, Any]
    heldout: ImageSet
    train: ImageSet
    vae: Vae | None
    features: FeatureOptions
    seed: int
    device: torch.device
    dtype: str
    workers: int
    check: Callable[[], None]
    prompts: Prompts | None = None

    def __post_init__(self) -> None:

        self._against = Against("", {})
        if self.objective.extractor is not None:
            key = self.objective.extractor.name.partition(":")[0]
            self._extractor = EXTRACTORS.load(key).load(self.objective.extractor, self.features, self.device)
            self._key = key
        if self.objective.reference is not None:
            self._against = self._reference(self.objective.reference)

    def __call__(self, model: Any, samples: int, noise: int) -> Measured:
        """Measure a model.

        Args:
            model: On the device, in evaluation mode.
            samples: Images that are generated, or terms of the held-out loss.
            noise: Number of the noise.

        Raises:
            ComputationError: images or features are not finite.
        """
        measure = self._loss if self.objective.metric == LOSS else self._sampled
        return measure(model, samples, noise)

    def _loss(self, model: Any, samples: int, noise: int) -> Measured:

        draws = max(1, round(samples / len(self.heldout)))
        found = heldout_loss(
            model,
            self.heldout,
            draws=draws,
            seed=_noise_seed(self.seed, noise),
            device=self.device,
            diffusion=model.config.diffusion,
        ).summary(1)
        self.check()
        low, high = found["interval"]
        return Measured(found["value"], low, high, {"images": found["images"], "draws": draws})

    def _sampled(self, model: Any, samples: int, noise: int) -> Measured:

        generator = Generator(
            model,
            self.vae,
            seed=_noise_seed(self.seed, noise),
            device=self.device,
            dtype=self.dtype,
            prompts=self.prompts,
            **self.sampling,
        )
        return self.measured(self.rows(GeneratedImages(generator, samples, self.objective.labels)))

    @property
    def width(self) -> int:
        """Number of the features in which images are measured."""
        return self._extractor.outputs[METRICS[self.objective.metric].output]

    def rows(self, source: Source) -> dict[str, Tensor]:
        """Return what is measured of images, one row an image: features and labels; rows may be put together.

        Raises:
            ComputationError: images or features are not finite.
        """
        return {**self._extract(source), LABELS: source.labels(range(source.count))}

    def measured(self, rows: Mapping[str, Tensor]) -> Measured:
        """Measure images by their rows of features.

        Args:
            rows: As the method `rows` gives them.
        """
        return measure(self.objective.metric, self._key, Rows.of(rows), self._against, self.seed)

    def changed(self, rows: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Measured | None:
        """Measure by how much images differ from others of the same noise, image by image.

        Args:
            rows: As the method `rows` gives them.
            before: The same of the other images, in the same order.

        Returns:
            The difference with the interval of pairs; None for a metric that is no Fréchet distance.
        """
        entry = METRICS[self.objective.metric]
        if entry.target != FRECHET or self.objective.metric == "fid-infinity":
            return None
        name = f"{self._key}/{entry.output}"
        return frechet_change(rows[name], before[name], self._against.statistics[self._key, entry.output].gaussian)

    def _extract(self, source: Source) -> dict[str, Tensor]:
        """Return the rows of features of a source, computed in batches."""

        outputs = {self._key: (METRICS[self.objective.metric].output,)}
        parts: dict[str, list[Tensor]] = {}
        with FeatureExtraction({self._key: self._extractor}, outputs, self.workers) as extraction:
            for first in range(0, source.count, EXTRACTION_IMAGES):
                span = range(first, min(first + EXTRACTION_IMAGES, source.count))
                for name, rows in extraction.extract(source.open(span, self.check), len(span), self.check).items():
                    parts.setdefault(name, []).append(rows)
        return {name: torch.cat(rows) for name, rows in parts.items()}

    def _reference(self, info: ReferenceInfo) -> Against:
        """Return the statistics of the reference, read or computed."""

        output = METRICS[self.objective.metric].output
        if info.form == "npz":
            found = load_npz(Path(info.location), [output], self._extractor.outputs)
        elif info.form == "statistics":
            found = load(Path(info.location), info.count or 0, [output])
        else:
            rows = self._extract(DataImages(self.train, self.vae))
            features = rows[f"{self._key}/{output}"][canonical_order(rows[IDENTITY])]
            found = {output: Statistics(Gaussian.of(features), features)}
        return Against(info.name, {(self._key, output): found[output]})


def _noise_seed(seed: int, noise: int) -> int:
    """Return the seed of a number of noise; number 0 is the seed's own."""
    return seed + 1_000_003 * noise
