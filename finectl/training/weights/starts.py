"""Where fine-tuning can start from: what a collection of LoRAs gives without a generator, and what one predicts.

All of them but the prediction are what a generator of weights has to beat: the shared start, the mean, the LoRA of the
nearest text, a regression, a LoRA with noise, and the concept's own LoRA, which is more than any of them can know.

Reference: arXiv 2506.07998, section 5, holds generated weights against means and noised training weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from finectl.adapters.weight_dataset import WeightDataset
from finectl.data.concepts import TRAINABLE, Concept, select
from finectl.diffusion.random import generator_for
from finectl.errors import InputError, UsageError
from finectl.models.text import TextEncoder
from finectl.models.weights.unet import pool
from finectl.registry import nearest as suggestion
from finectl.training.weights.generate import Sampling, WeightGenerator
from finectl.training.weights.names import DRAWN, PREDICTED, STARTS

Lora = dict[str, Tensor]

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Regularisers that are tried, in mean squares of a text's features."""
USUAL_RIDGE = 0.1
"""Where no validation concept is there to choose by."""


@dataclass(frozen=True, eq=False)
class Known:
    """The training LoRAs of a collection as rows of numbers, and the features of their texts.

    Args:
        names: Of the training concepts.
        rows: (C, D), float32: each concept's LoRA, the mean of its checkpoints, all tensors one after another.
        initial: (D,), the shared start.
        features: (C, V, E): of each concept's texts, centred; concepts with fewer texts repeat theirs.
        centre: (E,), what the features are centred by.
        regulariser: Of the regression.
    """

    names: tuple[str, ...]
    rows: Tensor
    initial: Tensor
    features: Tensor
    centre: Tensor
    regulariser: float

    @cached_property
    def mean(self) -> Tensor:
        """(D,), the mean of all of them."""
        return self.rows.double().mean(0).float()

    @cached_property
    def weights(self) -> Tensor:
        """(E, D), the regression of what is above the mean on the features."""
        return ridge(self.features, (self.rows - self.mean).double(), self.regulariser).float()


