"""`--data hf:NAME`: a data set of the Hugging Face hub or of the `datasets` library, with a column of images.

Nothing is fetched unless the hub is on line (`--download`); a data set that is in the library's cache, or that
`Dataset.save_to_disk` wrote into a folder, needs no network. No code of a data set is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_json
from finectl.data.captions import NONE, captioned
from finectl.data.collection import MAX_FILE_BYTES, readable_names
from finectl.data.decoded import describe_collection, open_collection
from finectl.data.layout import FLAT_CLASS
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from finectl.data.dataset import Store

INSTALL = "pip install 'finectl[hub]'"
LEAST_VERSION = 4  # earlier ones run Python files that a data set brings
CHOICES = ("config", "split", "image", "label", "text")
TEXT_COLUMNS = ("text", "caption", "prompt")
NO_LABEL = "none"
SAVED_FILES = ("state.json", "dataset_dict.json")


def describe(argument: str, image_size: int | None, options: DataOptions) -> DataInfo:
    """Describe a data set of the hub; see `finectl.data.folder.describe` for what is kept in the cache.

    Args:
        argument: NAME or a path, followed by choices: "owner/name,config=small,split=train,image=img,label=fine".
        image_size: Side in pixels to which the images' central squares are resized; None takes their own.
        options: Filter, and whether images that cannot be read are left out.

    Raises:
        UsageError: a choice is unknown.
        InputError: the library is not installed, the data set is not at hand, or has no such column.
        ResourceError: the disk is full.
    """
    table = TableImages(Reference.parse(argument))
    info = describe_collection(f"hf:{argument}", table, image_size, options)
    if options.captions == NONE:
        return info
    found = captions(argument, info, options, (), table)
    return captioned(info, sha256_json(list(found)) if found else "", options)


def captions(
    argument: str, info: DataInfo, options: DataOptions, labels: Sequence[int], table: TableImages | None = None
) -> list[str]:
    """Return the caption of every image, in the order of `open_images`; none where no column holds any.

    Raises:
        InputError: an image has none while others have, or the column that was chosen is not there.
    """
    table = table or TableImages(Reference.parse(argument))
    return table.captions(readable_names(table, options))


def open_images(argument: str, info: DataInfo, options: DataOptions) -> Store:
    """Open the decoded images of a data set, in the order of its rows.

    Args:
        argument: As for `describe`.
        info: What `describe` returned.
        options: Whether images that cannot be read are left out.

    Raises:
        InputError: images are corrupt; up to 10 of them are named.
        ResourceError: the disk is full.
    """
    return open_collection(TableImages(Reference.parse(argument)), info, options)


@dataclass(frozen=True)
class Reference:
    """Which part of which data set; the choices that are None are found out."""

    name: str
    config: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    text: str | None = None

    @classmethod
    def parse(cls, argument: str) -> Reference:
        """Read "NAME,config=C,split=S,image=COLUMN,label=COLUMN,text=COLUMN".

        Raises:
            UsageError: there is no such choice.
        """
        name, *parts = argument.split(",")
        chosen: dict[str, str] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if key not in CHOICES or not equals or not value:
                raise UsageError(
                    f"--data hf:{argument} has the choice {part!r}",
                    expected=f"NAME followed by any of {', '.join(f',{known}=...' for known in CHOICES)}",
                )
            chosen[key] = value
        return cls(name, **chosen)

    @property
    def is_local(self) -> bool:
        """Whether it names a folder on this machine."""
        return Path(self.name).is_dir()


class TableImages:
    """The images in a column of a table.

    A row's name is its label and its number, so that the fingerprint follows the labels too.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.title = f"hf:{reference.name}"
        self._table = _open(reference)
        self.image_column = _image_column(self._table, reference)
        self.label_column = _label_column(self._table, reference)

    def stamp(self) -> tuple[str, int]:
        """See `Collection.stamp`: the library's own fingerprint, and size and time of change of its files."""
        files = [os.stat(file["filename"]) for file in self._table.cache_files]
        seen = [[status.st_size, status.st_mtime_ns] for status in files]
        columns = [self.image_column, self.label_column, len(self._table)]
        what = json.dumps([self._table._fingerprint, seen, columns])
        newest = max((status.st_mtime_ns for status in files), default=0)
        return hashlib.sha256(f"table {what}".encode()).hexdigest(), newest

    def names(self) -> list[str]:
        """See `Collection.names`."""
        if not len(self._table):
            raise InputError(f"{self.title} holds no images", expected="a data set with rows")
        if self.label_column is None:
            return [f"0/{row}" for row in range(len(self._table))]
        return [f"{label}/{row}" for row, label in enumerate(self._labels)]

    def class_of(self, name: str) -> str:
        """See `Collection.class_of`."""
        return self._classes[int(name.split("/", 1)[0])]

    def classes(self, names: Sequence[str]) -> tuple[str, ...]:
        """See `Collection.classes`: those that the table declares, also where no image has one."""
        return self._classes

    def read(self, name: str) -> bytes:
        """See `Collection.read`."""
        value = self._encoded[int(name.split("/", 1)[1])][self.image_column]
        if value is None:
            raise ValueError("no image")
        encoded = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        if len(encoded) > MAX_FILE_BYTES:
            raise ValueError(f"{len(encoded):,} bytes, more than the {MAX_FILE_BYTES:,} that are read")
        return bytes(encoded)

    def captions(self, names: Sequence[str]) -> list[str]:
        """Return the captions of images; none where no column holds any.

        Args:
            names: The images.

        Raises:
            InputError: an image has none while others have, or the column that was chosen is not there.
        """
        column = _text_column(self._table, self.reference)
        if column is None:
            return []
        values = self._table.select_columns([column])[:][column]
        found = [str(values[int(name.split("/", 1)[1])] or "").strip() for name in names]
        missing = [place for place, text in enumerate(found) if not text]
        if missing and len(missing) < len(found):
            raise InputError(
                f"{len(missing)} of {len(found)} images in {self.title} have no caption in the column {column!r}, such "
                f"as that of row {names[missing[0]].split('/', 1)[1]}",
                expected="a caption for every image",
            )
        return [] if missing else found

    @cached_property
    def _encoded(self) -> Any:
        import datasets

        table = self._table.select_columns([self.image_column])
        return table.cast_column(self.image_column, datasets.Image(decode=False))

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if self.label_column is None:
            return (FLAT_CLASS,)
        feature = self._table.features[self.label_column]
        return tuple(feature.names) if hasattr(feature, "names") else tuple(map(str, sorted(set(self._values))))

    @cached_property
    def _values(self) -> list[Any]:
        values: list[Any] = self._table.select_columns([self.label_column])[:][self.label_column]
        missing = sum(value is None or value == -1 for value in values)
        if missing:
            raise InputError(
                f"{missing} of {len(values)} images in {self.title} have no label in the column {self.label_column!r}",
                expected="a label for every image",
                fix=f"--data {self.title},label={NO_LABEL}, or another split",
            )
        return values

    @property
    def _labels(self) -> list[int]:
        if hasattr(self._table.features[self.label_column], "names"):
            return self._values
        place = {value: number for number, value in enumerate(sorted(set(self._values)))}
        return [place[value] for value in self._values]


