"""One run: a concept fine-tuned from a start, measured on the test images after some of its updates.

Everything here can be sent to another process; a run is resumable and its result one atomic file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finectl.adapters.lora import LoraLayer
from finectl.adapters.weight_dataset import concept_file, open_weights
from finectl.artifacts.files import remove_tree, write_json
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.console import Console
from finectl.data.concepts import Concept
from finectl.data.images import to_uint8
from finectl.diffusion.random import generator_for
from finectl.errors import ComputationError
from finectl.metrics.features import ExtractorInfo
from finectl.metrics.pairs.measure import PairMeter
from finectl.metrics.starts import TunedRun, run_to
from finectl.models.gan.config import discriminator_for, preset
from finectl.models.gan.discriminator import PatchDiscriminator
from finectl.models.gan.generator import Generator, initialize_
from finectl.models.text import load_text
from finectl.stages.gen_weights.report.config import (
    PIX2PIX,
    PIX2PIX_LR,
    Run,
    picture_file,
    pictured_places,
    result_file,
)
from finectl.training.gan.adapted import crucial_layers, edited, merged_generator, of_layers, wanted
from finectl.training.gan.adapting import Adapter
from finectl.training.gan.loop import Place, fit_gan
from finectl.training.gan.settings import GanSettings
from finectl.training.gan.workers import Work
from finectl.training.weights.generate import load_generator
from finectl.training.weights.starts import StartMaker


@dataclass(frozen=True, kw_only=True)
class Comparison(Work):
    """What a process needs for any run; see `finectl.training.gan.workers.Work`.

    Args:
        generator: Path of the generator of weights.
        collection: Path of the collection.
        concepts: All that are compared on: prompts are shuffled among them.
        at: Updates after which a run is measured.
        metrics: What is measured.
        inception: The network of clean FID, if that is.
        pictured: The runs of this seed keep pictures.
        pictures: So many of them.
        pix2pix: Updates of a generator from scratch.
    """

    generator: Path
    collection: Path
    concepts: tuple[Concept, ...]
    at: tuple[int, ...]
    metrics: tuple[str, ...]
    inception: ExtractorInfo | None
    pictured: int
    pictures: int
    pix2pix: int

    def opened(self) -> Bench:
        """See `Work.opened`."""
        return Bench(self)

    def do(self, opened: Bench, item: Run, interrupted: Callable[[], bool]) -> float | None:
        """Do a run and write its result.

        Returns:
            The L1 after its last update; None when it diverged.

        Raises:
            Interrupted: somebody asked to stop; the state is saved.
        """
        result = result_file(self.state, item)
        folder = result.with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder, folder, Console(quiet=True), replace(self.execution, max_minutes=0.0), interrupted)
        values: dict[str, dict[int, float]] = {name: {} for name in self.metrics}
        pictures: dict[str, Tensor] = {}
        try:
            states, seconds, start_s = opened.trained(item, place)
        except ComputationError:
            states, seconds, start_s = {}, 0.0, 0.0
        for step, generator in states.items():
            images = edited(opened.adapter, item.concept, generator(), opened.rows)
            for name, record in opened.meter.measure(images, wanted(opened.adapter, item.concept, opened.rows)).items():
                values[name][step] = record["value"]
            pictures[str(step)] = to_uint8(images[pictured_places(len(images), self.pictures)])
        if not states:  # a value that is none: the comparison leaves the concept out and says so
            values = {name: dict.fromkeys(self.at, float("nan")) for name in self.metrics}
        elif item.seed == self.pictured and self.pictures:
            save_tensors(picture_file(self.state, item), pictures)
        run = TunedRun(item.concept.name, item.concept.role, item.start, item.seed, values, seconds, start_s)
        write_json(result, run_to(run))
        remove_tree(folder)
        return values["l1"][max(values["l1"])] if states else None


class Bench:
    """What a process opens once: networks, images, the maker of starts and the meter.

    Args:
        work: What there is to do.
    """

    def __init__(self, work: Comparison) -> None:
        self.work = work
        self.adapter = Adapter(work.task)
        self.rows = self.adapter.pairs.rows("test")
        self.meter = PairMeter(work.metrics, work.inception, self.adapter.device)
        dataset = open_weights(open_artifact(work.collection))
        generator = load_generator(open_artifact(work.generator))
        encoder = load_text(generator.text)
        self.starts = StartMaker(dataset, encoder, generator, self._oracle, work.concepts)

    def _oracle(self, concept: Concept) -> Mapping[str, Tensor]:
        stacked = load_tensors(self.work.state / concept_file(concept.name))
        return {name: value.mean(0) for name, value in stacked.items()}

    def trained(self, run: Run, place: Place) -> tuple[dict[int, Callable[[], nn.Module]], float, float]:
        """Do the updates of a run.

        Returns:
            Update -> what builds the generator after it; the seconds of all updates; those of making the start.

        Raises:
            ComputationError: it diverged.
            Interrupted: somebody asked to stop; the state is saved.
        """
        return self._from_scratch(run, place) if run.start == PIX2PIX else self._adapted(run, place)

    def _adapted(self, run: Run, place: Place) -> tuple[dict[int, Callable[[], nn.Module]], float, float]:
        work, concept = self.work, run.concept
        start, start_s = self.starts.make(run.start, concept, run.seed)
        if not all(bool(value.isfinite().all()) for value in start.values()):
            raise ComputationError(f"the start {run.start} of {concept.name} is not finite")
        layers: tuple[LoraLayer, ...] = work.task.layers
        if run.start == "e2gan":
            layers = crucial_layers(layers)
        adapter = copy.copy(self.adapter)
        adapter.task = replace(
            work.task,
            layers=layers,
            settings=replace(work.task.settings, seed=run.seed),
            keep=tuple(step for step in work.at if step),
        )
        kept = adapter.train(concept, of_layers(start, layers), place)
        states = dict(zip([step for step in work.at if step], kept.kept, strict=True))
        loras = {step: {**start, **(states[step] if step else {})} for step in work.at}

        def build(step: int) -> Callable[[], nn.Module]:
            return lambda: merged_generator(adapter, concept, loras[step])

        return {step: build(step) for step in work.at}, float(kept.trained.cost["wall_s"]), start_s

    def _from_scratch(self, run: Run, place: Place) -> tuple[dict[int, Callable[[], nn.Module]], float, float]:
        """Train pix2pix's generator of 9 residual blocks, which has no text, on the concept alone.

        Reference: arXiv 1611.07004, section 6.
        """
        work, size = self.work, self.adapter.generator.config.image_size
        networks: list[Any] = [
            Generator(preset(PIX2PIX, size)),
            PatchDiscriminator(discriminator_for(PIX2PIX, size)),
        ]
        for number, network in enumerate(networks):
            initialize_(network, generator_for("pix2pix", run.seed, number))
            network.to(self.adapter.device)
        settings: GanSettings = replace(
            work.task.settings, seed=run.seed, steps=work.pix2pix, lr=PIX2PIX_LR, lr_discriminator=PIX2PIX_LR
        )
        trained = fit_gan(
            place, networks[0], networks[1], replace(self.adapter.stream(run.concept), seed=run.seed), settings
        )
        generator = trained.generator.eval()
        return {work.pix2pix: lambda: generator}, float(trained.cost["wall_s"]), 0.0
