"""The computing of `evaluate`: losses and rows of features, shared by the processes and kept chunk by chunk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from finectl.artifacts.chunks import CHUNK_IMAGES, Chunks, Shares
from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.console import Progress
from finectl.data.dataset import ImageSet, load
from finectl.errors import ComputationError, InputError
from finectl.metrics import METRICS
from finectl.metrics.extraction import FeatureExtraction, Pixels
from finectl.metrics.features import EXTRACTORS, Extractor
from finectl.metrics.heldout_loss import heldout_loss
from finectl.metrics.measure import LABELS, PAIRED, TEXT, require_enough, require_labels
from finectl.metrics.paired import Lpips, measure_pairs
from finectl.metrics.sources import FileImages, GeneratedImages, Read, Source
from finectl.stages.evaluate.config import Config
from finectl.stages.evaluate.reference import ReferenceWork
from finectl.stages.evaluate.setup import Setup, extractor_key, needs_reference
from finectl.stages.evaluate.subjects import Subject, count_images, find_samples, load_generator, open_images
from finectl.training.device import arithmetic, resolve_device
from finectl.training.distributed import join, lost_peers_as_errors
from finectl.training.generate import Generator
from finectl.training.settings import data_options
from finectl.training.texts import Captions, Prompts

if TYPE_CHECKING:
    from finectl.metrics.features.clip import ClipFeatures

PREVIEW_IMAGES = 20


@dataclass(eq=False)
class Work:
    """One evaluation on its device.

    Args:
        job: The run.
        setup: What it means.
        device: Where to compute.
        extraction: The networks, fed by threads.
        lpips: The network of LPIPS, if that is wanted.
        heldout: The images of the loss, if that is wanted.
        reference: What the images are compared with.
        shares: How the processes share chunks.
        prompts: The held-out captions, of which models of text generate images.
        pretrained: A second model, with which images are generated.
    """

    job: Job[Config]
    setup: Setup
    device: torch.device
    extraction: FeatureExtraction
    lpips: Lpips | None
    heldout: ImageSet | None
    reference: ReferenceWork
    shares: Shares
    prompts: Prompts | None = None
    pretrained: Artifact | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, job: Job[Config], setup: Setup, pretrained: Artifact | None = None) -> Iterator[Work]:
        """Join the processes, load the networks, and let go of the threads at the end."""
        config, shares = job.config, Shares(job)
        device = resolve_device(job.execution.device, job.world.local_rank)
        join(job.world, device)
        networks: dict[str, Extractor] = {
            key: EXTRACTORS.load(key).load(info, setup.options, device) for key, info in setup.extractors.items()
        }
        lpips = Lpips(setup.lpips.path, device) if setup.lpips else None
        heldout = None
        if "loss" in setup.metrics and setup.data is not None:
            heldout = load(setup.data.name, "heldout", config.image_size, data_options(config, job))
        prompts = None
        if setup.data is not None and setup.data.text is not None:
            part = heldout or load(setup.data.name, "heldout", config.image_size, data_options(config, job))
            captions = Captions.opened(job, part, setup.data, device)
            prompts = Prompts.of_captions(captions, part)
            heldout = None if heldout is None else captions.of(heldout)
        reference = ReferenceWork(job, setup, networks, device, shares)
        with FeatureExtraction(networks, setup.outputs, job.execution.workers) as extraction:
            work = cls(job, setup, device, extraction, lpips, heldout, reference, shares, prompts, pretrained)
            with lost_peers_as_errors(job.world):
                yield work

    def measure(self, number: int, subject: Subject, progress: Progress) -> Source | None:
        """Compute the loss of a row, and this process's chunks of its features.

        Returns:
            The source of its images; None when no metric needs any.
        """
        lossless = self.heldout is None or not subject.is_model or self.loss_file(number).exists()
        sampled = any(METRICS[name].sampled for name in self.setup.metrics)
        made = find_samples(self.job.workspace, subject, self.job.config, self.pretrained) if sampled else None
        source = open_images(self.job.config, self.setup, subject, made, self.device) if sampled else None
        if not lossless or (sampled and source is None):
            generator = load_generator(self.job, self.setup, subject, self.device, self.prompts, self.pretrained)
            if not lossless:
                self._measure_loss(number, subject, generator)
            if sampled and source is None:
                source = GeneratedImages(generator, self.job.config.samples, self.setup.labels)
        if subject.is_model and self.heldout is not None:
            progress.advance(len(self.heldout), samples=len(self.heldout))
        if source is None:
            return None
        self._require_sense(subject, source)
        chunks = self.chunks(number, subject, source)
        for span in self.shares.mine(chunks, progress):
            read = source.open(span, self.shares.check)
            rows = self.extraction.extract(read, len(span), self.shares.check)
            if span.start == 0:
                self._keep_preview(number, read, len(span))
            self.shares.keep(chunks, span, {**rows, **self._beside(source, span, read)}, progress)
        return source

    def chunks(self, number: int, subject: Subject, source: Source) -> Chunks:
        """Return where the features of a row are."""
        digest = subject.artifact.manifest.digest if subject.artifact else self.job.config.images_digest
        size = self.job.config.batch_size if subject.is_model else CHUNK_IMAGES
        return Chunks(self.job.state, f"row{number}-{digest[:8]}", source.count, size)

    def loss_file(self, number: int) -> Path:
        """Return where the held-out loss of a row is."""
        return self.job.state / f"row{number}-loss.json"

    def preview(self, number: int) -> Tensor | None:
        """Return the first images of a row, uint8 (N, C, H, W); None where they have several sizes."""
        file = self._preview_file(number)
        return load_tensors(file)["images"] if file.exists() else None

    def _preview_file(self, number: int) -> Path:
        return self.job.state / f"row{number}-preview.safetensors"

    def _measure_loss(self, number: int, subject: Subject, generator: Generator) -> None:
        config = self.job.config
        if self.heldout is None:
            return
        with arithmetic(self.device, "float32"):  # --dtype is for sampling: losses are compared to the last digits
            measured = heldout_loss(
                generator.model,
                self.heldout,
                draws=config.draws,
                seed=config.seed,
                device=self.device,
                diffusion=generator.model.config.diffusion,
                world=self.job.world,
            )
        if not math.isfinite(measured.mean):
            raise ComputationError(
                f"the held-out loss of {subject.name} is not finite ({measured.mean})",
                expected="weights and predictions of finite numbers",
                fix="evaluate another checkpoint, or --weights raw; --dtype float32",
            )
        if self.job.world.leads:
            self.shares.mark()
            write_json(self.loss_file(number), measured.summary(config.ranges))
        self.shares.check()

    def _beside(self, source: Source, span: range, read: Read) -> dict[str, Tensor]:
        """Return what is not a feature of an image alone: its label, its prompt's features, values of its pair."""
        rows: dict[str, Tensor] = {LABELS: source.labels(span)}
        if "clip-score" in self.setup.metrics:
            prompts, network = source.prompts() or (), cast("ClipFeatures", self.extraction.extractors["clip"])
            rows[TEXT] = network.encode_text([prompts[index] for index in span])
        paired = [name for name in self.setup.metrics if METRICS[name].paired]
        if paired:
            target = self.reference.images.open(span, self.shares.check)
            pairs = [_pair(_levels(read(index)), _levels(target(index))) for index in range(len(span))]
            for name in paired:
                parts = [measure_pairs(name, ones, others, self.lpips).double() for ones, others in _batches(pairs)]
                rows[f"{PAIRED}/{name}"] = torch.cat(parts)
        return rows

    def require_enough(self, subjects: Sequence[Subject]) -> None:
        """Refuse, before any work, metrics that so few images cannot give.

        Raises:
            UsageError: there are fewer than a metric's formula takes, or, without `--allow-few`, fewer than features.
        """
        few, networks = self.job.config.allow_few, self.extraction.extractors
        for name in (name for name in self.setup.metrics if METRICS[name].sampled):
            key = extractor_key(name, self.setup.options)
            width = 0 if few or not key else networks[key].outputs[METRICS[name].output]
            for subject in subjects:
                count = count_images(self.job.config, self.setup, subject)
                require_enough(name, width, count, f"images of {subject.name}")
            if needs_reference(name) and self.reference.info.count:
                require_enough(name, width, self.reference.info.count, "reference images")

    def _require_sense(self, subject: Subject, source: Source) -> None:
        """Refuse what could be computed and would mean nothing.

        Raises:
            InputError: the images lack the labels, the prompts or the pairs that a metric needs.
        """
        names, networks = self.setup.metrics, self.extraction.extractors
        if "accuracy" in names:
            key = extractor_key("accuracy", self.setup.options)
            require_labels(source.labels(range(source.count)), networks[key].outputs["logits"])
        if "clip-score" in names and source.prompts() is None:
            raise InputError(
                f"{subject.name} has no prompts, with which CLIP's score compares",
                expected="a metadata.jsonl beside the images (file_name, text), or one .txt for each image",
            )
        if any(METRICS[name].paired for name in names):
            self._require_pairs(subject, source)

    def _require_pairs(self, subject: Subject, source: Source) -> None:
        info = self.reference.info
        if info.form not in ("data", "files"):
            raise InputError(f"the reference {info.name} holds no images to pair with", fix="--reference folder:PATH")
        if info.count != source.count:
            raise InputError(
                f"{subject.name} has {source.count:,} images, the reference {info.name} {info.count or 0:,}",
                expected="one reference image for each, in the same order of names",
            )
        if isinstance(source, FileImages) and isinstance(self.reference.images, FileImages):
            names = zip(source.files.names, self.reference.images.files.names, strict=True)
            for one, other in names:
                if Path(one).with_suffix("") != Path(other).with_suffix(""):
                    raise InputError(
                        f"{one} of {subject.name} would be paired with {other} of {info.name}",
                        expected="the same names in both folders, but for their endings",
                    )

    def _keep_preview(self, number: int, read: Read, count: int) -> None:
        images = [_levels(read(index)) for index in range(min(PREVIEW_IMAGES, count))]
        if len({one.shape[1] for one in images}) > 1:
            images = [one.expand(-1, 3, -1, -1) for one in images]
        if len({one.shape for one in images}) == 1:
            self.job.state.mkdir(exist_ok=True)
            save_tensors(self._preview_file(number), {"images": torch.cat(images)})


def _levels(pixels: Pixels) -> Tensor:
    """Return one image (H, W, C) as uint8 (1, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]


def _pair(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return two images with as many channels; grey beside RGB is repeated."""
    if {one.shape[1], other.shape[1]} == {1, 3}:
        return one.expand(-1, 3, -1, -1), other.expand(-1, 3, -1, -1)
    return one, other


def _batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Give consecutive pairs of one shape together."""
    first = 0
    for last in range(1, len(pairs) + 1):
        if last == len(pairs) or [one.shape for one in pairs[last]] != [one.shape for one in pairs[first]]:
            ones, others = zip(*pairs[first:last], strict=True)
            yield torch.cat(ones), torch.cat(others)
            first = last
