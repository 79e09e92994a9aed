"""The chain of forgetting: images whose last steps the pre-trained model makes, for a growing share of them.

Reference: Diff-Tuning, arXiv 2406.00773, Fig. 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from finectl.artifacts.chunks import Chunks, Shares
from finectl.artifacts.tensors import save_tensors
from finectl.diffusion.sampling import Pretrained, sampled_timesteps
from finectl.diffusion.schedulers import steps_handed_over
from finectl.metrics import METRICS
from finectl.metrics.features import FeatureOptions
from finectl.metrics.measure import require_enough
from finectl.metrics.measuring import Measuring
from finectl.metrics.objective import Objective
from finectl.metrics.sources import Check, GeneratedImages, Read, reader
from finectl.stages.forgetting.setting import TARGET, Setting
from finectl.stages.forgetting.subjects import describe_metric
from finectl.training.generate import Generator, load_pretrained
from finectl.training.texts import Prompts

PICTURES = "samples.safetensors"
PREVIEW = "preview"
ALL = sys.maxsize
SAMPLED_BY = ("scheduler", "sampling_steps", "guidance", "seed")


@dataclass(frozen=True, eq=False)
class MadeImages:
    """Images at hand; see `finectl.metrics.sources.Source`.

    Args:
        levels: uint8 (N, C, H, W).
        classes: int64 (N,).
    """

    levels: Tensor
    classes: Tensor

    @property
    def count(self) -> int:
        """See `Source.count`."""
        return len(self.levels)

    def open(self, span: range, check: Check) -> Read:
        """See `Source.open`."""
        return reader(self.levels[span.start : span.stop])

    def labels(self, span: range) -> Tensor:
        """See `Source.labels`."""
        return self.classes[span.start : span.stop]

    def prompts(self) -> None:
        """See `Source.prompts`."""
        return


class Replayed:
    """A denoiser whose answers are kept: runs that differ in their last steps alone make the first ones once.

    Args:
        model: The denoiser. A run repeats its calls, in their order, until it stops calling it.
    """

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self._model = model
        self._kept: list[Tensor] = []
        self._place = 0

    def rewind(self) -> None:
        """Begin another run."""
        self._place = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self._place == len(self._kept):
            self._kept.append(self._model(x, t, y))
        self._place += 1
        return self._kept[self._place - 1]


@dataclass
class _Chain:
    """One run of the chain.

    Args:
        setting: The models and images.
        metric: What images are measured in; None where they are only drawn.
        measuring: The same at work.
        generator: The fine-tuned model.
        pretrained: The one that steps are handed over to.
    """

    setting: Setting
    metric: Objective | None
    measuring: Measuring | None
    generator: Generator
    pretrained: Pretrained

    @classmethod
    def of(cls, setting: Setting) -> _Chain:
        """Load the models and the metric's network.

        Raises:
            UsageError: there are too few images for the metric.
        """
        config, job = setting.job.config, setting.job
        metric, _ = describe_metric(config, setting.subjects)
        how: dict[str, Any] = {
            name: getattr(config, name) for name in ("scheduler", "sampling_steps", "guidance", "seed")
        }
        captions = setting.captions(TARGET)
        prompts = Prompts.of_captions(captions, setting.images(TARGET, "heldout", ALL)) if captions else None
        generator = Generator.of(
            setting.subjects.finetuned,
            config.weights,
            config.vae,
            setting.device,
            dtype=job.execution.dtype,
            prompts=prompts,
            **how,
        )
        pretrained = load_pretrained(setting.subjects.pretrained, config.weights, 0.0, setting.device, prompts)
        measuring = _measuring(setting, metric, generator) if metric is not None else None
        return cls(setting, metric, measuring, generator, pretrained)

    @property
    def count(self) -> int:
        """Images of each share."""
        config = self.setting.job.config
        return config.samples if self.measuring is not None else config.pictures

    def rows(self, span: range) -> dict[str, Tensor]:
        """Return what is kept of some images: for each share the rows that are measured, and the first images."""
        config, replayed = self.setting.job.config, Replayed(self.generator.model)
        prompts, classes = self.generator.prompts, self._classes(span)
        labels = classes.tolist() if prompts is None else prompts.rows_of(span)
        found: dict[str, Tensor] = {}
        for index, share in enumerate(config.shares):
            replayed.rewind()
            how = replace(self.generator, model=cast(Any, replayed), pretrained=replace(self.pretrained, share=share))
            levels = how.images(span.start, labels, self.setting.check)  # (b, C, H, W)
            if span.start < config.pictures:
                found[f"{PREVIEW}/{index:03d}"] = levels[: config.pictures - span.start].clone()
            if self.measuring is not None:
                rows = self.measuring.rows(MadeImages(levels, classes.clone()))
                found |= {f"{index:03d}/{name}": value for name, value in rows.items()}
        return found

    def point(self, chunks: Chunks, index: int, share: float) -> dict[str, Any]:
        """Return what one share of the steps came to."""
        config, diffusion = self.setting.job.config, self.generator.model.config.diffusion
        times = sampled_timesteps(config.scheduler, config.sampling_steps, diffusion)
        steps = steps_handed_over(share, len(times))
        point: dict[str, Any] = {"x": share, "steps": steps, "first": times[-steps] if steps else None}
        if self.measuring is None:
            return point
        rows = _loaded(chunks, index)
        change = self.measuring.changed(rows, _loaded(chunks, 0))
        return {**point, **self.measuring.measured(rows).record(), "change": change.record() if change else None}

    def _classes(self, span: range) -> Tensor:
        """Return the classes of some images, in turn those of the target or of its captions, (b,), int64."""
        drawn = self.setting.subjects.labels
        return GeneratedImages(self.generator, self.count, drawn).labels(span)


def chain_of_forgetting(setting: Setting) -> dict[str, Any]:
    """Generate images for each share of the steps, all from the same noise, and measure them.

    Returns:
        `metric`, its `features` and `reference`, None where nothing measures the images; `points`: for each share `x`
        the number of `steps` and the `first` timestep that the pre-trained model makes, the measured record, and the
        `change` from the first share, paired by image, None where the metric has none.
    """
    config, job = setting.job.config, setting.job
    chain = _Chain.of(setting)
    shares, chunks = Shares(job), Chunks(job.state, "chain", chain.count, config.batch_size)
    with job.console.progress("chain of forgetting", chain.count * len(config.shares), unit="image") as progress:
        for first in chunks.firsts:
            span = chunks.span(first)
            if not chunks.has(first):
                shares.keep(chunks, span, chain.rows(span))
            progress.advance(len(span) * len(config.shares), samples=len(span) * len(config.shares))
    previews = chunks.load(lambda name: name.startswith(PREVIEW))
    save_tensors(job.directory / PICTURES, {name.rpartition("/")[2]: levels for name, levels in previews.items()})
    metric = chain.metric
    return {
        "metric": metric.metric if metric else None,
        "better": METRICS[metric.metric].better if metric else None,
        "features": metric.extractor.name if metric and metric.extractor else None,
        "reference": metric.reference.name if metric and metric.reference else None,
        "samples": chain.count,
        **{name: getattr(config, name) for name in SAMPLED_BY},
        "points": [chain.point(chunks, index, share) for index, share in enumerate(config.shares)],
    }


def _loaded(chunks: Chunks, index: int) -> dict[str, Tensor]:
    """Return the rows of one share, in the order of the images."""
    prefix = f"{index:03d}/"
    rows = chunks.load(lambda name: name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in rows.items()}


def _measuring(setting: Setting, metric: Objective, generator: Generator) -> Measuring:
    config, job = setting.job.config, setting.job
    train, held = (setting.images(TARGET, split, ALL) for split in ("train", "heldout"))
    measuring = Measuring(
        metric,
        {},
        held,
        train,
        generator.vae,
        FeatureOptions.of(config),
        config.seed,
        setting.device,
        job.execution.dtype,
        job.execution.workers,
        setting.check,
    )
    require_enough(metric.metric, 0 if config.allow_few else measuring.width, config.samples, "images of each share")
    return measuring
