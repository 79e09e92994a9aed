"""`--data folder:PATH`: the user's own images in a folder, a zip or tar files, flat or one subfolder a class."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.artifacts.cache import read_record, write_record
from finectl.artifacts.files import sha256_json
from finectl.data.archive import ZipImages
from finectl.data.captions import NONE, captioned
from finectl.data.collection import MAX_FILE_BYTES, TICK_NS, readable_names
from finectl.data.decoded import describe_collection, open_collection
from finectl.data.layout import SUFFIXES, class_names, class_of, require_layout
from finectl.data.prompts import read_prompts
from finectl.data.shards import TarImages, tar_files
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import InputError

if TYPE_CHECKING:
    from finectl.data.dataset import Store

TEXT_SUFFIXES = (".txt", ".jsonl")


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe a folder or a zip file of images from its files' headers and contents.

    What was found out is kept in the cache; as long as no file changes, the next time costs a look at each.

    Args:
        argument: Path of the folder or zip file.
        image_size: Side in pixels to which the images' central squares are resized; None takes the images' own size,
            when they are square and all of one size.
        options: Filter, and whether files that cannot be read are left out.

    Returns:
        One class for each subfolder that holds images, or the single class "all" when there are no subfolders. All
        images are RGB unless every one of them is grey.

    Raises:
        UsageError: the filter is unknown.
        InputError: the folder is missing, holds no images, mixes images with class folders, holds files that are not
            images, or images of several sizes without an `image_size`.
        ResourceError: the disk is full.
    """
    collection = collection_at(argument)
    info = describe_collection(f"folder:{argument}", collection, image_size, options)
    return captioned(info, _captions_digest(collection, info, options), options)


def captions(argument: str, info: DataInfo, options: DataOptions, labels: Sequence[int]) -> Sequence[str]:
    """Return the caption of every image, in the order of `open_images`.

    Raises:
        InputError: an image has none while others have, or a file of captions is damaged.
    """
    collection = collection_at(argument)
    return read_prompts(collection, readable_names(collection, options)) or ()


def _captions_digest(collection: FolderImages | ZipImages | TarImages, info: DataInfo, options: DataOptions) -> str:
    """Return the digest of the images' captions, empty for none; it is kept in the cache until a file changes."""
    if options.captions == NONE:
        return ""
    stamp, newest = collection.text_stamp()
    key = sha256_json(["captions", info.fingerprint, stamp])
    record = read_record(key)
    if record is not None and isinstance(record.get("captions"), str):
        return str(record["captions"])
    found = read_prompts(collection, readable_names(collection, options))
    digest = "" if found is None else sha256_json(list(found))
    if time.time_ns() - newest > TICK_NS:  # a later change within a tick of the clock would look the same
        write_record(key, {"captions": digest})
    return digest


def labels(argument: str, info: DataInfo, options: DataOptions) -> list[int]:
    """Return the class of every image, in the order of `open_images`."""
    collection = collection_at(argument)
    number = {name: label for label, name in enumerate(info.class_names)}
    return [number[collection.class_of(name)] for name in readable_names(collection, options)]


def open_images(argument: str, info: DataInfo, options: DataOptions) -> Store:
    """Open the decoded images of a folder or a zip file, in the order of their sorted paths.

    Args:
        argument: Path of the folder or zip file.
        info: What `describe` returned.
        options: Whether files that cannot be read are left out.

    Returns:
        Images uint8 (C, H, W) in the cache's memory-mapped file; it is made when it is not there.

    Raises:
        InputError: some of the files are corrupt; up to 10 of them are named.
        ResourceError: the disk is full.
    """
    return open_collection(collection_at(argument), info, options)


def collection_at(argument: str) -> FolderImages | ZipImages | TarImages:
    """Return the encoded images under a path.

    Args:
        argument: Path of a folder or zip file, of a tar file, or of a folder of tar files.

    Raises:
        InputError: there is no such folder.
    """
    path = Path(argument)
    if path.is_file() and path.suffix.lower() == ".zip":
        return ZipImages(path)
    return TarImages(path) if tar_files(path) else FolderImages(path)


class FolderImages:
    """The images under a folder, hidden ones left out.

    Attributes:
        top: What is left out in front of the names; nothing here, see `ZipImages`.
    """

    top = ""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            state = "is not a folder" if root.exists() else "does not exist"
            raise InputError(f"{root} {state}", expected="a folder or a zip file of images", fix="--data folder:PATH")
        self.root = root
        self.title = str(root)

    def stamp(self) -> tuple[str, int]:
        """See `Collection.stamp`: a hash over path, size and time of change of every file."""
        digest = hashlib.sha256(f"folder {os.path.realpath(self.root)}\n".encode("utf-8", "surrogateescape"))
        newest = 0
        for name, size, changed_ns in _walk(self.root, "", ()):
            digest.update(os.fsencode(name) + f"\0{size}\0{changed_ns}\n".encode())
            newest = max(newest, changed_ns)
        return digest.hexdigest(), newest

    def text_stamp(self) -> tuple[str, int]:
        """Return what `stamp` does, of the files that may hold captions."""
        digest, newest = hashlib.sha256(f"texts {os.path.realpath(self.root)}\n".encode("utf-8", "surrogateescape")), 0
        for name, size, changed_ns in _walk(self.root, "", (), TEXT_SUFFIXES):
            digest.update(os.fsencode(name) + f"\0{size}\0{changed_ns}\n".encode())
            newest = max(newest, changed_ns)
        return digest.hexdigest(), newest

    def names(self) -> list[str]:
        """See `Collection.names`."""
        return image_files(self.root)

    def class_of(self, name: str) -> str:
        """See `Collection.class_of`."""
        return class_of(name)

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """See `Collection.classes`."""
        return class_names(names)

    def read(self, name: str) -> bytes:
        """See `Collection.read`."""
        path = self.root / name
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read")
        return path.read_bytes()

    def beside(self, name: str) -> bytes | None:
        """Return another file of the folder, None when it is not there.

        Args:
            name: Its path relative to the folder.

        Raises:
            OSError: it cannot be read.
            ValueError: it is too large.
        """
        return self.read(name) if (self.root / name).is_file() else None


def image_files(root: Path) -> list[str]:
    """List the images under a folder, hidden ones left out.

    Args:
        root: The folder.

    Returns:
        Paths relative to `root` with forward slashes, sorted, whatever the order of the directory.

    Raises:
        InputError: the folder holds no images, or images beside class folders.
    """
    files = [name for name, _, _ in _walk(root, "", ())]
    require_layout(root, files)
    return files


def _walk(
    folder: Path, prefix: str, above: tuple[str, ...], suffixes: tuple[str, ...] = SUFFIXES
) -> Iterator[tuple[str, int, int]]:
    """Give path, size and time of change of every image, in the order of the paths, a folder at a time."""
    real = os.path.realpath(folder)
    if real in above:  # a link that leads back up
        return
    try:
        with os.scandir(folder) as scanned:
            entries = [(f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in scanned]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}", expected="a folder of images") from error
    for name, entry in sorted(entries, key=lambda pair: pair[0]):
        if name.startswith("."):
            continue
        if name.endswith("/"):
            yield from _walk(Path(entry.path), prefix + name, (*above, real), suffixes)
        elif name.lower().endswith(suffixes):
            try:
                status = entry.stat()
            except OSError:  # a link that leads nowhere: reading it will say so
                yield prefix + name, -1, 0
            else:
                yield prefix + name, status.st_size, status.st_mtime_ns
