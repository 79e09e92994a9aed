"""Some classes of a data set: `digits#3,7`. No torch.

The labels stay those of the whole set, and so does the split, so that models and losses of a part and of the whole go
together. A source whose classes can be chosen defines `labels(argument, info, options) -> Sequence[int]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finectl.artifacts.files import sha256_json
from finectl.data.sources import CLASSES, SOURCES, DataInfo, DataOptions, parse_spec, split_classes, split_indices
from finectl.errors import UsageError
from finectl.registry import nearest


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


def have_same_labels(recorded: Mapping[str, Any], info: DataInfo) -> bool:
    """Tell whether the labels of a set that a manifest records mean the same in another one.

    Args:
        recorded: The manifest's `data`.
        info: The other one.
    """
    return (recorded.get("whole") or recorded.get("fingerprint")) == (info.whole or info.fingerprint)
