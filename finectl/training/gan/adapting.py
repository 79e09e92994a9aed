"""Fine-tuning of a base GAN to one concept: low-rank adapters and normalisations of the generator, and a discriminator.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, sections 4.1 and 4.4; E2GAN, arXiv 2401.06127, section 3.3.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finectl.adapters.lora import LoraLayer, attach_lora, load_lora, lora_state
from finectl.artifacts.store import open_artifact
from finectl.data.concepts import Concept
from finectl.data.pairs import Pairs, open_pairs
from finectl.models.gan.generator import Generator
from finectl.models.gan.io import load_discriminator, load_generator, read_gan
from finectl.models.text import TextEncoder, load_text
from finectl.training.device import Arithmetic, resolve_device
from finectl.training.gan.loop import Place, TrainedGan, fit_gan, make_adam, train_step
from finectl.training.gan.pairs import PairStream, Texts, heldout_l1, recompute_on
from finectl.training.gan.settings import GanSettings
from finectl.training.gan.state import Players
from finectl.training.log import read_log

TIMED_STEPS = 3


@dataclass(frozen=True)
class Task:
    """What all concepts of a collection have in common; it can be sent to another process.

    Args:
        base: Path of the GAN.
        pairs: Path of the pairs.
        layers: The adapted layers.
        settings: How they are trained.
        rows: The source images that training uses.
        keep: Updates whose weights are kept.
        device: As `--device` names it.
        weights: `ema` or `raw`: which weights of the generator.
        orders: In how many orders of the data each concept is trained, each time from the same start.
    """

    base: Path
    pairs: Path
    layers: tuple[LoraLayer, ...]
    settings: GanSettings
    rows: tuple[int, ...]
    keep: tuple[int, ...] = ()
    device: str = "cpu"
    weights: str = "ema"
    orders: int = 1


@dataclass(frozen=True)
class Adapted:
    """What came of one concept.

    Args:
        kept: The adapters' weights after each update that was to be kept.
        record: The course of the losses, without times.
        trained: Both networks and the cost; batch normalisations have the statistics of training, see `recompute_on`.
    """

    kept: list[dict[str, Tensor]]
    record: dict[str, Any]
    trained: TrainedGan


class Adapter:
    """Trains adapters of one base, for one concept after another.

    Args:
        task: What they have in common.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.device = resolve_device(task.device)
        base = open_artifact(task.base, ["gan"])
        self.pairs: Pairs = open_pairs(open_artifact(task.pairs, ["pairs"]))
        self.rows = torch.tensor(task.rows)
        self.generator: Generator = load_generator(base, task.weights)
        self.discriminator: nn.Module = load_discriminator(base)
        text = read_gan(base).text
        self.encoder: TextEncoder | None = load_text(text, self.device) if text else None

    def texts(self, concept: Concept) -> Texts | None:
        """Return the encoded texts of one concept; None where the generator has no text."""
        return Texts.of(self.encoder, [concept.texts]) if self.encoder else None

    def networks(self, start: Mapping[str, Tensor]) -> tuple[nn.Module, nn.Module]:
        """Return the base's generator with adapters that hold `start`, and the base's discriminator: new copies."""
        generator = attach_lora(copy.deepcopy(self.generator).to(self.device), self.task.layers)
        load_lora(generator, self.task.layers, start)
        return generator, copy.deepcopy(self.discriminator).to(self.device)

    def stream(self, concept: Concept, order: int = 0) -> PairStream:
        """Return the batches of a concept: in the same orders for all of them."""
        settings, texts = self.task.settings, self.texts(concept)
        seed = settings.seed + order
        return PairStream(self.pairs, self.rows, (concept.name,), texts, settings.batch_size, seed, self.device)

    def train(self, concept: Concept, start: Mapping[str, Tensor], place: Place, order: int = 0) -> Adapted:
        """Train the adapters of one concept.

        Args:
            concept: It has targets in the pairs.
            start: What the adapters hold at the beginning.
            place: Where state and log go, and whether somebody asks to stop.
            order: Of the data, which one.

        Raises:
            ComputationError: a loss is not finite.
            Interrupted: somebody asked to stop; the state is saved.
        """
        task, stream = self.task, self.stream(concept, order)
        generator, discriminator = self.networks(start)
        held = self.pairs.rows("val")
        measure = heldout_l1(self.pairs, held, (concept.name,), stream.texts, self.device)

        def measured(model: nn.Module) -> float:
            recompute_on(model, stream)
            return measure(model)

        trained = fit_gan(
            place,
            generator,
            discriminator,
            stream,
            task.settings,
            heldout=measured if len(held) else None,
            keep=task.keep or (task.settings.steps,),
        )
        kept = [self._in_order(trained.kept[update]) for update in sorted(trained.kept)]
        return Adapted(kept or [lora_state(generator, task.layers)], record_of(place.directory), trained)

    def _in_order(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: state[name] for layer in self.task.layers for name in layer.shapes}

    def seconds_a_step(self, concept: Concept, start: Mapping[str, Tensor]) -> float:
        """Measure an update, averaged over the run: those with the discriminator take longer."""
        settings = self.task.settings
        generator, discriminator = self.networks(start)
        players = Players(
            generator,
            discriminator,
            make_adam(generator, settings.lr),
            make_adam(discriminator, settings.lr_discriminator),
        )
        stream, arithmetic = self.stream(concept), Arithmetic.of(self.device, "float32")
        late = 1 - min(settings.first_adversarial, settings.steps) / max(settings.steps, 1)
        total = 0.0
        for share, gan_from in ((1 - late, 1.0), (late, 0.0)):
            if share:
                timed = replace(settings, gan_from=gan_from)
                train_step(players, stream(0), timed, 0, arithmetic)
                start_s = time.monotonic()
                for step in range(TIMED_STEPS):
                    float(train_step(players, stream(step), timed, step, arithmetic)[0])
                total += share * (time.monotonic() - start_s) / TIMED_STEPS
        return total


def record_of(directory: Path) -> dict[str, Any]:
    """Return the losses that a run logged, by name, each as [step, value]; its times are left out."""
    found: dict[str, list[list[float]]] = {}
    for entry in read_log(directory / "log.jsonl"):
        for name, value in entry.items():
            if name not in ("step", "seconds"):
                found.setdefault(name, []).append([entry["step"], value])
    return dict(found)