class StartMaker:
    """Makes starts of fine-tuning for concepts.

    Args:
        dataset: The collection.
        encoder: Of texts.
        generator: Of weights, if any.
        oracle: Returns the LoRA that was trained for a concept itself.
        others: The prompts among which those of `shuffled` are taken: not the concept's own.
    """

    def __init__(
        self,
        dataset: WeightDataset,
        encoder: TextEncoder,
        generator: WeightGenerator | None = None,
        oracle: Callable[[Concept], Mapping[str, Tensor]] | None = None,
        others: Sequence[Concept] = (),
    ) -> None:
        self.dataset, self.encoder, self.generator, self.oracle = dataset, encoder, generator, oracle
        self.trained = select(dataset.concepts, *TRAINABLE)
        if not self.trained:
            raise InputError(f"{dataset.artifact.path} has no concept for training", fix="finectl gen-weights collect")
        self.others = tuple(others)
        self.shapes = {name: tuple(value.shape) for name, value in dataset.initial.items()}

    def make(self, start: str, concept: Concept, seed: int) -> tuple[Lora, float]:
        """Return the LoRA that fine-tuning starts from, and the seconds that making it took.

        Args:
            start: A name of `STARTS`.
            concept: What is to be made.
            seed: Of the noise; only some starts have any.

        Raises:
            UsageError: there is no such start.
            InputError: it needs something that is not there.
        """
        if start not in STARTS:
            raise UsageError(
                f"--start {start!r}{suggestion(start, list(STARTS))}", expected=f"one of: {', '.join(STARTS)}"
            )
        if start not in ("lora", "e2gan", "oracle"):
            _ = self.known  # read once, and no part of any start's time
        start_s = time.perf_counter()
        lora = getattr(self, f"_{start}")(concept, seed)
        return lora, time.perf_counter() - start_s

    @cached_property
    def known(self) -> Known:
        """What the training concepts show."""
        texts = [self._pooled(concept.texts) for concept in self.trained]
        most = max(map(len, texts))
        features = torch.stack([one[torch.arange(most) % len(one)] for one in texts])  # (C, V, E)
        centre = features.mean((0, 1))
        rows = torch.stack([self._trained_row(concept) for concept in self.trained])
        known = Known(
            tuple(concept.name for concept in self.trained),
            rows,
            self._row(self.dataset.initial),
            features - centre,
            centre,
            USUAL_RIDGE,
        )
        return self._regularised(known)

    def _regularised(self, known: Known) -> Known:
        """Choose the regulariser on the validation concepts of the collection."""
        held = select(self.dataset.concepts, "val")
        if not held:
            return known
        wanted = torch.stack([self._trained_row(concept) for concept in held]) - known.mean
        given = torch.stack([self._pooled([concept.prompt])[0] for concept in held]) - known.centre
        above = (known.rows - known.mean).double()

        def error(regulariser: float) -> float:
            weights = ridge(known.features, above, regulariser)
            return float((given.double() @ weights - wanted.double()).square().sum())

        best = min(RIDGES, key=error)
        return Known(known.names, known.rows, known.initial, known.features, known.centre, best)

    def _lora(self, concept: Concept, seed: int) -> Lora:
        return self.dataset.initial

    _e2gan = _lora

    def _mean(self, concept: Concept, seed: int) -> Lora:
        return self._unrow(self.known.mean)

    def _nearest(self, concept: Concept, seed: int) -> Lora:
        return self._unrow(self.known.rows[self._nearest_index(concept)])

    def _ridge(self, concept: Concept, seed: int) -> Lora:
        features = self._pooled([concept.prompt])[0] - self.known.centre
        return self._unrow(self.known.mean + features @ self.known.weights)

    def _noised(self, concept: Concept, seed: int) -> Lora:
        """Return the neighbour with noise: tensor by tensor as far from it as the prediction is.

        Without a generator it is as far as the training LoRAs are from their mean.
        """
        neighbour = self._nearest(concept, seed)
        if self.generator is None:
            spread = self._unrow((self.known.rows - self.known.mean).double().square().mean(0).sqrt().float())
            distances = {name: float(value.norm()) for name, value in spread.items()}
        else:
            predicted = self._prediction(concept, seed)
            distances = {name: float((predicted[name] - value).norm()) for name, value in neighbour.items()}
        generator, noised = generator_for("noised", seed), {}
        for name, value in neighbour.items():
            noise = torch.randn(value.shape, generator=generator)
            noised[name] = value + noise * (distances[name] / max(float(noise.norm()), 1e-12))
        return noised

    def _prediction(self, concept: Concept, seed: int) -> Lora:
        return self._predicted(concept.prompt, seed)

    def _shuffled(self, concept: Concept, seed: int) -> Lora:
        return self._predicted(self.other_prompt(concept, seed), seed)

    def _oracle(self, concept: Concept, seed: int) -> Lora:
        if any(one.name == concept.name for one in self.dataset.concepts):
            return self._unrow(self._trained_row(concept))
        if self.oracle is None:
            raise InputError(f"{self.dataset.artifact.path} has no weights of {concept.name}", expected="another start")
        return dict(self.oracle(concept))

    def other_prompt(self, concept: Concept, seed: int) -> str:
        """Return the prompt of another concept: with every seed one further on, and never one that is its own."""
        names = [one.name for one in self.others]
        pool_of = self.others if len(names) > 1 else (*self.others, *self.trained)
        place = next((index for index, one in enumerate(pool_of) if one.name == concept.name), 0)
        others = [one for one in (*pool_of[place:], *pool_of[:place]) if one.name != concept.name]
        return others[seed % len(others)].prompt

    def _predicted(self, prompt: str, seed: int) -> Lora:
        if self.generator is None:
            raise InputError(
                f"the starts {', '.join(PREDICTED)} need a generator of weights", fix="finectl gen-weights train"
            )
        texts = self.generator.encode([prompt])
        sampling = Sampling(self.generator.t_star, seed=seed)
        return {name: value.cpu() for name, value in self.generator.lora(texts, sampling).items()}

    def nearest_name(self, concept: Concept) -> str:
        """Return the training concept whose prompt is nearest."""
        return self.known.names[self._nearest_index(concept)]

    def _nearest_index(self, concept: Concept) -> int:
        mine = self._pooled([concept.prompt])[0] - self.known.centre
        prompts = self.known.features[:, 0]  # (C, E)
        return int(torch.nn.functional.cosine_similarity(prompts, mine[None]).argmax())

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        """Return the mean vectors of texts, float32 (V, E)."""
        tokens, mask = self.encoder.encode(texts)
        return pool(tokens, mask).cpu()

    def _trained_row(self, concept: Concept) -> Tensor:
        return self._row({name: value.mean(0) for name, value in self.dataset.checkpoints(concept).items()})

    def _row(self, lora: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([lora[name].float().flatten() for name in self.shapes])

    def _unrow(self, row: Tensor) -> Lora:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = row.split(sizes)
        return {
            name: part.reshape(shape).clone() for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def ridge(features: Tensor, values: Tensor, regulariser: float) -> Tensor:
    """Return the ridge regression of the concepts' values on the features of each of their texts.

    Args:
        features: (C, V, E), centred; each concept counts once, however many texts it has.
        values: (C, D), float64, centred.
        regulariser: In mean squares of the features.

    Returns:
        float64 (E, D).
    """
    count, variants, width = features.shape
    x = features.double().reshape(-1, width)
    covariance = x.T @ x / variants
    cross = features.double().mean(1).T @ values  # (E, D)
    unit = covariance.trace() / count
    return torch.linalg.solve(covariance + regulariser * unit * torch.eye(width, dtype=torch.float64), cross)


def drawn(start: str) -> bool:
    """Tell whether a start is another one with another seed."""
    return start in DRAWN
