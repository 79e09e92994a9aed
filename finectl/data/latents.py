"""`--data latents:PATH`: images as an autoencoder's latents, made by `finectl encode` and read through memory maps.

The artifact holds `index.json` and shards, safetensors files `latents-00000.safetensors` and so on. Every shard but
the last has equally many images: their labels and their moments, (n, 2c, h, w): c channels of means, then c of
log-variances of the latents before scaling. Where mirrored images were encoded too, `moments_flipped` follows.

Training draws its latents from these distributions anew each time, as mean + exp(log-variance / 2) * noise. In float16
a mean is off by at most 1/2048 of itself, and a standard deviation, with log-variances down to -30, by at most 0.4 %.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finectl.artifacts.files import sha256_json, write_json
from finectl.artifacts.store import Artifact, open_artifact
from finectl.artifacts.tensors import check_header, read_header, save_tensors
from finectl.data.captions import ALL, without_captions
from finectl.data.sources import DataInfo, DataOptions, heldout_size
from finectl.errors import ComputationError, FinectlError, InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

KIND = "latents"
INDEX = "index.json"
CAPTIONS = "captions.json"
FORMAT = 1
STORAGE = {"float16": "F16", "float32": "F32"}
LOG_VARIANCE_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class Shard:
    """A file of latents: its name, its first image and how many it holds."""

    file: str
    first: int
    count: int


@dataclass(frozen=True)
class LatentIndex:
    """What the latents of an artifact are: `index.json`.

    Args:
        count: Images.
        shard_size: Images a shard; the last one may have fewer.
        latent_channels: c.
        latent_size: Height and width of the latents.
        image_size: Height and width of the images, in pixels.
        storage: "float16" or "float32".
        flips: Whether the latents of mirrored images are there too.
        class_names: One name a class, in the order of the labels.
        vae: The autoencoder: digest, scaling_factor, shift_factor, downscale, latent_channels, channels.
        source: The images: fingerprint, which decides the split, bundled, resize_filter, skipped.
        captions: sha256 (hex) of the images' captions, which are in `captions.json`; empty where they have none.
    """

    count: int
    shard_size: int
    latent_channels: int
    latent_size: int
    image_size: int
    storage: str
    flips: bool
    class_names: tuple[str, ...]
    vae: Mapping[str, Any]
    source: Mapping[str, Any]
    captions: str = ""

    @property
    def shards(self) -> list[Shard]:
        """The files, in order."""
        firsts = range(0, self.count, self.shard_size)
        return [
            Shard(f"latents-{number:05d}.safetensors", first, min(self.shard_size, self.count - first))
            for number, first in enumerate(firsts)
        ]

    @property
    def row(self) -> tuple[int, int, int]:
        """Shape of one image's moments, (2c, h, w)."""
        return 2 * self.latent_channels, self.latent_size, self.latent_size

    def write(self, directory: Path) -> None:
        """Write `index.json`."""
        values = {"format": FORMAT, **asdict(self)}
        if not self.captions:
            del values["captions"]
        write_json(directory / INDEX, values)

    @classmethod
    def read(cls, path: Path) -> LatentIndex:
        """Read `index.json`.

        Raises:
            InputError: it is not whole, or of a format that this finectl does not know.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise InputError(f"{path} has format {values['format']!r}", expected=f"{FORMAT}")
            values["class_names"] = tuple(map(str, values["class_names"]))
            values = {"captions": "", **values}
            index = cls(**{field.name: values[field.name] for field in fields(cls)})
            for name in ("count", "shard_size", "latent_channels", "latent_size", "image_size"):
                if not isinstance(getattr(index, name), int) or getattr(index, name) < 1:
                    raise ValueError(f"{name} is {getattr(index, name)!r}")
            STORAGE[index.storage]
            for name in ("digest", "scaling_factor", "shift_factor", "downscale"):
                index.vae[name]
            index.source["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is not an index of latents: {type(error).__name__} {error}", fix="make it again with --force"
            ) from error
        return index


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe latents, without torch.

    Args:
        argument: Path of the artifact.
        image_size: Height and width of the latents, or None.
        options: With `flip` the latents of mirrored images have to be there.

    Returns:
        Size and channels are those of the latents. The fingerprint is the artifact's digest; the split is that of the
        images from which the latents were made.

    Raises:
        UsageError: another size was asked for, or mirrored images that were not encoded.
        InputError: there is no such artifact, it is damaged, or captions are wanted and there are none.
    """
    artifact, index = _open(argument)
    if image_size not in (None, index.latent_size):
        raise UsageError(
            f"the latents in {artifact.path} are {index.latent_size}x{index.latent_size} "
            f"(of images of {index.image_size}x{index.image_size} pixels), {image_size} was asked for",
            expected=f"--image-size {index.latent_size}, or none",
            fix="encode the images at another size: finectl encode --image-size",
        )
    if options.flip and not index.flips:
        raise UsageError(
            f"--flip: {artifact.path} has no latents of mirrored images, and mirrored latents are not the same",
            expected="latents made with finectl encode --flip",
            fix="leave --flip out, or encode again with --flip",
        )
    if options.captions == ALL and not index.captions:
        raise without_captions(f"latents:{artifact.path}")
    heldout = heldout_size(index.count)
    return DataInfo(
        name=f"latents:{os.path.realpath(argument)}",
        fingerprint=artifact.manifest.digest,
        count=index.count,
        train_count=index.count - heldout,
        heldout_count=heldout,
        image_size=index.latent_size,
        channels=index.latent_channels,
        num_classes=len(index.class_names),
        class_names=index.class_names,
        bundled=bool(index.source.get("bundled")),
        resize_filter=str(index.source.get("resize_filter", "none")),
        skipped=int(index.source.get("skipped", 0)),
        vae={"name": str(artifact.manifest.config.get("vae") or "unknown"), **index.vae},
        split_by=str(index.source["fingerprint"]),
        captions=index.captions,
    )


