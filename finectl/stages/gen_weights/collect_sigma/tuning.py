"""Sigma (or scalers) and biases of models that start from one learngene and are tuned, each on a task at a depth.

It is what `init --method fine` does on the task's data. Tasks are tuned one after another, or by several processes
(`finectl.training.gan.workers`).

Reference: FINE, arXiv 2409.19289, section 3.3; tasks in the place of target data sets are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.adapters.sigma_dataset import task_name
from finectl.adapters.weight_dataset import concept_file, write_concept
from finectl.artifacts.files import remove_tree
from finectl.artifacts.job import Job
from finectl.artifacts.store import Workspace, open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.console import Console
from finectl.data.classes import have_same_labels
from finectl.data.concepts import Concept
from finectl.data.dataset import load
from finectl.data.sources import describe
from finectl.data.tasks import data_of
from finectl.errors import ComputationError
from finectl.initializers.base import Request
from finectl.initializers.expansion import condensed_model, freeze, place_curves
from finectl.initializers.tuning import tune
from finectl.metrics.heldout_loss import heldout_evaluator
from finectl.models.io import checkpoint_file
from finectl.models.learngene import Learngene, dense_config, load_learngene
from finectl.models.presets import LAYER_TYPES
from finectl.training.device import resolve_device
from finectl.training.gan.workers import Pieces
from finectl.training.log import read_log
from finectl.training.settings import DataFields, data_options


@dataclass(frozen=True)
class Tuning(DataFields):
    """How models are tuned, for all tasks the same: the fields that `init` has of it."""

    sigma: str
    depth_scale: float
    tune_steps: int
    tune_lr: float
    batch_size: int
    seed: int
    tune_samples: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Item:
    """A task at a depth."""

    concept: Concept
    depth: int

    @property
    def name(self) -> str:
        """Its name; its file is named after it."""
        return task_name(self.concept.name, self.depth)


class Asked:
    """Whether somebody asks to stop, as a job wants to know it."""

    def __init__(self, interrupted: Callable[[], bool]) -> None:
        self._interrupted = interrupted

    @property
    def requested(self) -> bool:
        """Whether somebody does."""
        return self._interrupted()


@dataclass(frozen=True, kw_only=True)
class SigmaWork(Pieces):
    """What a process needs to tune models; it can be sent to another.

    Args:
        learngene: Path of the learngene.
        tuning: How.
        keep: Updates whose values are kept.
    """

    learngene: Path
    tuning: Tuning
    keep: tuple[int, ...]

    def opened(self) -> Learngene:
        """Return what a process opens once, for all that it does."""
        return load_learngene(open_artifact(self.learngene, ["learngene"]))

    def do(self, opened: Learngene, item: Item, interrupted: Callable[[], bool]) -> float | None:
        """Tune one model and write its values in one atomic file, or a note that it diverged.

        Returns:
            The held-out loss of its last weights; None when it diverged.

        Raises:
            Interrupted: somebody asked to stop; the state is saved.
        """
        folder = self.state / item.name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            kept, record = self._tuned(opened, item, folder, interrupted)
        except ComputationError as error:
            self.leave_out(item.name, error)
            return None
        write_concept(self.directory / concept_file(item.name), kept, record)
        remove_tree(folder)
        return float(record["heldout_loss"][1])

    def _tuned(
        self, learngene: Learngene, item: Item, folder: Path, interrupted: Callable[[], bool]
    ) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
        request = self._request(learngene, item, folder, interrupted)
        config, job = request.job.config, request.job
        device = resolve_device(job.execution.device)
        start = place_curves(learngene, item.depth, config.sigma, config.depth_scale)
        model, rest = condensed_model(request, learngene, start)
        freeze(model, copied=rest, biases=True)
        held = load(config.data, "heldout", config.image_size, replace(data_options(config, job), flip=False))
        tuned = tune(
            request,
            model,
            block_lr=config.tune_lr,
            source=learngene.config,
            heldout=heldout_evaluator(held, device, diffusion=request.target.diffusion),
            keep_at=",".join(map(str, self.keep)),
        )
        losses = [entry["heldout_loss"] for entry in read_log(folder / "log.jsonl") if "heldout_loss" in entry]
        kept = []
        for update in self.keep:
            path = folder / checkpoint_file(update)
            state = load_tensors(path) if path.exists() else tuned.state
            kept.append(curves_of(state, learngene, item.depth))
        record = {"prompt": item.concept.prompt, "depth": item.depth, "images": request.data.train_count}
        return kept, {**record, "heldout_loss": [losses[0], losses[-1]]}

    def _request(self, learngene: Learngene, item: Item, folder: Path, interrupted: Callable[[], bool]) -> Request:
        """Return what `init` would be asked for."""
        named = data_of(item.concept)
        tuning = replace(self.tuning, data=named)
        # The time limit is that of all models, and the one who hands them out keeps it.
        execution = replace(self.execution, max_minutes=0.0, workers=0)
        job: Job[Any] = Job(
            config=tuning,
            execution=execution,
            parents=(),
            directory=folder,
            state=folder,
            console=Console(quiet=True),
            interrupt=Asked(interrupted),  # type: ignore[arg-type]
            workspace=Workspace(folder),
        )
        data = describe(named, tuning.image_size, data_options(tuning, job))
        source = open_artifact(self.learngene, ["learngene"])
        sizes = {"image_size": data.image_size, "channels": data.channels, "num_classes": data.num_classes}
        job = replace(job, config=replace(tuning, tune_samples=data.train_count), data=data)
        target = replace(dense_config(learngene.config, item.depth), **sizes)  # type: ignore[arg-type]
        return Request(target, data, have_same_labels(source.manifest.data, data), source, job)


def curves_of(state: Mapping[str, Tensor], learngene: Learngene, depth: int) -> dict[str, Tensor]:
    """Return what the layers of a model own, `<name>.<type>` to (L, ...), in the order of the learngene's curves."""
    found = {}
    for name in learngene.curves:
        what, kind = name.split(".")
        layers = [state[f"blocks.{index}.{LAYER_TYPES[kind]}.{what}"].cpu() for index in range(depth)]
        found[name] = torch.stack(layers)
    return found
