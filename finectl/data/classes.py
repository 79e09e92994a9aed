"""Some classes of a data set: `digits#3,7`. No torch.

The labels stay those of the whole set, and so does the split, so that models and losses of a part and of the whole go
together. A source whose classes can be chosen defines `labels(argument, info, options) -> Sequence[int]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_json
from finectl.data.sources import (
    CLASSES,
    DEFAULT_RESIZE_FILTER,
    SOURCES,
    DataInfo,
    DataOptions,
    describe,
    parse_spec,
    split_classes,
    split_indices,
)
from finectl.errors import InputError, UsageError
from finectl.registry import nearest

if TYPE_CHECKING:
    from finectl.artifacts.manifest import Manifest


def chosen_labels(info: DataInfo) -> tuple[int, ...]:
    """Return the labels of the classes that a set was cut down to, in ascending order; all where it is whole."""
    _, names = split_classes(info.name)
    return tuple(sorted(info.class_names.index(name) for name in names)) or tuple(range(info.num_classes))


def select_classes(whole: DataInfo, names: Sequence[str], options: DataOptions) -> DataInfo:
    """Return the description of some classes of a set.

    Args:
        whole: All of it.
        names: Of the classes, in any order.
        options: How images are read.

    Raises:
        UsageError: there is no such class, one is named twice, or the classes of such a source cannot be chosen.
    """
    for name in names:
        if name not in whole.class_names:
            raise UsageError(
                f"{whole.name} has no class {name!r}{nearest(name, list(whole.class_names))}",
                expected=f"some of: {', '.join(whole.class_names)}",
            )
    if len(set(names)) < len(names):
        raise UsageError(f"{CLASSES.join([whole.name, ','.join(names)])} names a class twice", expected="each once")
    source, argument = parse_spec(whole.name)
    read = getattr(SOURCES.load(source), "labels", None)
    if read is None:
        raise UsageError(f"the classes of {source} cannot be chosen", expected="those of digits, photos or folder:PATH")
    ordered = [name for name in whole.class_names if name in names]
    wanted = {whole.class_names.index(name) for name in ordered}
    labels: Sequence[int] = read(argument, whole, options)
    split_by = whole.split_by or whole.fingerprint
    train, heldout = ([i for i in part if labels[i] in wanted] for part in split_indices(split_by, whole.count))
    return replace(
        whole,
        name=f"{whole.name}{CLASSES}{','.join(ordered)}",
        fingerprint=sha256_json(["classes", whole.fingerprint, ordered]),
        count=len(train) + len(heldout),
        train_count=len(train),
        heldout_count=len(heldout),
        split_by=split_by,
        whole=whole.fingerprint,
    )


def parse_labels(text: str | None, classes: int) -> list[int]:
    """Return the classes of a comma-separated list; all of them by default, the null class where there are none.

    Raises:
        UsageError: an entry is no class of the model.
    """
    if text is None:
        return list(range(classes)) or [0]
    parts = [part.strip() for part in text.split(",")]
    last = max(classes - 1, 0)
    if not all(part.isdecimal() and int(part) <= last for part in parts):
        raise UsageError(f"--labels {text!r}", expected=f"classes between 0 and {last}, separated by commas")
    return [int(part) for part in parts]


def drawn_labels(text: str | None, manifest: Manifest, classes: int) -> tuple[list[int], tuple[str, ...]]:
    """Return the labels, in turn, of the images that a model makes: those of `--labels`, else of what it has seen.

    A model that was made on some classes of a data set (`digits#0,1,2`) knows nothing of the others; of any other model
    all classes are drawn, the null class where there are none.

    Args:
        text: `--labels`.
        manifest: The model's.
        classes: Classes of the model.

    Returns:
        The labels, and a note on them where it was the data that decided.

    Raises:
        UsageError: an entry of `--labels` is no class of the model.
    """
    name, read = str(manifest.data.get("name", "")), manifest.config
    every = parse_labels(text, classes)
    if text is not None or not classes or not manifest.data.get("whole"):
        return every, ()
    options = DataOptions(
        resize_filter=read.get("resize_filter") or DEFAULT_RESIZE_FILTER, skip_bad=bool(read.get("skip_bad"))
    )
    try:
        info = describe(name, read.get("image_size"), options)
    except InputError as error:
        return every, (
            f"all {classes} classes are drawn, as {name} is not at hand ({error.what}); --labels names some",
        )
    labels = [label for label in chosen_labels(info) if label < classes]
    return labels, (f"the classes of {name} are drawn, labels {','.join(map(str, labels))}; --labels names others",)


def have_same_labels(recorded: Mapping[str, Any], info: DataInfo) -> bool:
    """Tell whether the labels of a set that a manifest records mean the same in another one.

    Args:
        recorded: The manifest's `data`.
        info: The other one.
    """
    return (recorded.get("whole") or recorded.get("fingerprint")) == (info.whole or info.fingerprint)
