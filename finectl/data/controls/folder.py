"""`--control folder`: the user's own control images, one for each image of a folder, by their names.

The control of `PATH/cat/7.png` is `CONTROLS/cat/7.png`, with whatever suffix. They are decoded once, like any images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from finectl.data.collection import readable_names
from finectl.data.controls import FOLDER, ControlInfo
from finectl.data.folder import collection_at
from finectl.data.sources import DataInfo, DataOptions, describe, parse_spec, split_classes
from finectl.errors import InputError, UsageError

if TYPE_CHECKING:
    from finectl.data.dataset import ImageSet

SHOWN = 10


def describe_folder(data: DataInfo, path: str | None, options: DataOptions) -> ControlInfo:
    """Say what the control images of a data set are, without torch.

    Args:
        data: The images.
        path: What `--control-images` names: a folder or a zip file.
        options: How images are read.

    Raises:
        UsageError: no folder is named, or the images are in none.
        InputError: an image has no control, two have one name, or the folder is not one of images.
    """
    if path is None:
        raise UsageError(
            "--control folder: no folder of control images is named",
            expected="--control-images PATH, with one image for each of --data, by the same name",
        )
    if parse_spec(data.name)[0] != "folder":
        raise UsageError(
            f"--control folder matches images by their names, and {data.name} has none", fix="--data folder:PATH"
        )
    match(data, path, options)
    located = os.path.abspath(path)
    found = describe(f"folder:{located}", data.image_size, _plain(options))
    return ControlInfo(FOLDER, found.channels, images={"path": located, "fingerprint": found.fingerprint})


def open_folder(data: DataInfo, info: ControlInfo, options: DataOptions) -> tuple[ImageSet, list[int]]:
    """Open the control images of a data set.

    Returns:
        All images of the folder, and for each image of the whole data set the place of its control among them.

    Raises:
        InputError: the folder is not what it was.
    """
    from finectl.data.dataset import load_both

    path = (info.images or {})["path"]
    return load_both(f"folder:{path}", data.image_size, _plain(options)), match(data, path, options)


def match(data: DataInfo, path: str, options: DataOptions) -> list[int]:
    """Return the place of every image's control among the images of a folder.

    Raises:
        InputError: an image has none, or two images of the folder have one name; up to 10 are listed.
    """
    images = readable_names(collection_at(parse_spec(split_classes(data.name)[0])[1]), options)
    controls = readable_names(collection_at(path), _plain(options))
    places: dict[str, int] = {}
    for place, name in enumerate(controls):
        if _stem(name) in places:
            raise InputError(
                f"{path} holds {controls[places[_stem(name)]]} and {name}", expected="one control for each image"
            )
        places[_stem(name)] = place
    missing = [name for name in images if _stem(name) not in places]
    if missing:
        known = {_stem(name) for name in images}
        others = [name for name in controls if _stem(name) not in known]
        raise InputError(
            f"{len(missing)} of {len(images)} images have no control in {path}: {_listed(missing)}"
            + (f"; {len(others)} controls have no image: {_listed(others)}" if others else ""),
            expected="for every image a control of the same path and name, with any suffix of an image",
            fix="rename them, or --data with those images only that have one",
        )
    return [places[_stem(name)] for name in images]


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _plain(options: DataOptions) -> DataOptions:
    """Return how the controls are read: as the images, and none is left out or mirrored."""
    return DataOptions(resize_filter=options.resize_filter, console=options.console, check=options.check)
