"""How images lie in a folder or a zip file: all in one place, or one subfolder a class. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finectl.errors import InputError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FLAT_CLASS = "all"


def class_of(name: str) -> str:
    """Return the class of an image: its first folder, or "all"."""
    return name.split("/", 1)[0] if "/" in name else FLAT_CLASS


def class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the sorted names of the class folders; ("all",) for images that lie in no subfolder."""
    return tuple(sorted({class_of(name) for name in names}))


def require_layout(root: Path, names: Sequence[str]) -> None:
    """Check that there are images, and that they lie all in one place or all in class folders.

    Raises:
        InputError: they do not.
    """
    if not names:
        raise InputError(f"{root} holds no images", expected=f"files that end in {' '.join(SUFFIXES)}")
    loose = [name for name in names if "/" not in name]
    if loose and len(loose) < len(names):
        raise InputError(
            f"{root} holds {len(loose)} images beside {len(class_names(names)) - 1} class folders",
            expected="either images alone or one subfolder a class",
            fix=f"move {loose[0]} and its like into a subfolder",
        )
