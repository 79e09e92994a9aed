"""The reference's part in `evaluate`: its images, their features, and statistics that are kept for the next time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from finectl.artifacts.byproduct import find_byproduct, publish_byproduct
from finectl.artifacts.chunks import CHUNK_IMAGES, Chunks, Shares
from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.console import Progress
from finectl.data.dataset import load, load_both
from finectl.data.files import open_files
from finectl.data.sources import DataOptions
from finectl.errors import UsageError
from finectl.metrics import METRICS
from finectl.metrics.extraction import FeatureExtraction
from finectl.metrics.features import Extractor
from finectl.metrics.measure import Against
from finectl.metrics.reference import FILE, KIND, ReferenceInfo
from finectl.metrics.sources import DataImages, FileImages, Source
from finectl.metrics.statistics import Statistics, fit, load_npz
from finectl.metrics.statistics import load as load_statistics
from finectl.metrics.statistics import save as save_statistics
from finectl.models.vae import find_recorded, load_vae
from finectl.stages.evaluate.config import Config
from finectl.stages.evaluate.setup import Setup, extractor_key, needs_reference
from finectl.training.settings import data_options


@dataclass(eq=False)
class ReferenceWork:
    """The reference of a run.

    Args:
        job: The run.
        setup: What it means.
        extractors: The networks.
        device: Where to compute.
        shares: How the processes share chunks.
    """

    job: Job[Config]
    setup: Setup
    extractors: Mapping[str, Extractor]
    device: torch.device
    shares: Shares

    @cached_property
    def info(self) -> ReferenceInfo:
        """What it is."""
        if self.setup.reference is None:
            raise UsageError("there is no reference")
        return self.setup.reference

    @cached_property
    def images(self) -> Source:
        """Its images; those of latents are decoded."""
        options = data_options(self.job.config, self.job)
        if self.info.form == "files":
            return FileImages(open_files(self.info.location.partition(":")[2], options))
        size, vae = self.info.image_size, None
        if self.info.latents is not None:
            recorded = self.job.config.vae or find_recorded(self.info.latents, self.info.name)["name"]
            vae = load_vae(recorded, self.device)
            size //= int(self.info.latents["downscale"])
        still = DataOptions(options.resize_filter, False, options.skip_bad, options.console, options.check)
        if self.info.part == "train":
            return DataImages(load(self.info.location, "train", size, still), vae)
        return DataImages(load_both(self.info.location, size, still), vae)

    @cached_property
    def missing(self) -> list[str]:
        """The networks in which its images have to be measured, looked up before anything is published."""
        if self.setup.reference is None or self.info.form not in ("data", "files"):
            return []
        return [key for key in self.extractors if self._outputs(key) and self._kept(key) is None]

    @property
    def images_to_measure(self) -> int:
        """How many images that are, over all processes."""
        return len(self.missing) * (self.info.count or 0) if self.missing else 0

    def measure(self, progress: Progress) -> None:
        """Compute this process's chunks of the features."""
        for key in self.missing:
            wanted = {key: self._outputs(key)}
            with FeatureExtraction({key: self.extractors[key]}, wanted, self.job.execution.workers) as extraction:
                chunks = self._chunks(key)
                for span in self.shares.mine(chunks, progress):
                    read = self.images.open(span, self.shares.check)
                    self.shares.keep(chunks, span, extraction.extract(read, len(span), self.shares.check), progress)

    def fit(self) -> Against:
        """Return its statistics: kept ones, imported ones, or those of the features just computed."""
        if self.setup.reference is None:
            return Against("", {})
        found: dict[tuple[str, str], Statistics] = {}
        for key in self.extractors:
            if outputs := self._outputs(key):
                found.update({(key, output): one for output, one in self._statistics(key, outputs).items()})
        return Against(self.info.name, found)

    def _statistics(self, key: str, outputs: tuple[str, ...]) -> dict[str, Statistics]:
        path, count = Path(self.info.location), self.info.count or 0
        if self.info.form == "npz":
            return load_npz(path, outputs, self.extractors[key].outputs)
        if self.info.form == "statistics":
            return load_statistics(path, count, outputs)
        kept = self._kept(key)
        if kept is not None:
            return load_statistics(kept.file(FILE), count, outputs)
        fitted = fit(self._chunks(key), key, outputs)
        self._publish(key, fitted)
        return fitted

    def _outputs(self, key: str) -> tuple[str, ...]:
        """Return the outputs of a network in which something is compared with the reference."""
        names = [name for name in self.setup.metrics if needs_reference(name)]
        return tuple(sorted({METRICS[n].output for n in names if extractor_key(n, self.setup.options) == key}))

    def _chunks(self, key: str) -> Chunks:
        name = f"reference-{key}-{self.info.fingerprint[:8]}"
        return Chunks(self.job.state, name, self.info.count or 0, CHUNK_IMAGES)

    def _recipe(self, key: str) -> tuple[str, dict[str, Any]]:
        """Return the readable name, and all that decides the statistics, under which they are kept."""
        info = self.setup.extractors[key]
        last = self.info.name.rstrip("/").split("/")[-2:]
        slug = "-".join("".join(c if c.isalnum() else "-" for c in part).strip("-") for part in (*last, info.name))
        return slug, {
            "extractor": info.name,
            "extractor_digest": info.digest,
            "resize": info.resize,
            "dtype": self.setup.options.dtype,
            **{name: value for name, value in self.info.protocol().items() if name != "reference"},
            "part": self.info.part,
            "vae": (self.info.latents or {}).get("digest"),
            "outputs": list(self._outputs(key)),
        }

    def _kept(self, key: str) -> Artifact | None:
        return find_byproduct(self.job.workspace, KIND, *self._recipe(key))

    def _publish(self, key: str, statistics: Mapping[str, Statistics]) -> None:
        """Keep statistics as an artifact, for the next evaluation against the same reference."""
        slug, recipe = self._recipe(key)

        def write(directory: Path) -> dict[str, Any]:
            save_statistics(directory / FILE, statistics, {**recipe, **self.info.protocol()})
            return {"images": self.info.count}

        path = publish_byproduct(self.job, "evaluate", KIND, slug, recipe, self.job.data, write)
        if path is not None:
            self.job.console.note(f"statistics of the reference are kept: {path}")