def captions(argument: str, info: DataInfo, options: DataOptions, labels: Sequence[int]) -> list[str]:
    """Return the caption of every image from which the latents were made.

    Raises:
        InputError: they are damaged.
    """
    artifact, _ = _open(argument)
    path = artifact.file(CAPTIONS)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if sha256_json(found) != info.captions:
            raise ValueError("they are not those of the index")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", fix="make it again with --force") from error
    return [str(text) for text in found]


def open_images(argument: str, info: DataInfo, options: DataOptions) -> LatentStore:
    """Open latents.

    Args:
        argument: Path of the artifact.
        info: What `describe` returned.
        options: As for `describe`.

    Raises:
        InputError: the artifact is damaged, or another one than was described.
    """
    artifact, index = _open(argument)
    if artifact.manifest.digest != info.fingerprint:
        raise InputError(f"{artifact.path} changed while it was read", fix="run the same command again")
    return LatentStore(artifact.path, index)


def _open(argument: str) -> tuple[Artifact, LatentIndex]:
    try:
        artifact = open_artifact(Path(argument), (KIND,))
    except FinectlError as error:
        made = "make latents of images: finectl encode --data folder:PATH --vae PATH"
        raise InputError(
            error.what,
            expected=error.expected or "the directory of a latents artifact",
            fix=made if not Path(argument).is_dir() else error.fix,
        ) from error
    return artifact, LatentIndex.read(artifact.file(INDEX))


