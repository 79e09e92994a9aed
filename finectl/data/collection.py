"""What is known about a collection of encoded images (a folder, a zip file, a table) from their headers. No torch.

It is found out once and kept in the cache under the collection's stamp, which a change of any file changes.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

from finectl.artifacts.cache import read_record, write_record
from finectl.data.sources import DataInfo, DataOptions, heldout_size
from finectl.data.workers import in_order
from finectl.errors import InputError, UsageError

LISTED_FAULTS = 10
MAX_FILE_BYTES = 1 << 28
# Files changed twice within one tick of the file system's clock look the same; it ticks every 10 ms or less.
TICK_NS = 50_000_000

Fault = tuple[str, str]  # an image's name, and what is wrong with it


class Collection(Protocol):
    """Encoded images, each with a name that says its class.

    The names have one order, whatever the order on disk. `read` is called by several threads at once.
    """

    @property
    def title(self) -> str:
        """What messages call it, such as its path."""

    def stamp(self) -> tuple[str, int]:
        """Return a hash that changes with every file, found without reading any, and the newest change in ns."""

    def names(self) -> list[str]:
        """Return the names of all images.

        Raises:
            InputError: there are none, or the collection is not laid out as it should be.
        """

    def class_of(self, name: str) -> str:
        """Return the class of an image."""

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the classes of the collection when these images are those that can be read, in the labels' order."""

    def read(self, name: str) -> bytes:
        """Return an encoded image.

        Raises:
            OSError: it cannot be read.
            ValueError: it is too large to be an image.
        """


@dataclass(frozen=True)
class Content:
    """The images of a collection that can be read.

    Args:
        fingerprint: sha256 over (name, bytes, sha256 of the content) of each of them, in order.
        count: Their number.
        classes: Their classes, in the labels' order.
        faults: The images that cannot be read.
    """

    fingerprint: str
    count: int
    classes: tuple[str, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Survey:
    """What headers and contents say.

    Args:
        total: All images, also those that cannot be read.
        headers: The content as far as headers show it.
        decoded: The content after every image has been decoded; None before that.
        first: Name, width and height of the first image.
        other: The same of the first image of another size; None when all have one size.
        grey: Whether every image is grey.
    """

    total: int
    headers: Content
    decoded: Content | None
    first: tuple[str, int, int]
    other: tuple[str, int, int] | None
    grey: bool

    @property
    def content(self) -> Content:
        """The best that is known."""
        return self.decoded or self.headers


@dataclass(frozen=True)
class Header:
    """What one image's header says, and the part of the fingerprint that its content is."""

    width: int
    height: int
    grey: bool
    line: bytes


def survey(collection: Collection, stamp: tuple[str, int], options: DataOptions) -> Survey:
    """Return what is known about a collection; the first time all files are read.

    Args:
        collection: The images.
        stamp: What `collection.stamp()` returned.
        options: Where to show progress.

    Raises:
        InputError: the collection is not laid out as it should be.
    """
    known = _from_record(read_record(stamp[0]))
    if known is not None:
        return known
    time.sleep(max(0, min(stamp[1] + TICK_NS - time.time_ns(), TICK_NS)) / 1e9)
    found = _scan(collection, options)
    remember(stamp[0], found)
    return found


def readable_names(collection: Collection, options: DataOptions) -> tuple[str, ...]:
    """Return the names of the images that a data set of the collection has, in their order."""
    found = survey(collection, collection.stamp(), options)
    left_out = {name for name, _ in found.content.faults}
    return tuple(name for name in collection.names() if name not in left_out)


def remember(stamp: str, found: Survey) -> None:
    """Keep what was found out about a collection."""
    write_record(stamp, asdict(found))


def _scan(collection: Collection, options: DataOptions) -> Survey:
    names = collection.names()
    content = ContentBuilder(collection)
    first: tuple[str, int, int] | None = None
    other: tuple[str, int, int] | None = None
    grey = True
    with image_errors():
        for name, header in zip(
            names, in_order(names, lambda name: _header(collection, name), options, "reading images"), strict=True
        ):
            if isinstance(header, str):
                content.fault(name, header)
                continue
            content.add(name, header.line)
            grey = grey and header.grey
            first = first or (name, header.width, header.height)
            if other is None and (header.width, header.height) != first[1:]:
                other = (name, header.width, header.height)
    return Survey(len(names), content.finish(), None, first or ("", 0, 0), other, grey)


class ContentBuilder:
    """Gathers a `Content` from one image after another."""

    def __init__(self, collection: Collection) -> None:
        self._collection = collection
        self._digest = hashlib.sha256()
        self._faults: list[Fault] = []
        self.names: list[str] = []

    def add(self, name: str, line: bytes) -> None:
        """Count an image that can be read; `line` is what `content_line` says of it."""
        self._digest.update(os.fsencode(name) + line)
        self.names.append(name)

    def fault(self, name: str, reason: str) -> None:
        """Note an image that cannot be read."""
        self._faults.append((name, reason))

    @property
    def has_faults(self) -> bool:
        """Whether an image could not be read."""
        return bool(self._faults)

    def finish(self) -> Content:
        """Return what was gathered."""
        classes = self._collection.classes(self.names)
        return Content(self._digest.hexdigest(), len(self.names), classes, tuple(self._faults))


def content_line(encoded: bytes) -> bytes:
    """Return what an image's content adds to the fingerprint."""
    return f"\0{len(encoded)}\0{hashlib.sha256(encoded).hexdigest()}\n".encode()


def _header(collection: Collection, name: str) -> Header | str:
    from PIL import Image

    from finectl.data.pixels import FORMATS, GREY_MODES

    try:
        encoded = collection.read(name)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            require_possible(image)
            return Header(image.width, image.height, image.mode in GREY_MODES, content_line(encoded))
    except fault_types() as error:
        return reason_of(error)


def require_possible(image: Any) -> None:
    """Raise ValueError for an image so large that decoding it would use up the memory: it is a mistake or an attack."""
    from PIL import Image

    if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS:,} that are read")


