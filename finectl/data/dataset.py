"""A split of a data set in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from finectl.data.sources import DEFAULT_RESIZE_FILTER, SOURCES, DataInfo, describe, parse_spec, split_indices
from finectl.errors import InputError, UsageError

SPLITS = ("train", "heldout")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, or of a part of it.

    Args:
        info: The data set as a whole; its counts are those of the whole set, `len(image_set)` is this part's.
        split: "train" or "heldout".
        images: float32 (N, C, H, W) in [-1, 1].
        labels: int64 (N,), 0..num_classes-1.
    """

    info: DataInfo
    split: str
    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return int(self.images.shape[0])

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
        chosen = torch.tensor(sorted(_balanced_order(self.labels.tolist(), seed)[:count]), dtype=torch.int64)
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


def _balanced_order(labels: list[int], seed: int) -> list[int]:
    """Order images so that each round takes one of every class that has any left; the seed orders within a round."""
    by_hash = sorted(range(len(labels)), key=lambda index: _hash(seed, "image", index))
    seen: dict[int, int] = {}
    rounds = []
    for index in by_hash:
        label = labels[index]
        rounds.append((seen.get(label, 0), _hash(seed, "class", label), index))
        seen[label] = seen.get(label, 0) + 1
    return [index for _, _, index in sorted(rounds)]


def _hash(seed: int, what: str, number: int) -> bytes:
    return hashlib.sha256(f"subset:{seed}:{what}:{number}".encode()).digest()


def load(
    spec: str, split: str = "train", image_size: int | None = None, resize_filter: str = DEFAULT_RESIZE_FILTER
) -> ImageSet:
    """Load one split of a data set into memory.

    Args:
        spec: "digits", "photos" or "folder:PATH".
        split: "train" or "heldout" (20 %, fixed by the data's fingerprint).
        image_size: Side of the images in pixels; None for the set's own.
        resize_filter: Filter for an image folder, see `finectl.data.sources.describe`.

    Returns:
        Images float32 (N, C, H, W) in [-1, 1] and labels int64 (N,).

    Raises:
        UsageError: the specification, the split, the size or the filter is not possible.
        InputError: the data is missing, corrupt, or too small to have that split.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}", expected=f"one of: {', '.join(SPLITS)}")
    name, argument = parse_spec(spec)
    info = describe(spec, image_size, resize_filter)
    indices = split_indices(info.fingerprint, info.count)[SPLITS.index(split)]
    if not indices:
        raise InputError(
            f"{spec} holds {info.count} image, which leaves none for the {split} split", expected="at least 2 images"
        )
    images, labels = SOURCES.load(name).load_images(argument, info, indices)
    return ImageSet(info=info, split=split, images=images, labels=labels)
