"""Pairs that were made elsewhere, in one of three layouts of folders; the split may be a folder or not be there.

halves: `[SPLIT/]NAME.png`, A at the left and B at the right of one picture. folders: `A/[SPLIT/]NAME.png` and
`B/[SPLIT/]NAME.png`. suffixes: `[SPLIT/]NAME_A.png` and `[SPLIT/]NAME_B.png`. A is before the edit, B after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import sha256_json
from finectl.data.concepts import Concept
from finectl.data.pair_sources import split_of
from finectl.data.pairs import SPLITS, Source
from finectl.errors import InputError

if TYPE_CHECKING:
    import PIL.Image
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SHOWN = 5
LAYOUTS = "A/ and B/ with the same names, NAME_A and NAME_B, or pictures with A left and B right"


@dataclass(frozen=True)
class PairFiles:
    """The files of one pair: A and B, or one picture for both (`after` is None then)."""

    name: str
    split: str
    before: Path
    after: Path | None


@dataclass(frozen=True)
class ConceptFolder:
    """The pairs of a concept, sorted by name, and the size of their images, (width, height)."""

    concept: str
    files: tuple[PairFiles, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class PairFolders:
    """The pairs of all concepts, which share their source images.

    Args:
        name: As `--editor` names them.
        fingerprint: sha256 (hex) of all files.
        sources: What the source images are called.
        folders: The concepts' folders.
    """

    name: str
    fingerprint: str
    sources: tuple[Source, ...]
    folders: tuple[ConceptFolder, ...]
    bundled: bool = False

    @property
    def count(self) -> int:
        """Number of source images."""
        return len(self.sources)


def describe_folders(root: Path, concepts: Sequence[Concept], layout: str) -> PairFolders:
    """Find the pairs of concepts and check that they fit each other.

    Args:
        root: A folder with one folder a concept, named as it; of a single concept its folder will do.
        concepts: The concepts.
        layout: `auto`, `halves`, `folders` or `suffixes`.

    Raises:
        InputError: a folder is missing, images have no counterpart or another size, or source images differ.
    """
    if not root.is_dir():
        raise InputError(f"there is no folder {root}", expected="a folder of pairs")
    single = len(concepts) == 1 and not (root / concepts[0].name).is_dir()
    missing = [c.name for c in concepts if not single and not (root / c.name).is_dir()]
    if missing:
        raise InputError(
            f"{root} has no folder for {len(missing)} of {len(concepts)} concepts: {_listed(missing)}",
            expected="one folder a concept, by its name",
            fix="make the prompts of these concepts alone: finectl gen-weights prompts --set FILE.jsonl",
        )
    folders = tuple(_read(root if single else root / concept.name, concept.name, layout) for concept in concepts)
    first = folders[0]
    digests = _digests(first)
    for other in folders[1:]:
        _require_same_sources(first, other)
        if (found := _digests(other)) != digests:
            differing = [name for name in digests if found[name] != digests[name]]
            raise InputError(
                f"the source images of {other.concept!r} are not those of {first.concept!r}: {_listed(differing)}",
                expected="the same images before the edit for all concepts",
            )
    files = [[f.concept, pair.name, str(pair.split), _hashes(pair)] for f in folders for pair in f.files]
    splits = [pair.split for pair in first.files]
    if not all(splits):
        splits = split_of([pair.name for pair in first.files], "")
    sources = tuple(Source(pair.name, pair.name, split) for pair, split in zip(first.files, splits, strict=True))
    return PairFolders(f"folder:{root}", sha256_json(files), sources, folders)


def read_folder(folder: ConceptFolder, size: int, before: bool) -> Tensor:
    """Read the images of a concept, cut to squares and resized.

    Args:
        folder: The concept's files.
        size: Height and width that are wanted.
        before: Whether those before the edit are wanted, else those after it.

    Returns:
        uint8 (N, 3, H, W).
    """
    import numpy as np
    import torch

    from finectl.data.pixels import square

    pixels = []
    for pair in folder.files:
        image = _opened(pair.before if before or pair.after is None else pair.after)
        if pair.after is None:
            half = image.width // 2
            image = image.crop((0, 0, half, image.height) if before else (half, 0, 2 * half, image.height))
        pixels.append(np.asarray(square(image, size, "lanczos")))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def _read(folder: Path, concept: str, layout: str) -> ConceptFolder:
    chosen = _layout_of(folder) if layout == "auto" else layout
    files = {"halves": _halves, "folders": _folders, "suffixes": _suffixes}[chosen](folder)
    if not files:
        raise InputError(f"{folder} has no pairs", expected=LAYOUTS)
    with_split = [pair for pair in files if pair.split]
    if 0 < len(with_split) < len(files) or (with_split and {pair.split for pair in files} != set(SPLITS)):
        found = sorted({pair.split or "none" for pair in files})
        raise InputError(
            f"{folder} has the splits {', '.join(found)}", expected=f"{', '.join(SPLITS)}, or no split at all"
        )
    ordered = tuple(sorted(files, key=lambda pair: pair.name))
    return ConceptFolder(concept, ordered, _common_size(folder, ordered))


def _layout_of(folder: Path) -> str:
    if (folder / "A").is_dir() or (folder / "B").is_dir():
        return "folders"
    images = [path for _, path in _images(folder)]
    if any(path.stem.endswith(("_A", "_B")) for path in images):
        return "suffixes"
    return "halves"


def _images(folder: Path) -> list[tuple[str, Path]]:
    """Return the images of a folder, and of those in it that are called after a split, with the split."""
    places = [("", folder), *((split, folder / split) for split in SPLITS)]
    return [
        (split, path)
        for split, place in places
        if place.is_dir()
        for path in sorted(place.iterdir())
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]


def _named(split: str, stem: str) -> str:
    return f"{split}/{stem}" if split else stem


def _halves(folder: Path) -> list[PairFiles]:
    files = [PairFiles(_named(split, path.stem), split, path, None) for split, path in _images(folder)]
    odd = [pair.name for pair in files if _size(pair.before)[0] % 2]
    if odd:
        raise InputError(
            f"{folder} has images of an odd width: {_listed(odd)}", expected="A and B side by side, as wide"
        )
    return files


def _folders(folder: Path) -> list[PairFiles]:
    sides = [{_named(split, path.stem): (split, path) for split, path in _images(folder / side)} for side in "AB"]
    return _matched(folder, *sides)


def _suffixes(folder: Path) -> list[PairFiles]:
    sides: list[dict[str, tuple[str, Path]]] = [{}, {}]
    others = []
    for split, path in _images(folder):
        if path.stem.endswith(("_A", "_B")):
            sides["AB".index(path.stem[-1])][_named(split, path.stem[:-2])] = (split, path)
        else:
            others.append(path.name)
    if others:
        raise InputError(f"{folder} has images that end in neither _A nor _B: {_listed(others)}", expected=LAYOUTS)
    return _matched(folder, *sides)


def _matched(folder: Path, before: dict[str, tuple[str, Path]], after: dict[str, tuple[str, Path]]) -> list[PairFiles]:
    lonely = [f"{name} (A)" for name in before if name not in after]
    lonely += [f"{name} (B)" for name in after if name not in before]
    if lonely:
        raise InputError(
            f"{folder} has {len(before)} images A and {len(after)} images B; without a counterpart: {_listed(lonely)}",
            expected="as many, with the same names",
        )
    return [PairFiles(name, split, path, after[name][1]) for name, (split, path) in before.items()]


def _common_size(folder: Path, files: Sequence[PairFiles]) -> tuple[int, int]:
    """Return the size of the first image before the edit.

    Raises:
        InputError: A and B of a pair differ in size.
    """
    differing = []
    for pair in files:
        if pair.after is not None and (before := _size(pair.before)) != (after := _size(pair.after)):
            differing.append(f"{pair.name} ({before[0]}x{before[1]} and {after[0]}x{after[1]})")
    if differing:
        raise InputError(f"{folder} has pairs of two sizes: {_listed(differing)}", expected="A as large as B")
    width, height = _size(files[0].before)
    return (width, height) if files[0].after is not None else (width // 2, height)


def _require_same_sources(first: ConceptFolder, other: ConceptFolder) -> None:
    ours, theirs = ({(pair.name, pair.split) for pair in folder.files} for folder in (first, other))
    if lonely := sorted(name for name, _ in ours ^ theirs):
        raise InputError(
            f"{first.concept!r} has {len(ours)} pairs and {other.concept!r} has {len(theirs)}; "
            f"not in both: {_listed(lonely)}",
            expected="the same images before the edit for all concepts",
        )


def _digests(folder: ConceptFolder) -> dict[str, str]:
    """Return the hash of every image before the edit; of halves, of its pixels."""
    if any(pair.after is not None for pair in folder.files):
        return {pair.name: remembered_sha256(pair.before) for pair in folder.files}
    import hashlib

    found = {}
    for pair in folder.files:
        image = _opened(pair.before)
        left = image.crop((0, 0, image.width // 2, image.height))
        found[pair.name] = hashlib.sha256(left.tobytes()).hexdigest()
    return found


def _hashes(pair: PairFiles) -> list[str]:
    return [remembered_sha256(path) for path in (pair.before, pair.after) if path is not None]


def _size(path: Path) -> tuple[int, int]:
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not a readable image: {error}") from error


def _opened(path: Path) -> PIL.Image.Image:
    import PIL.Image

    from finectl.data.pixels import to_8_bits

    try:
        with PIL.Image.open(path) as image:
            return to_8_bits(image, 3)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{path} is not a readable image: {error}") from error


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
