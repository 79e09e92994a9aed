"""Decoded images in the cache: made once from a collection, read ever after without decoding.

One safetensors file holds the images, uint8 (count, C, H, W), and their labels, int64 (count,). It is written image by
image, so that a set need not fit into memory, and read through a memory map.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_json
from finectl.artifacts.tensors import METADATA_KEY, check_header, read_header, read_metadata
from finectl.console import Console
from finectl.data.cache import Draft, images_file, locked, refused_by_disk
from finectl.data.collection import (
    Collection,
    Content,
    ContentBuilder,
    Survey,
    content_line,
    fault_types,
    image_errors,
    info_of,
    reason_of,
    remember,
    require_possible,
    require_readable,
    shape_of,
    survey,
)
from finectl.data.sources import DataInfo, DataOptions
from finectl.data.workers import in_order
from finectl.errors import InputError

if TYPE_CHECKING:
    import torch

    from finectl.data.dataset import Store
    from finectl.data.mapped import MappedRows

# The header is written last, when the number of images is known, into room left for it: one page with its length.
PAGE = 4096


@dataclass(frozen=True)
class Form:
    """How images are decoded: side in pixels, channels, and the filter for those of another size."""

    image_size: int
    channels: int
    resize_filter: str

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.channels * self.image_size**2


def describe_collection(name: str, collection: Collection, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe encoded images.

    Args:
        name: The specification, as `--data` takes it.
        collection: The images.
        image_size: Side in pixels to which the images' central squares are resized; None takes the images' own size,
            when they are square and all of one size.
        options: How images are read. With `skip_bad` all are decoded, because only that shows which can be.

    Raises:
        UsageError: the filter is unknown.
        InputError: there are no images, files that cannot be read, or images of several sizes without an `image_size`.
        ResourceError: the disk is full.
    """
    stamp = collection.stamp()
    found = survey(collection, stamp, options)
    require_readable(collection.title, found.total, found.content.faults, options.skip_bad)
    form = Form(*shape_of(collection.title, found, image_size, options.resize_filter))
    if options.skip_bad and found.decoded is None:
        found = _decode(collection, stamp[0], form, options)
        require_readable(collection.title, found.total, found.content.faults, left_out=True)
    return info_of(name, found, form.image_size, form.channels, form.resize_filter)


def open_collection(collection: Collection, info: DataInfo, options: DataOptions) -> Store:
    """Open the decoded images of a collection, which are made when they are not in the cache.

    Args:
        collection: The images.
        info: What `describe_collection` returned.
        options: How images are read.

    Raises:
        InputError: some of the images are corrupt, or they have changed since they were described.
        ResourceError: the disk is full.
    """
    store = open_decoded(info)
    if store is not None:
        return store
    form = Form(info.image_size, info.channels, info.resize_filter)
    found = _decode(collection, collection.stamp()[0], form, options)
    require_readable(collection.title, found.total, found.content.faults, options.skip_bad)
    store = open_decoded(info)
    if store is None:
        raise _changed(collection)
    return store


