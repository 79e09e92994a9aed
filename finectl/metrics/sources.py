"""Where the images come from that are measured: a model, generated images, a data set, or files as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.data.files import ImageFiles
from finectl.data.images import to_uint8
from finectl.metrics.extraction import Pixels
from finectl.models.vae import Vae
from finectl.training.generate import Generator

Read = Callable[[int], Pixels]
Check = Callable[[], None]


class Source(Protocol):
    """A set of images, read a span at a time."""

    @property
    def count(self) -> int:
        """Number of images."""

    def open(self, span: range, check: Check) -> Read:
        """Return what reads the images of a span by their place in it; several threads may call it.

        Args:
            span: Images first..last-1.
            check: Called now and then by slow work, which it ends by raising.
        """

    def labels(self, span: range) -> Tensor:
        """Return the images' classes, int64 (len(span),)."""

    def prompts(self) -> Sequence[str] | None:
        """Return the prompt of every image; None where they have none."""


def reader(levels: Tensor) -> Read:
    """Return what reads images out of uint8 levels (N, C, H, W)."""
    rows = levels.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    return lambda index: rows[index]


@dataclass(frozen=True, eq=False)
class GeneratedImages:
    """Images that a model makes when they are wanted, the classes or the prompts in turn.

    Args:
        generator: The model, and how it is sampled.
        count: Number of images.
        drawn: The classes in turn; None for all that the model has.
    """

    generator: Generator
    count: int
    drawn: Sequence[int] | None = None

    def open(self, span: range, check: Check) -> Read:
        """See `Source.open`."""
        prompts = self.generator.prompts
        labels = self.labels(span).tolist() if prompts is None else prompts.rows_of(span)
        return reader(self.generator.images(span.start, labels, check))

    def labels(self, span: range) -> Tensor:
        """See `Source.labels`; those of the images that the prompts describe."""
        if self.generator.prompts is not None:
            return self.generator.prompts.classes_of(span)
        drawn = self.drawn or range(max(self.generator.model.config.num_classes, 1))
        return torch.tensor([drawn[index % len(drawn)] for index in span])

    def prompts(self) -> Sequence[str] | None:
        """See `Source.prompts`."""
        prompts = self.generator.prompts
        return None if prompts is None else prompts.texts_of(range(self.count))


@dataclass(frozen=True, eq=False)
class SampledImages:
    """The first images of a `samples` artifact.

    Args:
        path: Its file of images and labels.
        count: How many are taken.
        texts: The prompt of each image, where they have one.
    """

    path: Path
    count: int
    texts: tuple[str, ...] | None = None

    def open(self, span: range, check: Check) -> Read:
        """See `Source.open`."""
        return reader(self._slice("images", span))

    def labels(self, span: range) -> Tensor:
        """See `Source.labels`."""
        return self._slice("labels", span)

    def prompts(self) -> Sequence[str] | None:
        """See `Source.prompts`."""
        return self.texts

    def _slice(self, name: str, span: range) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            part: Tensor = file.get_slice(name)[span.start : span.stop]
        return part


@dataclass(frozen=True, eq=False)
class DataImages:
    """The images of a data set; those of latents are decoded.

    Args:
        images: The set.
        vae: What decodes them.
        texts: The prompt of each image, where they have one.
    """

    images: ImageSet
    vae: Vae | None = None
    texts: tuple[str, ...] | None = None

    @property
    def count(self) -> int:
        """See `Source.count`."""
        return len(self.images)

    def open(self, span: range, check: Check) -> Read:
        """See `Source.open`."""
        check()
        values = self.images.transform(self.images.read(torch.arange(span.start, span.stop)))
        return reader(to_uint8(values if self.vae is None else self.vae.decode(values)).cpu())

    def labels(self, span: range) -> Tensor:
        """See `Source.labels`."""
        return self.images.labels[span.start : span.stop]

    def prompts(self) -> Sequence[str] | None:
        """See `Source.prompts`."""
        return self.texts


@dataclass(frozen=True, eq=False)
class FileImages:
    """Image files as they are, at their own sizes."""

    files: ImageFiles

    @property
    def count(self) -> int:
        """See `Source.count`."""
        return self.files.count

    def open(self, span: range, check: Check) -> Read:
        """See `Source.open`."""
        return lambda index: _without_copies(self.files.read(span.start + index))

    def labels(self, span: range) -> Tensor:
        """See `Source.labels`."""
        return torch.tensor(self.files.labels[span.start : span.stop], dtype=torch.int64)

    def prompts(self) -> Sequence[str] | None:
        """See `Source.prompts`."""
        return self.files.prompts()


def _without_copies(pixels: Pixels) -> Pixels:
    """Return a grey image (H, W, 3), whose channels are all the same, with one channel."""
    grey = np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 0], pixels[..., 2])
    return pixels[..., :1] if grey else pixels
