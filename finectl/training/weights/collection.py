"""The weights of a collection as a generator's training sees them: packed, by split, with the texts that name them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.models.weights.layout import Layout
from finectl.training.weights.files import SPLITS, concepts_of
from finectl.training.weights.targets import Dataset


@dataclass(frozen=True, eq=False)
class Collection:
    """The weights of a split of the concepts, and the texts that name them.

    Args:
        names: Of the concepts.
        blocks: (C, K, N, b), packed.
        texts_of: The rows of each concept's texts, the prompt's first.
    """

    names: tuple[str, ...]
    blocks: Tensor
    texts_of: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> tuple[int, ...]:
        """The row of each concept's prompt."""
        return tuple(rows[0] for rows in self.texts_of)

    @property
    def means(self) -> Tensor:
        """The mean of each concept's checkpoints, (C, N, b)."""
        return self.blocks.mean(1)


def read_collections(dataset: Dataset, layout: Layout) -> tuple[dict[str, Collection], list[str]]:
    """Read the weights of every split that has any, and list all texts in the order of their rows.

    Args:
        dataset: The collection.
        layout: Of its tensors.

    Raises:
        InputError: a file is damaged.
    """
    found: dict[str, Collection] = {}
    texts: list[str] = []
    for split in SPLITS:
        names, rows, packed = [], [], []
        for concept in concepts_of(dataset.concepts, split):
            names.append(concept.name)
            rows.append(tuple(range(len(texts), len(texts) + len(concept.texts))))
            texts += concept.texts
            packed.append(layout.pack_all(dataset.checkpoints(concept)))
        if names:
            found[split] = Collection(tuple(names), torch.stack(packed), tuple(rows))
    return found, texts
