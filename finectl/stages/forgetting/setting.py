"""What the analyses have in common: both models, images of both domains, device and checks for signals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.job import Job
from finectl.artifacts.store import Artifact
from finectl.data.bank import open_bank
from finectl.data.captions import ALL, NONE
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataInfo, DataOptions
from finectl.models.io import load_model
from finectl.models.unet import condition
from finectl.stages.forgetting.config import Config
from finectl.stages.forgetting.subjects import FINETUNED, PRETRAINED, Subjects
from finectl.training.device import resolve_device
from finectl.training.texts import Captions, open_table

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
    _captions: dict[str, Captions] = field(default_factory=dict)

    @cached_property
    def device(self) -> torch.device:
        """Where to compute."""
        return resolve_device(self.job.execution.device, self.job.world.local_rank)

    def artifact(self, model: str) -> Artifact:
        """Return the artifact of `FINETUNED` or `PRETRAINED`."""
        return {FINETUNED: self.subjects.finetuned, PRETRAINED: self.subjects.pretrained}[model]

    def network(self, model: str, which: str) -> Any:
        """Return a model on the device, in evaluation mode; its labels are those of the images of a domain."""
        network = load_model(self.artifact(model), self.job.config.weights)
        self.condition(network, which)
        return network.to(self.device).eval().requires_grad_(False)

    def condition(self, network: Any, which: str) -> None:
        """Let the labels of a model of text stand for the captions of a domain; others are left as they are."""
        captions = self.captions(which)
        if captions is not None:
            condition(network, captions.table, 0.0)

    def captions(self, which: str) -> Captions | None:
        """Return the captions of a domain, those of a bank all empty; None for models of classes."""
        text = self.subjects.target.text
        if text is None:
            return None
        if which not in self._captions:
            info, fields = self._data(which)
            if info is None:
                table = open_table([], text, self.device, self.job.console, self.job.stop_if_requested)
                self._captions[which] = Captions(table, (), table.rows_of([]))
            else:
                options = self._options(fields)
                images = load(info.name, "heldout", info.image_size, options)
                self._captions[which] = Captions.opened(self.job, images, info, self.device, options)
        return self._captions[which]

    def images(self, which: str, split: str, count: int) -> ImageSet:
        """Return a fixed, class-balanced part of the images of a domain.

        Args:
            which: `SOURCE` or `TARGET`; those of the source are the bank's where its data are not at hand.
            split: "train" or "heldout".
            count: Images, at most.
        """
        info, fields = self._data(which)
        if info is None:
            found = self.bank()
        else:
            found = load(info.name, split, info.image_size, self._options(fields))
            captions = self.captions(which)
            found = captions.of(found) if captions is not None else found
        return found.subset(min(count, len(found)), self.job.config.seed)

    def bank(self) -> ImageSet:
        """Return the images of the bank; their labels are to be set."""
        if self.subjects.bank is None:
            raise ValueError("a run without a bank")
        return open_bank(self.subjects.bank)

    def _data(self, which: str) -> tuple[DataInfo | None, dict[str, Any]]:
        """Return the data of a domain and how they are read; None for a source of which there is a bank alone."""
        subjects = self.subjects
        return (subjects.target, subjects.fields) if which == TARGET else (subjects.source, subjects.source_fields)

    def _options(self, fields: dict[str, Any]) -> DataOptions:
        return DataOptions(
            resize_filter=fields["resize_filter"],
            skip_bad=fields["skip_bad"],
            console=self.job.console,
            check=self.job.stop_if_requested,
            captions=NONE if self.subjects.target.text is None else ALL,
        )

    def check(self) -> None:
        """Leave when a signal asked for it; the analyses that are done are kept."""
        kept = any(self.job.state.glob("*.json"))
        self.job.stop_if_requested((lambda: None) if kept else None)


def unlabelled(images: ImageSet, network: Any) -> ImageSet:
    """Return the same images, all of the label that stands for no class, or for no caption, in a network."""
    rows: Tensor = torch.full((len(images.store.labels),), network.config.num_classes, dtype=torch.int64)
    return replace(images, rows=rows)