def _open(reference: Reference) -> Any:
    """Return the table of a data set, without running code of its own."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"the datasets library, which reads hf:{reference.name}, is not installed", fix=INSTALL
        ) from error
    if int(datasets.__version__.split(".")[0]) < LEAST_VERSION:
        raise InputError(
            f"datasets {datasets.__version__} is installed", expected=f"at least {LEAST_VERSION}.0", fix=INSTALL
        )
    try:
        if reference.is_local and any((Path(reference.name) / file).exists() for file in SAVED_FILES):
            loaded = datasets.load_from_disk(reference.name)
        else:
            loaded = datasets.load_dataset(reference.name, reference.config)
    except Exception as error:
        raise _unavailable(reference, error) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    return _split(reference, loaded)


def _split(reference: Reference, loaded: Any) -> Any:
    """Return one of the parts that a data set comes in: `train` unless it is chosen."""
    split = reference.split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise InputError(
            f"hf:{reference.name} has no split {split!r}",
            expected=f"one of: {', '.join(map(str, loaded))}",
            fix=f"--data hf:{reference.name},split={next(iter(loaded), 'train')}",
        )
    return loaded[split]


def _unavailable(reference: Reference, error: Exception) -> InputError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:300]
    if "Config name is missing" in reason or "BuilderConfig" in reason:
        return InputError(
            f"hf:{reference.name}: {' '.join(str(error).split())[:600]}", fix=f"--data hf:{reference.name},config=NAME"
        )
    if reference.is_local:
        return InputError(
            f"{reference.name} is no data set that the datasets library reads: {reason}",
            expected="a folder that Dataset.save_to_disk wrote",
            fix=f"for a folder of images: --data folder:{reference.name}",
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false", "no", "off")
    return InputError(
        f"the data set {reference.name!r} cannot be had{' without a network' if offline else ''}: {reason}",
        expected="the name of a data set on the hub, one in the cache of the datasets library, or a local copy",
        fix=f"{'let it be fetched with --download' if offline else 'look at the name and at the network'}; or write it "
        "into a folder on a machine that has it (Dataset.save_to_disk) and give that: --data hf:PATH",
    )


def _image_column(table: Any, reference: Reference) -> str:
    import datasets

    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    return _chosen("image", reference.image, found, list(table.features), reference, "image")


def _label_column(table: Any, reference: Reference) -> str | None:
    import datasets

    if reference.label == NO_LABEL:
        return None
    found = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    # Numbers and words may be labels as well, but only what is called so or was chosen is taken for one.
    plain = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Value)
        and (feature.dtype.startswith(("int", "uint")) or "string" in feature.dtype)
    ]
    if reference.label is not None:
        return _chosen("label", reference.label, found + plain, list(table.features), reference, "label")
    found = found or [name for name in plain if name == "label"]
    return _chosen("label", None, found, list(table.features), reference, "label") if found else None


def _text_column(table: Any, reference: Reference) -> str | None:
    """Return the column of captions: the one that was chosen, or one that is called so."""
    import datasets

    words = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.Value) and "string" in feature.dtype
    ]
    if reference.text is not None:
        return _chosen("text", reference.text, words, list(table.features), reference, "text")
    return next((name for name in TEXT_COLUMNS if name in words), None)


def _chosen(
    what: str, wanted: str | None, found: list[str], columns: list[str], reference: Reference, usual: str
) -> str:
    """Return the column that was chosen, the only one, or the one with the usual name."""
    if wanted in found:
        return wanted
    if wanted is None and (len(found) == 1 or usual in found):
        return usual if usual in found else found[0]
    named = f"has no {what} column {wanted!r}" if wanted else f"has {len(found)} {what} columns"
    listed = f": {', '.join(found)}" if found else ""
    raise InputError(
        f"hf:{reference.name} {named}{listed}",
        expected=f"one {what} column among its columns {', '.join(columns)}",
        fix=f"--data hf:{reference.name},{what}={found[0]}" if found else "",
    )
