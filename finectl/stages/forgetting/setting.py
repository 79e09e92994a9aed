"""What the analyses have in common: both models, images of both domains, device and checks for signals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.data.bank import open_bank
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataInfo, DataOptions
from finectl.models.io import load_model, read_config
from finectl.stages.forgetting.config import Config
from finectl.stages.forgetting.subjects import FINETUNED, PRETRAINED, Subjects
from finectl.training.device import resolve_device

SOURCE, TARGET = "source", "target"


@dataclass
class Setting:
    """The models and images of a run, each read when it is first needed.

    Args:
        job: The run.
        subjects: What is compared.
    """

    job: Job[Config]
    subjects: Subjects

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.job.execution.device, self.job.world.local_rank)

    def artifact(self, model: str) -> Artifact:
        """Return the artifact of `FINETUNED` or `PRETRAINED`."""
        return {FINETUNED: self.subjects.finetuned, PRETRAINED: self.subjects.pretrained}[model]

    def network(self, model: str) -> Any:
        """Return a model on the device, in evaluation mode."""
        network = load_model(self.artifact(model), self.job.config.weights)
        return network.to(self.device).eval().requires_grad_(False)

    def null_label(self, model: str) -> int:
        """Return the label that stands for no class in a model; one without classes does not read it."""
        return read_config(self.artifact(model)).num_classes

    def images(self, which: str, split: str, count: int) -> ImageSet:
        """Return a fixed, class-balanced part of the images of a domain.

        Args:
            which: `SOURCE` or `TARGET`; those of the source are the bank's where its data are not at hand.
            split: "train" or "heldout".
            count: Images, at most.
        """
        subjects = self.subjects
        if which == TARGET:
            found = self._load(subjects.target, subjects.fields, split)
        elif subjects.source is not None:
            found = self._load(subjects.source, subjects.source_fields, split)
        else:
            found = self.bank()
        return found.subset(min(count, len(found)), self.job.config.seed)

    def bank(self) -> ImageSet:
        """Return the images of the bank, labelled as no class of theta_0."""
        if self.subjects.bank is None:
            raise ValueError("a run without a bank")
        return open_bank(self.subjects.bank, self.null_label(PRETRAINED))

    def _load(self, info: DataInfo, fields: dict[str, Any], split: str) -> ImageSet:
        options = DataOptions(
            resize_filter=fields["resize_filter"],
            skip_bad=fields["skip_bad"],
            console=self.job.console,
            check=self.job.stop_if_requested,
        )
        return load(info.name, split, info.image_size, options)

    def check(self) -> None:
        """Leave when a signal asked for it; the analyses that are done are kept."""
        kept = any(self.job.state.glob("*.json"))
        self.job.stop_if_requested((lambda: None) if kept else None)


def unlabelled(images: ImageSet, null_label: int) -> ImageSet:
    """Return the same images, all of the label that stands for no class."""
    rows: Tensor = torch.full((len(images.store.labels),), null_label, dtype=torch.int64)
    return replace(images, rows=rows)
