"""What generated weights make of images: a loss beside that of the blocks, and a judge of checkpoints.

Errors of weights do not count alike: some change no image, and some spoil all. So the network also learns from the
images of the training concepts, through the generator that the weights belong to. In step with the blocks' loss a few
concepts are drawn, all their blocks are predicted from noise, as a prediction is made, and the mean absolute difference
between what the adapted generator makes and the edited images is taken.

Reference: arXiv 2407.11966, section 4.4, tries the like and reports no gain; arXiv 2506.06105, section 3, finds one for
language models.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import functional_call

from finectl.adapters.lora import attach_lora
from finectl.adapters.weight_dataset import WeightDataset
from finectl.data.concepts import Concept
from finectl.data.order import batch_indices
from finectl.diffusion.losses import Denoiser, Noised
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.recovery import clean_of
from finectl.training.gan.adapting import Adapter, Task
from finectl.training.gan.pairs import Batch, PairStream, Texts, levels_to_float
from finectl.training.gan.settings import GanSettings
from finectl.training.weights.blocks import BlockLoss
from finectl.training.weights.collection import Collection
from finectl.training.weights.files import require_images
from finectl.training.weights.fitting import Judge
from finectl.training.weights.generate import Codec

PAIRS_A_CONCEPT = 16
JUDGED_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Studio:
    """The generator that the weights belong to, and the pairs of concepts.

    Args:
        adapter: Opened base and pairs.
        concepts: Of the collection, by name.
        device: Where the work is done.
    """

    adapter: Adapter
    concepts: Mapping[str, Concept]
    device: torch.device

    @classmethod
    def of(cls, dataset: WeightDataset, device: torch.device, seed: int) -> Studio:
        """Open what a collection was made from.

        Raises:
            InputError: it is gone.
        """
        base, pairs = require_images(dataset.artifact)
        settings = GanSettings(steps=1, batch_size=PAIRS_A_CONCEPT, lr=0.0, lr_discriminator=0.0, seed=seed)
        rows = tuple(int(row) for row in dataset.config["rows"])
        task = Task(base.path, pairs.path, dataset.layers, settings, rows, (), str(device), dataset.config["weights"])
        return cls(Adapter(task), {concept.name: concept for concept in dataset.concepts}, device)

    @cached_property
    def model(self) -> torch.nn.Module:
        """The base with adapters; normalisations work by the statistics of a batch, as they do when it is trained."""
        attached = attach_lora(copy.deepcopy(self.adapter.generator).to(self.device), self.adapter.task.layers)
        return attached.requires_grad_(False).train()

    def l1(self, lora: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the mean absolute difference between what the base makes with adapters and the edited images, ()."""
        made = functional_call(self.model, dict(lora), (batch.x, *batch.text))
        return (made.float() - batch.y).abs().mean()

    def stream(self, name: str) -> PairStream:
        """Return the training batches of a concept."""
        return self.adapter.stream(self.concepts[name])

    def heldout(self, name: str) -> Batch:
        """Return the first validation pairs of a concept; training pairs where there are none."""
        pairs, concept = self.adapter.pairs, self.concepts[name]
        rows = pairs.rows("val")[:JUDGED_IMAGES]
        rows = rows if len(rows) else pairs.rows("train")[:JUDGED_IMAGES]
        x, y = (levels_to_float(part, self.device) for part in (pairs.source_rows(rows), pairs.target_rows(name, rows)))
        return Batch(x, y, _text_rows(self.adapter.texts(concept), len(rows), self.device))


def _text_rows(texts: Texts | None, count: int, device: torch.device) -> tuple[Tensor, ...]:
    if texts is None:
        return ()
    return tuple(part.to(device) for part in texts.rows(torch.zeros(count, dtype=torch.int64)))


@dataclass(frozen=True, eq=False)
class ImageLoss:
    """The blocks' loss, and that of the images that training concepts' generated weights make.

    Args:
        blocks: Of the blocks.
        studio: Of the images.
        codec: Between weights and what the network sees, on the device.
        train: The training concepts.
        weight: What the images' loss counts beside that of the blocks.
        concepts: How many are drawn an update.
        times: First timestep, and one past the last.
        seed: Of all that is drawn.
    """

    blocks: BlockLoss
    studio: Studio
    codec: Codec
    train: Collection
    weight: float
    concepts: int
    times: tuple[int, int]
    seed: int

    def __call__(self, model: Denoiser, schedule: NoiseSchedule, batch: Noised, *, step: int) -> Tensor:
        """Return each block's loss and the images', (B,); see `finectl.training.run.Loss`."""
        losses = self.blocks(model, schedule, batch, step=step)
        return losses + self.weight * self.of_images(model, schedule, step)

    def of_images(self, model: Denoiser, schedule: NoiseSchedule, step: int) -> Tensor:
        """Return the mean absolute difference of the concepts of a step, ()."""
        drawn = generator_for("images", self.seed, step)
        places = batch_indices(len(self.train.names), self.concepts, step, self.seed).tolist()
        found = [self._of_concept(model, schedule, place, step, drawn) for place in places]
        return torch.stack(found).mean()

    def _of_concept(
        self, model: Denoiser, schedule: NoiseSchedule, place: int, step: int, drawn: torch.Generator
    ) -> Tensor:
        rows = self.train.texts_of[place]
        row = rows[int(torch.randint(len(rows), (), generator=drawn))]
        time = int(torch.randint(*self.times, (), generator=drawn))
        blocks, device = self.codec.layout.blocks, self.studio.device
        noise = torch.randn((blocks, 1, 1, self.codec.length), generator=drawn).to(device)
        t = torch.full((blocks,), time, device=device)
        predicted = model(noise, t, row * blocks + torch.arange(blocks, device=device)).float()
        values = clean_of(schedule, predicted, noise, t)[:, 0, 0]  # (N, L)
        lora = self.codec.layout.unpack(self.codec.decode(values))
        return self.studio.l1(lora, self.studio.stream(self.train.names[place])(step))


@dataclass(frozen=True, eq=False)
class ImageJudge:
    """Tells how much of what the mean weights leave of the images one step takes away.

    Args:
        judge: Of the same concepts' weights.
        studio: Of the images.
        names: Of the concepts.
    """

    judge: Judge
    studio: Studio
    names: Sequence[str]

    @cached_property
    def batches(self) -> list[Batch]:
        """The held-out pairs of each concept."""
        return [self.studio.heldout(name) for name in self.names]

    @cached_property
    def usual(self) -> float:
        """L1 of the mean weights."""
        return self._l1(torch.zeros_like(self.judge.wanted))

    def score(self, denoiser: Denoiser, t: int) -> float:
        """Return 1 - L1 / L1 of the mean weights, over all concepts."""
        return 1 - self._l1(self.judge.predicted(denoiser, t)) / max(self.usual, 1e-12)

    @torch.no_grad()
    def _l1(self, z: Tensor) -> float:
        codec, total = self.judge.codec, 0.0
        for values, batch in zip(z, self.batches, strict=True):
            lora = codec.layout.unpack(codec.normaliser.restore(values))
            moved = {name: value.to(self.studio.device) for name, value in lora.items()}
            total += float(self.studio.l1(moved, batch))
        return total / max(len(self.batches), 1)
