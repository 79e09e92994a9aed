"""The knowledge bank of Diff-Tuning: images that a pre-trained model made, which fine-tuning goes on seeing.

A bank holds what the model itself sees: of a model of latents the scaled latents, which nothing has decoded and nothing
has to encode again; of a model of pixels their levels. Only `open_bank` needs torch.

Reference: Diff-Tuning, arXiv 2406.00773: knowledge retention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.chunks import Chunks
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import read_header
from finectl.data.captions import PROMPTS
from finectl.data.sources import DataInfo
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.data.dataset import ImageSet

KIND = "bank"
ROLE = "model"
LATENTS, PIXELS = "latents", "pixels"
STORAGE = {LATENTS: "float16", PIXELS: "uint8"}
HEADER_TYPES = {"float16": "F16", "uint8": "U8"}
BYTES = {"float16": 2, "uint8": 1}
LABEL_BYTES = 8


class BankShards(Chunks):
    """The files of a bank: `images-00000.safetensors` and so on, each with `images` and `labels`.

    Args:
        directory: Where they are.
        count: Images in all.
        size: Images a file; the last one may have fewer.
    """

    def __init__(self, directory: Path, count: int, size: int) -> None:
        super().__init__(directory, "images", count, size)

    def file(self, first: int) -> Path:
        """Return the file whose first image this is."""
        return self.directory / f"{self.name}-{first // self.size:05d}.safetensors"


@dataclass(frozen=True)
class BankInfo:
    """What a bank is, known from its manifest alone.

    Args:
        count: Images.
        space: `latents` (float16, scaled as the model sees them) or `pixels` (uint8 levels).
        channels: Channels of an image or its latents.
        image_size: Their height and width.
        shard_size: Images a file.
        num_classes: Classes of which the images were made in turn; 1 where there are none.
        weights: Which weights of the model made them.
        scheduler: How they were sampled.
        sampling_steps: In how many steps.
        guidance: Scale of classifier-free guidance.
        seed: Seed of the noise that they started from.
        model: Digest of the model that made them.
        has_prompts: Whether they were made of prompts.
        vae: The autoencoder whose latents they are, where the model records it.
    """

    count: int
    space: str
    channels: int
    image_size: int
    shard_size: int
    num_classes: int
    weights: str
    scheduler: str
    sampling_steps: int
    guidance: float
    seed: int
    model: str
    has_prompts: bool
    vae: Mapping[str, Any] | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image, (C, H, W)."""
        return self.channels, self.image_size, self.image_size

    @property
    def storage(self) -> str:
        """Type of the stored numbers."""
        return STORAGE[self.space]


def stored_bytes(space: str, shape: tuple[int, int, int], count: int) -> int:
    """Return what images of this shape and their labels take on disk."""
    return count * (BYTES[STORAGE[space]] * prod(shape) + LABEL_BYTES)


def bank_info(artifact: Artifact) -> BankInfo:
    """Return what a bank is, without torch.

    Raises:
        InputError: the artifact is no bank, or its manifest does not say what a bank's says.
    """
    manifest = artifact.manifest
    try:
        if artifact.kind != KIND:
            raise ValueError(f"it is of kind {artifact.kind!r}")
        read, config = manifest.metrics, manifest.config
        info = BankInfo(
            count=int(read["images"]),
            space=str(read["space"]),
            channels=int(read["channels"]),
            image_size=int(read["image_size"]),
            shard_size=int(config["shard_size"]),
            num_classes=len(read["labels"]),
            weights=str(config["weights"]),
            scheduler=str(config["scheduler"]),
            sampling_steps=int(config["sampling_steps"]),
            guidance=float(config["guidance"]),
            seed=int(config["seed"]),
            model=next(parent.digest for parent in manifest.parents if parent.role == ROLE),
            has_prompts=artifact.has(PROMPTS),
            vae=manifest.data.get("vae"),
        )
        if info.space not in STORAGE or min(info.count, info.channels, info.image_size, info.shard_size) < 1:
            raise ValueError(f"it holds {info.count} images of {info.shape} as {info.space!r}")
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise InputError(
            f"{artifact.path} is no bank of images: {error or type(error).__name__}",
            expected="what finectl bank made",
            fix=f"make it again with --force: {' '.join(manifest.command)}"
            if artifact.kind == KIND
            else "finectl bank",
        ) from error
    return info


