"""Batches of pairs with their texts, and what a generator does on pairs that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from finectl.data.images import to_uint8
from finectl.data.order import batch_indices
from finectl.diffusion.random import generator_for
from finectl.models.gan.generator import recompute_statistics
from finectl.models.text import TextEncoder

EVALUATED_AT_ONCE = 64
STATISTICS_BATCHES = 8


@dataclass(frozen=True)
class Batch:
    """Pairs of a step.

    Args:
        x: Sources, float32 (B, 3, H, W) in [-1, 1].
        y: Targets, likewise.
        text: What the generator is called with beside x: vectors (B, S, E) and mask (B, S); empty without text.
    """

    x: Tensor
    y: Tensor
    text: tuple[Tensor, ...]


@dataclass(frozen=True)
class Texts:
    """The encoded texts of concepts: each concept has one or several that mean the same.

    Args:
        tokens: float32 (V, S, E).
        mask: bool (V, S).
        first: For each concept the row of its first text.
        count: For each concept how many it has.
    """

    tokens: Tensor
    mask: Tensor
    first: tuple[int, ...]
    count: tuple[int, ...]

    @classmethod
    def of(cls, encoder: TextEncoder, texts: Sequence[Sequence[str]]) -> Texts:
        """Encode all texts of some concepts, each of which has at least one."""
        count = tuple(map(len, texts))
        first = tuple(sum(count[:place]) for place in range(len(count)))
        tokens, mask = encoder.encode([text for of_one in texts for text in of_one])
        return cls(tokens, mask, first, count)

    def rows(self, concepts: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return vectors (B, S, E) and mask (B, S) of concepts (B,): a text drawn for each, or the first one."""
        rows = torch.tensor(self.first)[concepts]
        if generator is not None:
            drawn = torch.rand(len(concepts), generator=generator)
            rows = rows + (drawn * torch.tensor(self.count)[concepts]).long()
        return self.tokens[rows.to(self.tokens.device)], self.mask[rows.to(self.mask.device)]


def levels_to_float(levels: Tensor, device: torch.device) -> Tensor:
    """Return uint8 levels as float32 in [-1, 1] on a device."""
    return levels.to(device).float() / 127.5 - 1


class PairRows(Protocol):
    """Pairs that are read row by row (`finectl.data.pairs.Pairs`)."""

    def source_rows(self, rows: Tensor) -> Tensor:
        """Return source images uint8 (B, 3, H, W) of rows (B,)."""

    def target_rows(self, concept: str, rows: Tensor) -> Tensor:
        """Return what a concept made of them, uint8 (B, 3, H, W)."""


@dataclass(frozen=True)
class PairStream:
    """Batches of training pairs as a pure function of (seed, step).

    Args:
        pairs: Where they are read.
        rows: The source images that training uses, int64 (N,).
        concepts: The names of the concepts that it uses.
        texts: Of these concepts; None for a generator without text.
        batch_size: Pairs a batch.
        seed: Of their order and of the choice among texts.
        device: Where batches go.
    """

    pairs: PairRows
    rows: Tensor
    concepts: tuple[str, ...]
    texts: Texts | None
    batch_size: int
    seed: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.rows) * len(self.concepts)

    def __call__(self, step: int) -> Batch:
        """Return the pairs of a step, counted from 0; an epoch has every pair of every concept once."""
        items = batch_indices(len(self), self.batch_size, step, self.seed)
        concepts, rows = items // len(self.rows), self.rows[items % len(self.rows)]
        sources = self.pairs.source_rows(rows)
        targets = torch.empty_like(sources)
        for concept in concepts.unique().tolist():
            mine = concepts == concept
            targets[mine] = self.pairs.target_rows(self.concepts[concept], rows[mine])
        text: tuple[Tensor, ...] = ()
        if self.texts is not None:
            text = self.texts.rows(concepts, generator_for("texts", self.seed, step))
        return Batch(
            levels_to_float(sources, self.device),
            levels_to_float(targets, self.device),
            tuple(part.to(self.device) for part in text),
        )


def recompute_on(generator: nn.Module, stream: PairStream) -> None:
    """Take the statistics of a generator's batch normalisations from its first training batches, where it has any.

    Args:
        generator: On the device of the batches.
        stream: Its training pairs.
    """
    batches = (stream(step) for step in range(STATISTICS_BATCHES))
    recompute_statistics(generator, ((batch.x, *batch.text) for batch in batches))


def heldout_l1(
    pairs: PairRows, rows: Tensor, concepts: Sequence[str], texts: Texts | None, device: torch.device
) -> Callable[[nn.Module], float]:
    """Return what measures a generator on held-out pairs: the mean absolute difference, images in [-1, 1].

    Args:
        pairs: Where they are read.
        rows: The source images, int64 (N,).
        concepts: The names of the concepts.
        texts: Of these concepts, of which the first of each is used; None without text.
        device: Where the generator is.
    """

    @torch.no_grad()
    def measure(generator: nn.Module) -> float:
        training = generator.training
        generator.eval()
        total, count = 0.0, 0
        for place, name in enumerate(concepts):
            for part in rows.split(EVALUATED_AT_ONCE):
                x, y, text = _measured(pairs, part, name, place, texts, device)
                total += float((generator(x, *text).float() - y).abs().double().sum())
                count += y.numel()
        generator.train(training)
        return total / max(count, 1)

    return measure


def _measured(
    pairs: PairRows, rows: Tensor, name: str, place: int, texts: Texts | None, device: torch.device
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return sources, targets and text of some rows of one concept."""
    text = () if texts is None else texts.rows(torch.full((len(rows),), place))
    x, y = (levels_to_float(part, device) for part in (pairs.source_rows(rows), pairs.target_rows(name, rows)))
    return x, y, tuple(part.to(device) for part in text)


@torch.no_grad()
def edit_rows(
    generator: nn.Module, pairs: PairRows, rows: Tensor, texts: Texts | None, place: int, device: torch.device
) -> Tensor:
    """Return what a generator makes of some source images for one concept, uint8 (N, 3, H, W) on the CPU.

    Args:
        generator: On that device.
        pairs: Where the source images are read.
        rows: Which of them, int64 (N,).
        texts: Of the concepts; None without text.
        place: The concept among them.
        device: Where the generator is.
    """
    generator.eval()
    made = []
    for part in rows.split(EVALUATED_AT_ONCE):
        text = () if texts is None else texts.rows(torch.full((len(part),), place))
        x = levels_to_float(pairs.source_rows(part), device)
        made.append(to_uint8(generator(x, *(piece.to(device) for piece in text)).float()).cpu())
    return torch.cat(made)
