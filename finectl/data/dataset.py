"""One split of a data set: which images it has, and how a batch of them is read and turned into what a model sees."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from finectl.data.classes import chosen_labels
from finectl.data.sources import (
    DEFAULT_OPTIONS,
    SOURCES,
    DataInfo,
    DataOptions,
    describe,
    heldout_indices,
    parse_spec,
    split_classes,
)
from finectl.errors import InputError, UsageError

SPLITS = ("train", "heldout")


class Store(Protocol):
    """The images of a whole data set in the form in which they are kept; several threads may read at once."""

    @property
    def labels(self) -> Tensor:
        """int64 (count,), 0..num_classes-1."""

    @property
    def sampled(self) -> bool:
        """Whether an image is kept as mean and log-variance, of which training draws."""

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return stored images on the CPU, in memory of their own.

        Args:
            indices: int64 (B,), 0..count-1.
            flips: bool (B,), which of them to mirror left to right; None for none.
        """

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Turn what `read` gave into float32 (B, C, H, W), on its device.

        Args:
            raw: What `read` returned, on any device.
            noise: Standard normal (B, C, H, W), where `sampled`; None for the mean.
        """


@dataclass(frozen=True, eq=False)
class MemoryStore:
    """A small data set in memory.

    Args:
        images: uint8 (count, C, H, W) of levels 0..largest, or float32 in [-1, 1].
        labels: int64 (count,).
        largest: The level that means 1.
    """

    images: Tensor
    labels: Tensor
    largest: int = 255
    sampled: bool = False

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """See `Store.read`."""
        return mirror(self.images.index_select(0, indices), flips)

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Store.transform`."""
        return to_unit_range(raw, self.largest)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, or of a part of it.

    Args:
        info: The data set as a whole; its counts are those of the whole set, `len(image_set)` is this part's.
        split: "train" or "heldout".
        store: Where the images of the whole set are.
        indices: int64 (N,), which of them belong to this part.
        flip: Whether training may mirror images left to right.
        rows: int64 (count,), the row of each image's caption in a table of texts, for the whole set; where it is given
            it stands for the classes.
    """

    info: DataInfo
    split: str
    store: Store
    indices: Tensor
    flip: bool = False
    rows: Tensor | None = None

    @classmethod
    def in_memory(cls, info: DataInfo, split: str, images: Tensor, labels: Tensor) -> ImageSet:
        """Return a set of images at hand: float32 (N, C, H, W) in [-1, 1] or uint8, and labels int64 (N,)."""
        return cls(info, split, MemoryStore(images, labels), torch.arange(len(labels)))

    def __len__(self) -> int:
        return int(self.indices.shape[0])

    @cached_property
    def labels(self) -> Tensor:
        """int64 (N,), 0..num_classes-1, or rows of captions."""
        return (self.store.labels if self.rows is None else self.rows)[self.indices]

    @property
    def sampled(self) -> bool:
        """Whether images are kept as mean and log-variance, so that `transform` takes noise to draw from them."""
        return self.store.sampled

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as `transform` gives it."""
        return self.info.channels, self.info.image_size, self.info.image_size

    def read(self, positions: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return images in the form in which they are stored, on the CPU; several threads may read at once.

        Args:
            positions: int64 (B,), 0..len(self)-1.
            flips: bool (B,), which of them to mirror; None for none.

        Returns:
            uint8 (B, C, H, W), or floating-point (B, 2C, H, W) means and log-variances.
        """
        return self.store.read(self.indices[positions], flips)

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Turn what `read` gave into what a model sees, on the device where it is.

        Args:
            raw: What `read` returned.
            noise: Standard normal (B, C, H, W) to draw with where `sampled`; None for the mean.

        Returns:
            float32 (B, C, H, W): pixels in [-1, 1], or scaled latents.
        """
        return self.store.transform(raw, noise)

    @cached_property
    def images(self) -> Tensor:
        """The whole part in memory, float32 (N, C, H, W): for small sets only; latents are their means."""
        return self.transform(self.read(torch.arange(len(self))))

    def subset(self, count: int, seed: int) -> ImageSet:
        """Return a fixed part of this set, with as equal numbers of each class as the set allows.

        The same arguments always give the same images, and a smaller subset of the same seed is part of a larger one.

        Args:
            count: Number of images, 1..len(self).
            seed: Seed of the choice.

        Returns:
            The chosen images in this set's order.

        Raises:
            UsageError: `count` is below 1.
            InputError: `count` exceeds the number of images.
        """
        if count < 1:
            raise UsageError(f"a subset of {count} images", expected="at least 1 image")
        if count > len(self):
            raise InputError(
                f"a subset of {count} images of {self.info.name!r}, whose {self.split} split has {len(self)}",
                expected=f"at most {len(self)} images",
            )
        chosen = torch.tensor(sorted(_balanced(self.labels, count, seed)), dtype=torch.int64)
        return replace(self, indices=self.indices[chosen])

    def few(self, per_class: int, seed: int) -> ImageSet:
        """Return a fixed part of this set with at most so many images of each class, in this set's order.

        The same arguments always give the same images, and those of a smaller number are among those of a larger one.

        Args:
            per_class: At least 1; a class that has fewer gives all.
            seed: Seed of the choice.
        """
        labels = self.store.labels[self.indices]
        chosen: list[int] = []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            chosen += [index for _, index in heapq.nsmallest(per_class, _ranked(members, seed))]
        return replace(self, indices=self.indices[torch.tensor(sorted(chosen), dtype=torch.int64)])


def mirror(images: Tensor, flips: Tensor | None) -> Tensor:
    """Mirror some of a batch (B, C, H, W) left to right, in place, and return it; `flips` is bool (B,)."""
    if flips is not None:
        for index in flips.nonzero().flatten().tolist():  # one by one is ten times as fast as indexing by `flips`
            images[index] = images[index].flip(-1)
    return images


def to_unit_range(levels: Tensor, largest: int = 255) -> Tensor:
    """Return levels 0..largest as float32 in [-1, 1]; floating-point values, which are there already, as they are."""
    if levels.is_floating_point():
        return levels.float()
    return levels.to(torch.float32).div_(largest / 2).sub_(1.0)  # in place: fresh memory costs more than arithmetic


def _balanced(labels: Tensor, count: int, seed: int) -> list[int]:
    """Choose images by rounds, each of which takes one of every class that has any left; the seed orders a round."""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    rounds = _rounds(sizes, count)
    candidates = []
    for label, members in enumerate(order.split(sizes.tolist())):
        first = heapq.nsmallest(rounds, _ranked(members, seed))
        class_rank = _hash(seed, "class", label)
        candidates += [(place, class_rank, index) for place, (_, index) in enumerate(first)]
    return [index for _, _, index in sorted(candidates)[:count]]


def _rounds(sizes: Tensor, count: int) -> int:
    """Return how many rounds give `count` images."""
    low, high = 1, int(sizes.max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(sizes.clamp(max=middle).sum()) >= count else (middle + 1, high)
    return low


def _ranked(members: Tensor, seed: int) -> Iterator[tuple[bytes, int]]:
    for index in members.tolist():
        yield _hash(seed, "image", index), index


def _hash(seed: int, what: str, number: int) -> bytes:
    return hashlib.sha256(f"subset:{seed}:{what}:{number}".encode()).digest()


def load_both(spec: str, image_size: int | None = None, options: DataOptions = DEFAULT_OPTIONS) -> ImageSet:
    """Open all images of a data set, those of both splits in their order; none is ever mirrored.

    Args:
        spec: As of `load`, and so `image_size` and `options`.
    """
    name, argument = parse_spec(spec)
    info = describe(spec, image_size, options)
    whole = describe(split_classes(spec)[0], image_size, options) if info.whole else info
    store: Store = SOURCES.load(name).open_images(argument, whole, options)
    wanted = torch.isin(store.labels, torch.tensor(chosen_labels(info)))
    return ImageSet(info, "all", store, wanted.nonzero().flatten() if info.whole else torch.arange(info.count))


def load(
    spec: str, split: str = "train", image_size: int | None = None, options: DataOptions = DEFAULT_OPTIONS
) -> ImageSet:
    """Open one split of a data set.

    Args:
        spec: A source's name, and after a colon its argument where it takes one; after # the classes that are wanted.
        split: "train" or "heldout" (20 %, at most 10,000 images, fixed by the data's fingerprint).
        image_size: Side of the images in pixels; None for the set's own.
        options: How images are read; images of the held-out split are never mirrored.

    Returns:
        The split; images of the user's are in a memory-mapped cache, which is made when they are first opened.

    Raises:
        UsageError: the specification, the split, the size or an option is not possible.
        InputError: the data is missing, corrupt, or too small to have that split.
        ResourceError: the disk is full.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}", expected=f"one of: {', '.join(SPLITS)}")
    name, argument = parse_spec(spec)
    info = describe(spec, image_size, options)
    whole = describe(split_classes(spec)[0], image_size, options) if info.whole else info
    held = torch.zeros(whole.count, dtype=torch.bool)
    held[list(heldout_indices(whole.split_by or whole.fingerprint, whole.count))] = True
    store: Store = SOURCES.load(name).open_images(argument, whole, options)
    wanted = held if split == "heldout" else ~held
    if info.whole:
        wanted = wanted & torch.isin(store.labels, torch.tensor(chosen_labels(info)))
    indices = wanted.nonzero().flatten()  # (N,)
    if not len(indices):
        raise InputError(
            f"{spec} holds {info.count} image, which leaves none for the {split} split", expected="at least 2 images"
        )
    return ImageSet(info, split, store, indices, flip=options.flip and split == "train")