def fault_types() -> tuple[type[Exception], ...]:
    """Return what PIL raises for damaged files, depending on the format and on where the damage is."""
    from PIL import Image

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    return (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, zlib.error, *bombs)


def reason_of(error: BaseException) -> str:
    """Return what is wrong with an image, in a few words without the object that PIL could not identify."""
    text = str(error) or type(error).__name__
    return "not an image" if "cannot identify image file" in text else text.splitlines()[0][:200]


@contextmanager
def image_errors() -> Iterator[None]:
    """Within it, PIL has its formats loaded, its notes about odd files are not shown, and huge images are errors."""
    import warnings

    from PIL import Image

    Image.init()  # not safe in several threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def require_readable(title: str, total: int, faults: Sequence[Fault], left_out: bool) -> None:
    """Check that images can be read.

    Args:
        title: The collection's.
        total: Images, with those that cannot be read.
        faults: The images that cannot be read.
        left_out: Whether they may be left out.

    Raises:
        InputError: some cannot be read and may not be left out, or none can; up to 10 are named.
    """
    if not faults or (left_out and len(faults) < total):
        return
    listed = ", ".join(f"{name} ({reason})" for name, reason in faults[:LISTED_FAULTS])
    more = f" and {len(faults) - LISTED_FAULTS} more" if len(faults) > LISTED_FAULTS else ""
    again = "remove these files or put whole ones in their place"
    raise InputError(
        f"{len(faults)} of {total} images in {title} cannot be read: {listed}{more}",
        fix=again if left_out else f"leave them out with --skip-bad, or {again}",
    )


def shape_of(title: str, found: Survey, image_size: int | None, resize_filter: str) -> tuple[int, int, str]:
    """Return size, channels and filter ("none" where nothing is resized) with which a collection is decoded.

    Raises:
        UsageError: the filter is unknown.
        InputError: the images have several sizes or are not square, and no size was asked for.
    """
    from finectl.data.pixels import FILTERS

    if resize_filter not in FILTERS:
        raise UsageError(f"unknown resize filter {resize_filter!r}", expected=f"one of: {', '.join(FILTERS)}")
    size = _common_size(title, found) if image_size is None else image_size
    as_stored = found.other is None and found.first[1:] == (size, size)
    return size, 1 if found.grey else 3, "none" if as_stored else resize_filter


def _common_size(title: str, found: Survey) -> int:
    name, width, height = found.first
    if found.other is not None:
        raise InputError(
            f"the images in {title} differ in size: {name} has {width}x{height} pixels, "
            f"{found.other[0]} has {found.other[1]}x{found.other[2]}",
            expected="a size to which the images' central squares are resized",
            fix="--image-size 32",
        )
    if width != height:
        raise InputError(
            f"the images in {title} are not square: {width}x{height} pixels",
            expected="a size to which the images' central squares are resized",
            fix="--image-size 32",
        )
    return width


def info_of(name: str, found: Survey, image_size: int, channels: int, resize_filter: str) -> DataInfo:
    """Return the description of a collection."""
    content = found.content
    heldout = heldout_size(content.count)
    return DataInfo(
        name=name,
        fingerprint=content.fingerprint,
        count=content.count,
        train_count=content.count - heldout,
        heldout_count=heldout,
        image_size=image_size,
        channels=channels,
        num_classes=len(content.classes),
        class_names=content.classes,
        bundled=False,
        resize_filter=resize_filter,
        skipped=found.total - content.count,
    )


def _from_record(record: dict[str, Any] | None) -> Survey | None:
    if record is None:
        return None
    try:
        values = {field.name: record[field.name] for field in fields(Survey)}
        headers, decoded = _content(values["headers"]), values["decoded"] and _content(values["decoded"])
        first, other = tuple(values["first"]), values["other"] and tuple(values["other"])
        return Survey(int(values["total"]), headers, decoded, first, other, bool(values["grey"]))
    except (KeyError, TypeError, ValueError):
        return None


def _content(value: Any) -> Content:
    faults = tuple((str(name), str(reason)) for name, reason in value["faults"])
    return Content(str(value["fingerprint"]), int(value["count"]), tuple(value["classes"]), faults)
