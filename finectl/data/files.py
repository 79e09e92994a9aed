"""Images as they are in a folder or a zip file, at their own sizes: for measuring what another tool made.

An image is decoded as the usual tools for measuring decode it: RGB, grey repeated, transparency dropped, the EXIF
orientation ignored. They differ from this for 16 bits a channel alone, which they cut off at 255; here the range is
kept, see `finectl.data.pixels.to_8_bits`.
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from finectl.artifacts.cache import read_record, write_record
from finectl.artifacts.files import sha256_json
from finectl.data.archive import ZipImages
from finectl.data.collection import (
    Content,
    ContentBuilder,
    Survey,
    content_line,
    fault_types,
    image_errors,
    reason_of,
    require_possible,
    require_readable,
    survey,
)
from finectl.data.folder import FolderImages, collection_at
from finectl.data.prompts import read_prompts
from finectl.data.shards import TarImages
from finectl.data.sources import DataOptions
from finectl.data.workers import in_order

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Files: TypeAlias = FolderImages | ZipImages | TarImages


@dataclass(frozen=True)
class FilesInfo:
    """What is known of image files before they are measured.

    Args:
        name: The specification, "folder:PATH".
        fingerprint: sha256 (hex) of the files' names and contents, the same for a folder and a zip file of it.
        count: Images, those that were left out not counted.
        skipped: Images that cannot be read and were left out.
        class_names: Sorted names of the class folders, ("all",) where there are none.
        size: Width and height in pixels, as the headers say; None where images differ.
        prompts_digest: sha256 (hex) of the images' prompts; empty when they have none.
    """

    name: str
    fingerprint: str
    count: int
    skipped: int
    class_names: tuple[str, ...]
    size: tuple[int, int] | None
    prompts_digest: str


def describe_files(argument: str, options: DataOptions) -> FilesInfo:
    """Describe image files from their headers and contents; no torch.

    What was found out is kept in the cache; as long as no image changes, the next time costs a look at each.

    Args:
        argument: Path of a folder or zip file.
        options: With `skip_bad` files that cannot be read are left out, for which all are decoded once.

    Raises:
        InputError: the folder is missing, holds no images, mixes images with class folders, holds files that are not
            images, or only some of the images have a prompt.
    """
    return open_files(argument, options).info


def open_files(argument: str, options: DataOptions) -> ImageFiles:
    """Open image files for reading, in the order of their sorted names.

    Args:
        argument: Path of a folder or zip file.
        options: As for `describe_files`.

    Raises:
        InputError: as for `describe_files`.
    """
    collection = collection_at(argument)
    stamp = collection.stamp()
    found = survey(collection, stamp, options)
    require_readable(collection.title, found.total, found.headers.faults, options.skip_bad)
    content = _decodable(collection, stamp[0], found, options) if options.skip_bad else found.headers
    require_readable(collection.title, found.total, content.faults, options.skip_bad)
    left_out = {name for name, _ in content.faults}
    names = tuple(name for name in collection.names() if name not in left_out)
    prompts = read_prompts(collection, names)
    info = FilesInfo(
        name=f"folder:{argument}",
        fingerprint=content.fingerprint,
        count=content.count,
        skipped=found.total - content.count,
        class_names=content.classes,
        size=found.first[1:] if found.other is None else None,
        prompts_digest="" if prompts is None else sha256_json(list(prompts)),
    )
    return ImageFiles(info, names, collection, prompts)


class ImageFiles:
    """Image files that are decoded when they are asked for.

    Its methods may be called by several threads at once, as `finectl.data.workers.in_order` does. PIL warns of odd
    files unless `finectl.data.collection.image_errors` is entered around the reading.

    Attributes:
        info: What is known of them.
        names: Paths relative to the folder with forward slashes, sorted.
    """

    def __init__(
        self, info: FilesInfo, names: tuple[str, ...], collection: Files, prompts: tuple[str, ...] | None
    ) -> None:
        from PIL import Image

        Image.init()  # not safe in several threads
        self.info = info
        self.names = names
        self._collection = collection
        self._prompts = prompts

    @property
    def count(self) -> int:
        """Number of images."""
        return self.info.count

    @property
    def fingerprint(self) -> str:
        """See `FilesInfo`."""
        return self.info.fingerprint

    @cached_property
    def labels(self) -> list[int]:
        """Index in `info.class_names` of each image's class."""
        label_of = {name: label for label, name in enumerate(self.info.class_names)}
        return [label_of[self._collection.class_of(name)] for name in self.names]

    def prompts(self) -> list[str] | None:
        """Return the prompt of each image, None when they have none.

        It is that of a metadata.jsonl, in the images' folder or above, or else the content of the text file beside the
        image; white space around it is dropped.
        """
        return None if self._prompts is None else list(self._prompts)

    def read(self, index: int) -> npt.NDArray[np.uint8]:
        """Decode an image.

        Args:
            index: Its place in `names`.

        Returns:
            Levels 0..255, RGB, (H, W, 3).

        Raises:
            InputError: it cannot be decoded.
        """
        name = self.names[index]
        try:
            return _decode(self._collection.read(name))
        except fault_types() as error:
            require_readable(self._collection.title, self.count, [(name, reason_of(error))], left_out=False)
            raise


def _decode(encoded: bytes) -> npt.NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    from finectl.data.pixels import FORMATS, to_8_bits

    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        require_possible(image)
        image.load()
        image.info.pop("transparency", None)  # dropped in any case, but PIL would warn of some kinds
        return np.array(to_8_bits(image, 3, upright=False), dtype=np.uint8)  # a copy, which may be written to


def _decodable(collection: Files, stamp: str, found: Survey, options: DataOptions) -> Content:
    """Return what can be decoded, which only decoding shows; it is kept in the cache.

    It can be more than what a data set has of the same files: there an EXIF orientation has to be readable too.
    """
    key = sha256_json(["files", stamp])
    known = _content_of(read_record(key))
    if known is not None:
        return known
    bad = dict(found.headers.faults)
    names = [name for name in collection.names() if name not in bad]
    content = ContentBuilder(collection)

    def check(name: str) -> bytes | str:
        try:
            encoded = collection.read(name)
            _decode(encoded)
        except fault_types() as error:
            return reason_of(error)
        return content_line(encoded)

    with image_errors():
        for name, result in zip(names, in_order(names, check, options, "checking images"), strict=True):
            if isinstance(result, str):
                content.fault(name, result)
            else:
                content.add(name, result)
    done = content.finish()
    whole = Content(done.fingerprint, done.count, done.classes, tuple(sorted({**bad, **dict(done.faults)}.items())))
    write_record(key, asdict(whole))
    return whole


def _content_of(record: dict[str, Any] | None) -> Content | None:
    try:
        values = record or {}
        faults = tuple((str(name), str(reason)) for name, reason in values["faults"])
        return Content(str(values["fingerprint"]), int(values["count"]), tuple(values["classes"]), faults)
    except (KeyError, TypeError, ValueError):
        return None