class LatentStore:
    """Latents in mapped files; see `finectl.data.dataset.Store`.

    Args:
        directory: Where the shards are.
        index: What they hold.

    Raises:
        InputError: a shard is missing, damaged, or not what the index says.
    """

    sampled = True

    def __init__(self, directory: Path, index: LatentIndex) -> None:
        import numpy as np
        import torch

        from finectl.data.mapped import ShardedRows, Table

        self.index = index
        paths = [directory / shard.file for shard in index.shards]
        places = [_place(path, index, shard.count) for path, shard in zip(paths, index.shards, strict=True)]
        labels = [
            np.fromfile(path, "<i8", shard.count, offset=place.labels)
            for path, place, shard in zip(paths, places, index.shards, strict=True)
        ]
        self.labels: Tensor = torch.from_numpy(np.concatenate(labels))
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(index.class_names):
            raise InputError(
                f"{directory} has labels {int(self.labels.min())}..{int(self.labels.max())}",
                expected=f"0..{len(index.class_names) - 1}, for its {len(index.class_names)} classes",
            )
        tables = [
            Table(path, place.moments, shard.count * (1 + index.flips))  # its images, then the mirrored ones
            for path, place, shard in zip(paths, places, index.shards, strict=True)
        ]
        self._counts = torch.tensor([shard.count for shard in index.shards])
        self._rows = ShardedRows(tables, index.row, index.storage)

    def read(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Return moments (B, 2c, h, w) in the stored type; see `Store.read`.

        Raises:
            UsageError: mirrored ones are wanted and are not there.
        """
        import torch

        shards = torch.div(indices, self.index.shard_size, rounding_mode="floor")  # (B,)
        rows = indices - shards * self.index.shard_size
        if flips is not None and bool(flips.any()):
            if not self.index.flips:
                raise UsageError("there are no latents of mirrored images", fix="finectl encode --flip")
            rows = rows + flips * self._counts[shards]
        return self._rows.take(shards, rows)

    def transform(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return scaled latents, float32 (B, c, h, w): (mean + std * noise - shift) * scaling; see `Store.transform`.

        Reference: Rombach et al., arXiv 2112.10752, section G.
        """
        mean, log_variance = raw.float().chunk(2, dim=1)
        drawn = mean if noise is None else mean + (log_variance / 2).exp() * noise
        return (drawn - self.index.vae["shift_factor"]) * self.index.vae["scaling_factor"]


class _Place(NamedTuple):
    """Bytes of a shard at which its moments and its labels begin."""

    moments: int
    labels: int


def _place(path: Path, index: LatentIndex, count: int) -> _Place:
    """Check that a shard holds what it should and return where.

    Raises:
        InputError: it does not.
    """
    header = read_header(path)
    moments = {"dtype": STORAGE[index.storage], "shape": [count, *index.row]}
    wanted = {"moments": moments, "labels": {"dtype": "I64", "shape": [count]}}
    if index.flips:
        wanted["moments_flipped"] = moments
    start = int(header["__data_start__"])
    header = {name: info for name, info in header.items() if not name.startswith("__")}
    try:
        offsets = {name: header[name].pop("data_offsets") for name in wanted}
        # One map of both needs them one after the other.
        follows = not index.flips or offsets["moments"][1] == offsets["moments_flipped"][0]
        if header != wanted or not follows:
            raise ValueError("it holds other tensors")
        return _Place(start + int(offsets["moments"][0]), start + int(offsets["labels"][0]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path} is not the shard of latents that the index describes: {error}", fix="make it again with --force"
        ) from error


def is_whole(directory: Path, index: LatentIndex, shard: Shard) -> bool:
    """Tell whether a shard is there and holds what the index says."""
    path = directory / shard.file
    if not path.is_file():
        return False
    try:
        check_header(path)
        _place(path, index, shard.count)
    except InputError:
        return False
    return True


def write_shard(path: Path, storage: str, moments: Tensor, labels: Tensor, flipped: Tensor | None = None) -> None:
    """Write a shard, atomically.

    Args:
        path: Its file.
        storage: "float16" or "float32".
        moments: (n, 2c, h, w): means, then log-variances, which are clamped to [-30, 20].
        labels: int64 (n,).
        flipped: The moments of the mirrored images.

    Raises:
        ComputationError: a mean is not finite in the stored type.
        ResourceError: the disk is full.
    """
    tensors = {"moments": _stored(moments, storage, path), "labels": labels}
    if flipped is not None:
        tensors["moments_flipped"] = _stored(flipped, storage, path)
    save_tensors(path, tensors)


def _stored(moments: Tensor, storage: str, path: Path) -> Tensor:
    import torch

    mean, log_variance = moments.float().chunk(2, dim=1)
    stored = torch.cat([mean, log_variance.clamp(*LOG_VARIANCE_RANGE)], dim=1).to(getattr(torch, storage))
    if not bool(torch.isfinite(stored).all()):
        raise ComputationError(
            f"latents for {path.name} are not finite in {storage}",
            expected="finite values",
            fix="encode with --dtype float32 and --storage float32",
        )
    return stored
