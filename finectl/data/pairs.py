"""Pairs of images before and after the edit of each concept, as a `pairs` artifact keeps them.

All concepts share their source images. `sources.safetensors` holds those of all splits, `targets/<concept>.safetensors`
what each of them became, in the same order; both are mapped into memory and read row by row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import read_header, save_tensors
from finectl.data.concepts import Concept, read_concepts
from finectl.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.data.mapped import MappedRows

KIND = "pairs"
SPLITS = ("train", "val", "test")
SOURCES, TARGETS, INDEX, IMAGES = "sources.safetensors", "targets", "sources.json", "images"
MADE_AGAIN = "make the artifact again with --force"


@dataclass(frozen=True)
class Source:
    """A source image: what it is called, which picture it is from, and its split.

    Images of one picture, such as crops of a photograph, are all in one split.
    """

    name: str
    picture: str
    split: str


class Pairs:
    """The pairs of an artifact, opened.

    Args:
        artifact: A `pairs` artifact, or the directory in which one is being made, with the concepts that are there.

    Attributes:
        image_size: Height and width of all images.
        concepts: The concepts that have targets.
        index: The source images, in the order of the files.
    """

    def __init__(self, directory: Path, concepts: Sequence[Concept]) -> None:
        self._directory = directory
        self.concepts = tuple(concepts)
        self.index = read_index(directory / INDEX)
        self._sources = _mapped(directory / SOURCES)
        self.image_size = self._sources.shape[2]
        if len(self._sources) != len(self.index):
            raise InputError(f"{directory / SOURCES} and {INDEX} differ in their number of images", fix=MADE_AGAIN)
        self._names = frozenset(concept.name for concept in concepts)
        self._targets = lru_cache(maxsize=64)(self._open_targets)

    def rows(self, split: str) -> Tensor:
        """Return which images a split has, int64 (N,).

        Args:
            split: "train", "val" or "test".
        """
        import torch

        if split not in SPLITS:
            raise ValueError(f"{split!r} is none of {SPLITS}")
        return torch.tensor([row for row, source in enumerate(self.index) if source.split == split], dtype=torch.int64)

    def count(self, split: str) -> int:
        """Return how many images a split has."""
        return len(self.rows(split))

    def sources(self, split: str) -> Tensor:
        """Return the source images of a split, uint8 (N, 3, H, W)."""
        return self.source_rows(self.rows(split))

    def targets(self, concept: str | Concept, split: str) -> Tensor:
        """Return what a concept made of the source images of a split, uint8 (N, 3, H, W), in the same order."""
        return self.target_rows(concept, self.rows(split))

    def source_rows(self, rows: Tensor) -> Tensor:
        """Return some source images, uint8 (B, 3, H, W).

        Args:
            rows: int64 (B,), some of `rows(split)`.
        """
        return self._sources.take(rows)

    def target_rows(self, concept: str | Concept, rows: Tensor) -> Tensor:
        """Return what a concept made of some source images, uint8 (B, 3, H, W).

        Args:
            concept: A concept or its name.
            rows: int64 (B,), some of `rows(split)`.

        Raises:
            InputError: the artifact has no targets of it.
        """
        return self._targets(concept if isinstance(concept, str) else concept.name).take(rows)

    def _open_targets(self, name: str) -> MappedRows:
        if name not in self._names:
            raise InputError(f"{self._directory} has no pairs of the concept {name!r}")
        table = _mapped(target_file(self._directory, name))
        if table.shape != self._sources.shape:
            raise InputError(
                f"{name} has targets of shape {table.shape}", expected=f"{self._sources.shape}", fix=MADE_AGAIN
            )
        return table


def open_pairs(artifact: Artifact) -> Pairs:
    """Open the pairs of an artifact.

    Raises:
        InputError: it has none, or they are damaged.
    """
    return Pairs(artifact.path, read_concepts(artifact))


def target_file(directory: Path, name: str) -> Path:
    """Return where the targets of a concept are."""
    return directory / TARGETS / f"{name}.safetensors"


def write_images(path: Path, images: Tensor) -> None:
    """Write images uint8 (N, 3, H, W)."""
    path.parent.mkdir(exist_ok=True)
    save_tensors(path, {IMAGES: images})


def write_sources(directory: Path, sources: Sequence[Source], images: Tensor) -> None:
    """Write the source images (uint8 (N, 3, H, W)) and what they are called."""
    write_images(directory / SOURCES, images)
    write_json(directory / INDEX, [vars(source) for source in sources])


def read_index(path: Path) -> tuple[Source, ...]:
    """Read what the source images are called.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        rows: Any = json.loads(path.read_text(encoding="utf-8"))
        index = tuple(Source(str(row["name"]), str(row["picture"]), str(row["split"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read: {error}", expected="the index of source images", fix=MADE_AGAIN
        ) from error
    if not all(source.split in SPLITS for source in index):
        raise InputError(f"{path} has an unknown split", expected=f"one of: {', '.join(SPLITS)}", fix=MADE_AGAIN)
    return index


def _mapped(path: Path) -> MappedRows:
    """Map the images of a file.

    Raises:
        InputError: it holds no images uint8 (N, 3, H, H).
    """
    from finectl.data.mapped import MappedRows

    header = read_header(path)
    info = header.get(IMAGES, {})
    shape = tuple(info.get("shape", ()))
    if info.get("dtype") != "U8" or len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or 0 in shape:
        raise InputError(f"{path} has no images", expected="uint8 (N, 3, H, H)", fix=MADE_AGAIN)
    return MappedRows(path, int(header["__data_start__"]) + int(info["data_offsets"][0]), shape[0], shape[1:])
