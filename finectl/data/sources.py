"""The data sets that `--data` names: what they are, how many images, which size, and how they are split.

Everything here answers before torch, numpy or PIL is imported (an image folder may need PIL for the images' sizes): it
is what `--help`, `--dry-run` and an artifact's recipe ask. The images themselves are read by `finectl.data.dataset`.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.errors import InputError, UsageError
from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    from finectl.console import Console

DEFAULT_RESIZE_FILTER = "bicubic"
HELDOUT_PERCENT = 20
MAX_HELDOUT = 10_000
CLASSES = "#"
"""Between a data set and the classes of it that are wanted."""

# Each module defines `describe(argument, image_size, options) -> DataInfo` and
# `open_images(argument, info, options) -> finectl.data.dataset.Store`.
SOURCES = Registry(
    "data set",
    {
        "digits": Entry("finectl.data.digits", "1,797 real 8x8 grey digits in 10 classes, from scikit-learn's wheel"),
        "photos": Entry("finectl.data.photos", "1,026 RGB tiles of 8 real photographs, from scikit-image's wheel"),
        "folder": Entry("finectl.data.folder", "folder:PATH, your own images (a folder or .zip), flat or by class"),
        "latents": Entry("finectl.data.latents", "latents:PATH, latents of images, made by finectl encode"),
        "hf": Entry("finectl.data.hf", "hf:NAME, a data set of the Hugging Face hub, or one saved in a folder"),
        "shape": Entry("finectl.data.shape", "shape:CxSxS:CLASSES, no data at all: for --dry-run before there is any"),
    },
)


@dataclass(frozen=True)
class Argument:
    """What a source takes after its name and a colon.

    Args:
        names: What the argument names, for messages.
        form: How it is written.
        example: One that could be.
        is_path: Whether it is always a path; "hf" takes names as well.
    """

    names: str
    form: str
    example: str
    is_path: bool


# The sources that are not here take nothing.
ARGUMENTS: Mapping[str, Argument] = {
    "folder": Argument("folder", "folder:PATH", "folder:./images", is_path=True),
    "latents": Argument("latents", "latents:PATH", "latents:artifacts/latents/NAME", is_path=True),
    "shape": Argument("shape", "shape:CxSxS:CLASSES", "shape:4x32x32:1000", is_path=False),
    "hf": Argument("data set", "hf:NAME[,config=...][,split=...]", "hf:ylecun/mnist", is_path=False),
}


@dataclass(frozen=True)
class DataOptions:
    """How images are read.

    Args:
        resize_filter: PIL's name of the filter for the user's images: "bicubic", "lanczos", "bilinear", "box",
            "nearest".
        flip: Training may mirror an image left to right; the held-out part is never mirrored.
        skip_bad: Leave files out that cannot be read, and count them, instead of refusing the data set.
        console: Where slow work shows its progress; stderr by default.
        check: Called now and then by slow work, which it ends by raising: a signal may ask for that.
        captions: What is read of the images' captions: `none`, `any` that are there, or `all`, without which the set
            is refused.
    """

    resize_filter: str = DEFAULT_RESIZE_FILTER
    flip: bool = False
    skip_bad: bool = False
    console: Console | None = field(default=None, compare=False, repr=False)
    check: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    captions: str = "none"


DEFAULT_OPTIONS = DataOptions()


@dataclass(frozen=True)
class DataInfo:
    """What a data set is, known without loading it.

    Args:
        name: The specification as `--data` takes it: "digits", "photos", "folder:PATH", "latents:PATH", "hf:NAME".
        fingerprint: sha256 (hex) of the files' contents; it decides the split.
        count: Images in the whole set, those that were left out not counted.
        train_count: Images in the training split.
        heldout_count: Images in the held-out split.
        image_size: Height and width of the images as loaded, in pixels; of latents, their own.
        channels: 1 (grey) or 3 (RGB); of latents, their own.
        num_classes: Number of classes, 1 when there are no labels.
        class_names: One name a class, in the order of the labels.
        bundled: Whether the set comes with an installed package rather than from the user.
        resize_filter: Name of the filter that brought the images to `image_size`, "none" when they are as stored.
        skipped: Images that cannot be read and were left out.
        vae: For latents the autoencoder that made them: "name", "digest", "scaling_factor", "shift_factor" and
            "downscale" (pixels a latent). None for pixels.
        split_by: The fingerprint that decides the split where it is not the set's own: that of the images from which
            latents were made, or that of the images alone where the fingerprint is of their captions too.
        captions: sha256 (hex) of the images' captions; empty where there are none, or none were asked for.
        text: The encoder that turns the captions into what a model takes, as `finectl.models.text` describes it; None
            where no model is conditioned on them.
        whole: The fingerprint of the set of which these are some classes; empty where it is whole.
    """

    name: str
    fingerprint: str
    count: int
    train_count: int
    heldout_count: int
    image_size: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]
    bundled: bool
    resize_filter: str = "none"
    skipped: int = 0
    vae: Mapping[str, Any] | None = None
    split_by: str = ""
    captions: str = ""
    text: Mapping[str, Any] | None = None
    whole: str = ""


def parse_spec(spec: str) -> tuple[str, str]:
    """Split a data specification into the source's name and its argument.

    Args:
        spec: A source's name, and after a colon its argument where it takes one.

    Returns:
        Name in `SOURCES`, and the argument (empty for a bundled set); which classes are wanted is left out.

    Raises:
        UsageError: no such source, an argument missing after the colon, or one where none is taken.
    """
    spec, _ = split_classes(spec)
    name, colon, argument = spec.partition(":")
    if name not in SOURCES and (Path(spec).is_dir() or (spec.lower().endswith(".zip") and Path(spec).is_file())):
        kind = "folder" if Path(spec).is_dir() else "zip file"
        raise UsageError(f"--data {spec} is a {kind}", expected="the prefix folder:", fix=f"--data folder:{spec}")
    SOURCES[name]  # raises with the nearest name
    taken = ARGUMENTS.get(name)
    if taken and not argument:
        raise UsageError(f"--data {spec} names no {taken.names}", expected=taken.form, fix=f"--data {taken.example}")
    if not taken and colon:
        raise UsageError(f"--data {name} takes nothing after its name, got {spec!r}", fix=f"--data {name}")
    return name, argument


def split_classes(spec: str) -> tuple[str, tuple[str, ...]]:
    """Split `digits#3,7` into the data set and the names of the classes that are wanted, none for all of them.

    A path that itself has such a sign in it stays whole.

    Raises:
        UsageError: no class is named after the sign.
    """
    whole, sign, text = spec.rpartition(CLASSES)
    if not sign or os.path.exists(spec.partition(":")[2] or spec):
        return spec, ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"--data {spec} names no class", expected="names of classes, such as digits#3,7")
    return whole, names


def absolute_spec(spec: str) -> str:
    """Return a specification that means the same from any working directory: its path, if it has one, absolute."""
    whole, names = split_classes(spec)
    if names:
        return f"{absolute_spec(whole)}{CLASSES}{','.join(names)}"
    name, argument = parse_spec(spec)
    taken = ARGUMENTS.get(name)
    path, comma, choices = argument.partition(",") if taken and not taken.is_path else (argument, "", "")
    if taken and (taken.is_path or Path(path).is_dir()):
        return f"{name}:{os.path.abspath(path)}{comma}{choices}"
    return spec


def describe(spec: str, image_size: int | None = None, options: DataOptions = DEFAULT_OPTIONS) -> DataInfo:
    """Say what a data set is without loading its images.

    Args:
        spec: A source's name, and after a colon its argument where it takes one; after # the classes that are wanted.
        image_size: Side of the loaded images in pixels; None for the set's own.
        options: How images are read.

    Returns:
        Counts, shape, classes and fingerprint.

    Raises:
        UsageError: the specification, the size or an option is not possible.
        InputError: the package or the folder is missing, empty, or holds files that are not images.
    """
    name, argument = parse_spec(spec)
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size {image_size} pixels", expected="at least 1 pixel")
    info: DataInfo = SOURCES.load(name).describe(argument, image_size, options)
    _, classes = split_classes(spec)
    if classes:
        from finectl.data.classes import select_classes

        return select_classes(info, classes, options)
    return info


def heldout_size(count: int) -> int:
    """Return how many of `count` images are held out.

    It is 20 %, rounded, at least 1 where there are 2 or more, and at most 10,000: more would not make a held-out loss
    or a Frechet distance more certain than they need to be, and would be missed in training.
    """
    rounded = (2 * HELDOUT_PERCENT * count + 100) // 200
    return min(max(rounded, 1), MAX_HELDOUT) if count >= 2 else 0


@lru_cache(maxsize=8)
def heldout_indices(fingerprint: str, count: int) -> tuple[int, ...]:
    """Return which images of a data set are held out, by its fingerprint alone, in ascending order.

    The images are ranked by sha256 of fingerprint and index; the first ones of that ranking are held out.

    Args:
        fingerprint: The set's fingerprint, hexadecimal.
        count: Number of images.
    """
    start = hashlib.sha256(f"{fingerprint}:".encode())

    def rank(index: int) -> bytes:
        digest = start.copy()
        digest.update(b"%d" % index)
        return digest.digest()

    return tuple(sorted(heapq.nsmallest(heldout_size(count), range(count), key=rank)))


def split_indices(fingerprint: str, count: int) -> tuple[list[int], list[int]]:
    """Split a data set into training and held-out images, see `heldout_indices`.

    Args:
        fingerprint: The set's fingerprint, hexadecimal.
        count: Number of images.

    Returns:
        Indices of the training and of the held-out images, each in ascending order.
    """
    heldout = heldout_indices(fingerprint, count)
    held = set(heldout)
    return [index for index in range(count) if index not in held], list(heldout)


def package_folder(package: str, distribution: str, fix: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        package: Name of a top-level package.
        distribution: What pip calls it, for the message.
        fix: Command that installs it.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"{distribution} is not installed; the bundled data set is part of its wheel",
            fix=fix,
        )
    return Path(spec.submodule_search_locations[0])


def read_packaged(path: Path, distribution: str, fix: str) -> bytes:
    """Return the bytes of a file in an installed package.

    Args:
        path: The file.
        distribution: What pip calls the package, for the message.
        fix: Command that installs a version which holds the file.

    Raises:
        InputError: the installed version lacks the file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); this version of {distribution} does not hold the data set",
            fix=fix,
        ) from error