@dataclass(frozen=True, eq=False)
class DecodedStore:
    """Decoded images in a file."""

    rows: MappedRows
    labels: torch.Tensor
    sampled: bool = False

    def read(self, indices: torch.Tensor, flips: torch.Tensor | None = None) -> torch.Tensor:
        """See `finectl.data.dataset.Store.read`."""
        from finectl.data.dataset import mirror

        return mirror(self.rows.take(indices), flips)

    def transform(self, raw: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """See `finectl.data.dataset.Store.transform`."""
        from finectl.data.dataset import to_unit_range

        return to_unit_range(raw)


def open_decoded(info: DataInfo) -> DecodedStore | None:
    """Open what the cache holds of a data set; None when there is nothing, or nothing whole."""
    fingerprint = info.split_by or info.fingerprint  # of the images alone, whatever their captions
    path = _file_of(fingerprint, Form(info.image_size, info.channels, info.resize_filter))
    images = (info.count, info.channels, info.image_size, info.image_size)
    try:
        start = _checked(path, fingerprint, images)
        return _opened(path, start, images)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None


def _checked(path: Path, fingerprint: str, images: tuple[int, ...]) -> int:
    """Return the byte at which the images begin in a file that holds what it should."""
    check_header(path)
    header = read_header(path)
    wanted = {"images": ("U8", list(images)), "labels": ("I64", [images[0]])}
    held = {name: (header[name]["dtype"], header[name]["shape"]) for name in wanted}
    if held != wanted or header["images"]["data_offsets"][0] != 0 or read_metadata(path)["fingerprint"] != fingerprint:
        raise ValueError(f"{path} holds something else")
    return int(header["__data_start__"])


def _opened(path: Path, start: int, images: tuple[int, ...]) -> DecodedStore:
    import numpy as np
    import torch

    from finectl.data.mapped import MappedRows

    rows = MappedRows(path, start, images[0], images[1:])
    labels = np.fromfile(path, "<i8", images[0], offset=path.stat().st_size - 8 * images[0])
    return DecodedStore(rows, torch.from_numpy(labels))


def _file_of(fingerprint: str, form: Form) -> Path:
    return images_file(fingerprint, form.image_size, form.channels, form.resize_filter)


def _decode(collection: Collection, stamp: str, form: Form, options: DataOptions) -> Survey:
    """Decode all images into the cache and return the survey, which now says which can be decoded.

    Nothing is put into the cache when images that may not be left out cannot be decoded.
    """
    key = sha256_json([stamp, form.image_size, form.channels, form.resize_filter])[:32]
    console = options.console or Console()
    said: list[str] = []

    def waiting() -> None:
        if not said:
            said.append(f"waiting for another process that decodes {collection.title}")
            console.note(said[0])
        if options.check is not None:
            options.check()

    with locked(key, waiting):
        known = survey(collection, (stamp, 0), options)  # another process may have been at work
        target = _file_of(known.content.fingerprint, form)
        if _is_whole(target, known.content, form):
            known = replace(known, decoded=known.content)
        else:
            if target.exists():
                console.note(f"the cached images {target} are damaged and are made again")
            known = _write(collection, key, stamp, known, form, options)
        remember(stamp, known)
    return known


def _is_whole(target: Path, content: Content, form: Form) -> bool:
    try:
        _checked(target, content.fingerprint, (content.count, form.channels, form.image_size, form.image_size))
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _write(collection: Collection, key: str, stamp: str, found: Survey, form: Form, options: DataOptions) -> Survey:
    """Write the cache's file; the lock is held."""
    bad = dict(found.headers.faults)
    names = [name for name in collection.names() if name not in bad]
    content = ContentBuilder(collection)
    draft = Draft(key, PAGE + len(names) * (form.image_bytes + 8))
    try:
        draft.stream.seek(PAGE)
        with image_errors():
            decoded = in_order(names, lambda name: _decode_one(collection, name, form), options, "decoding images")
            for name, result in zip(names, decoded, strict=True):
                if isinstance(result, str):
                    content.fault(name, result)
                    continue
                line, pixels = result
                content.add(name, line)
                if options.skip_bad or not content.has_faults:
                    with refused_by_disk(draft.path):
                        draft.stream.write(pixels)
        if collection.stamp()[0] != stamp:
            raise _changed(collection)
        done = content.finish()
        if done.count and (options.skip_bad or not (bad or done.faults)):
            _finish(draft, collection, done, content.names, form)
        faults = sorted({**bad, **dict(done.faults)}.items()) if bad else done.faults
        return replace(found, decoded=replace(done, faults=tuple(faults)))
    finally:
        draft.discard()


def _decode_one(collection: Collection, name: str, form: Form) -> tuple[bytes, bytes] | str:
    """Return an image's line of the fingerprint and its levels, or what is wrong with it."""
    from PIL import Image

    from finectl.data.pixels import FORMATS, square, to_8_bits, to_levels

    try:
        encoded = collection.read(name)
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            require_possible(image)
            pixels = to_levels(square(to_8_bits(image, form.channels), form.image_size, form.resize_filter))
        return content_line(encoded), pixels.tobytes()
    except fault_types() as error:
        return reason_of(error)


def _finish(draft: Draft, collection: Collection, content: Content, names: list[str], form: Form) -> None:
    """Write the labels and the header, and put the file in its place."""
    import numpy as np

    label_of = {name: label for label, name in enumerate(content.classes)}
    labels = np.fromiter((label_of[collection.class_of(name)] for name in names), "<i8", len(names))
    end = content.count * form.image_bytes
    shape = [content.count, form.channels, form.image_size, form.image_size]
    header: dict[str, Any] = {
        "__metadata__": {METADATA_KEY: json.dumps({"fingerprint": content.fingerprint})},
        "images": {"dtype": "U8", "shape": shape, "data_offsets": [0, end]},
        "labels": {"dtype": "I64", "shape": [content.count], "data_offsets": [end, end + labels.nbytes]},
    }
    with refused_by_disk(draft.path):
        draft.stream.write(labels.tobytes())
        draft.stream.seek(0)
        draft.stream.write((PAGE - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(PAGE - 8))
    draft.publish(_file_of(content.fingerprint, form))


def _changed(collection: Collection) -> InputError:
    return InputError(
        f"{collection.title} changed while it was read",
        expected="images that stay as they are until they have been read",
        fix="run the same command again",
    )