def require_bank_of(artifact: Artifact, model: Artifact) -> None:
    """Check that a bank's images were made by this very model: others would teach what it never knew.

    Raises:
        InputError: the artifact is no bank, or another model made it.
    """
    made_by = bank_info(artifact).model
    if made_by != model.manifest.digest:
        raise InputError(
            f"the images of {artifact.path} were made by another model (digest {made_by[:8]}) than {model.path} "
            f"(digest {model.manifest.digest[:8]})",
            expected="a bank of the model that is fine-tuned",
            fix=f"finectl bank {model.path}",
        )


def bank_prompts(artifact: Artifact) -> tuple[str, ...] | None:
    """Return the prompt of every image of a bank, None where a model of classes made them.

    Raises:
        InputError: the file is damaged.
    """
    if not artifact.has(PROMPTS):
        return None
    path = artifact.file(PROMPTS)
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
        if len(texts) != bank_info(artifact).count:
            raise ValueError(f"it has {len(texts)} prompts")
        return tuple(map(str, texts))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", fix="make the bank again with --force") from error


def open_bank(artifact: Artifact, null_label: int | None = None) -> ImageSet:
    """Open a bank's images, which are read from memory-mapped files; several threads may read at once.

    Args:
        artifact: The bank.
        null_label: The label of every image: that which stands for no class in the model that is fine-tuned, since
            only what it knows of images as such is retained. None for the classes of which they were made.

    Returns:
        All of its images, in their order: pixels in [-1, 1], or scaled latents.

    Raises:
        InputError: a file is missing, damaged, or not what the manifest says.
    """
    import torch

    from finectl.data.dataset import ImageSet

    info = bank_info(artifact)
    store = BankStore(artifact, info, null_label)
    described = DataInfo(
        name=f"{KIND}:{artifact.path}",
        fingerprint=artifact.manifest.digest,
        count=info.count,
        train_count=info.count,
        heldout_count=0,
        image_size=info.image_size,
        channels=info.channels,
        num_classes=info.num_classes,
        class_names=tuple(map(str, range(info.num_classes))),
        bundled=False,
        vae=info.vae,
    )
    return ImageSet(described, "train", store, torch.arange(info.count))


class BankStore:
    """A bank's images in mapped files; see `finectl.data.dataset.Store`.

    Args:
        artifact: The bank.
        info: What it is.
        null_label: As of `open_bank`.

    Raises:
        InputError: a file is missing, damaged, or not what the manifest says.
    """

    sampled = False

    def __init__(self, artifact: Artifact, info: BankInfo, null_label: int | None) -> None:
        import numpy as np
        import torch

        from finectl.data.mapped import ShardedRows, Table

        self.info = info
        shards = BankShards(artifact.path, info.count, info.shard_size)
        tables, labels = [], []
        for first in shards.firsts:
            path, count = artifact.file(shards.file(first).name), len(shards.span(first))
            images, marks = _places(path, info, count)
            tables.append(Table(path, images, count))
            if null_label is None:
                labels.append(np.fromfile(path, "<i8", count, offset=marks))
        self._rows = ShardedRows(tables, info.shape, info.storage)
        self.labels: Tensor = (
            torch.from_numpy(np.concatenate(labels)) if null_label is None else torch.full((info.count,), null_label)
        )

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return images (B, C, H, W) in the stored type; see `Store.read`.

        Raises:
            UsageError: latents are to be mirrored.
        """
        from finectl.data.dataset import mirror

        if flips is not None and self.info.space == LATENTS and bool(flips.any()):
            raise UsageError("a bank of latents has none of mirrored images, which are not mirrored latents")
        shards = indices.div(self.info.shard_size, rounding_mode="floor")  # (B,)
        return mirror(self._rows.take(shards, indices - shards * self.info.shard_size), flips)

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return what the model sees, float32 (B, C, H, W); see `Store.transform`."""
        from finectl.data.dataset import to_unit_range

        return to_unit_range(raw)


def _places(path: Path, info: BankInfo, count: int) -> tuple[int, int]:
    """Check that a file holds what it should, and return the bytes at which its images and its labels begin.

    Raises:
        InputError: it does not.
    """
    header = read_header(path)
    start = int(header["__data_start__"])
    wanted = {
        "images": {"dtype": HEADER_TYPES[info.storage], "shape": [count, *info.shape]},
        "labels": {"dtype": "I64", "shape": [count]},
    }
    found = {name: value for name, value in header.items() if not name.startswith("__")}
    try:
        offsets = {name: int(found[name].pop("data_offsets")[0]) for name in wanted}
        if found != wanted:
            raise ValueError(f"it holds {found}")
        return start + offsets["images"], start + offsets["labels"]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is not the file of a bank that the manifest describes: {error}",
            expected=f"{wanted}",
            fix="make the bank again with --force",
        ) from error
