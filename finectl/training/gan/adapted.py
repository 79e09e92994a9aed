"""What a base makes with adapters, and which of its layers E2GAN adapts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from finectl.adapters.lora import LoraLayer, lora_shapes, merge_lora
from finectl.data.concepts import Concept
from finectl.models.gan.generator import Generator
from finectl.training.gan.adapting import Adapter
from finectl.training.gan.pairs import EVALUATED_AT_ONCE, levels_to_float, recompute_on

CRUCIAL = ("stem", "down", "reduce", "transformer", "enlarge", "up", "head")
"""Beginnings of the names of the layers that E2GAN adapts: all but the residual blocks."""


def crucial_layers(layers: Sequence[LoraLayer]) -> tuple[LoraLayer, ...]:
    """Return the adapters that E2GAN has: of its crucial layers alone, and without normalisations.

    Reference: arXiv 2401.06127, section 3.3.
    """
    return tuple(replace(layer, norm=None, norm_size=0) for layer in layers if layer.name.startswith(CRUCIAL))


def of_layers(lora: Mapping[str, Tensor], layers: Sequence[LoraLayer]) -> dict[str, Tensor]:
    """Return the tensors of some adapters only."""
    return {name: lora[name] for name in lora_shapes(layers)}


def merged_generator(adapter: Adapter, concept: Concept, lora: Mapping[str, Tensor]) -> Generator:
    """Return the base's generator without adapters that computes the same as with them, on the adapter's device.

    Args:
        adapter: Of the base.
        concept: Whose training images the statistics of batch normalisations are taken from, where there are any.
        lora: What the adapters hold.

    Raises:
        InputError: the base has no such layer.
    """
    model = copy.deepcopy(adapter.generator)
    model.load_state_dict(merge_lora(adapter.generator.state_dict(), lora))
    model.to(adapter.device)
    recompute_on(model, adapter.stream(concept))
    return model.eval()


@torch.no_grad()
def edited(adapter: Adapter, concept: Concept, generator: nn.Module, rows: Tensor) -> Tensor:
    """Return what a generator makes of source images with a concept's prompt, float32 (N, 3, H, W) in [-1, 1].

    Args:
        adapter: Where images are read and texts are encoded.
        concept: The concept.
        generator: In evaluation mode, on the adapter's device, with or without text.
        rows: Source images, int64 (N,), N at least 1.
    """
    texts, made = adapter.texts(concept), []
    for part in rows.split(EVALUATED_AT_ONCE):
        text = () if texts is None else texts.rows(torch.zeros(len(part), dtype=torch.int64))
        made.append(generator(levels_to_float(adapter.pairs.source_rows(part), adapter.device), *text).float().cpu())
    return torch.cat(made)


def wanted(adapter: Adapter, concept: Concept, rows: Tensor) -> Tensor:
    """Return the targets of source images, float32 (N, 3, H, W) in [-1, 1]."""
    return levels_to_float(adapter.pairs.target_rows(concept, rows), torch.device("cpu"))
