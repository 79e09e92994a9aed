"""Builtin edits: a texture, then a colouring, blended with the source; the same bytes for the same image everywhere.

An edit is written `COLOUR:TEXTURE`, or `COLOUR:TEXTURE:STRENGTH` with the edit's share of the result. Reading its name
needs neither numpy nor PIL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finectl.errors import InputError
from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FULL = 1.0
FAINT = 0.5
FORM = "COLOUR:TEXTURE or COLOUR:TEXTURE:STRENGTH, such as sepia:emboss:0.5"

# Each is a function from and to an image uint8 (H, W, 3).
COLOURS = Registry(
    "colour edit",
    {
        "plain": Entry("finectl.data.edits.colour:plain", "the colours as they are"),
        "sepia": Entry("finectl.data.edits.colour:sepia", "browns of an old print"),
        "grey": Entry("finectl.data.edits.colour:grey", "brightness alone"),
        "negative": Entry("finectl.data.edits.colour:negative", "every level inverted"),
        "warm": Entry("finectl.data.edits.colour:warm", "towards orange"),
        "cool": Entry("finectl.data.edits.colour:cool", "towards cyan and blue"),
        "swap": Entry("finectl.data.edits.colour:swap", "red, green and blue exchanged"),
        "duotone": Entry("finectl.data.edits.colour:duotone", "from dark violet to pale yellow"),
        "solarise": Entry("finectl.data.edits.colour:solarise", "bright parts inverted"),
        "faded": Entry("finectl.data.edits.colour:faded", "little contrast and little colour"),
        "night-blue": Entry("finectl.data.edits.colour:night_blue", "dark, and blue"),
    },
)
TEXTURES = Registry(
    "texture edit",
    {
        "smooth": Entry("finectl.data.edits.texture:smooth", "fine detail removed, edges kept"),
        "poster": Entry("finectl.data.edits.texture:poster", "four levels a channel"),
        "emboss": Entry("finectl.data.edits.texture:emboss", "a relief lit from the upper left"),
        "pencil": Entry("finectl.data.edits.texture:pencil", "dark strokes on white paper"),
        "edges": Entry("finectl.data.edits.texture:edges", "bright outlines on black"),
        "blur": Entry("finectl.data.edits.texture:blur", "out of focus"),
        "mosaic": Entry("finectl.data.edits.texture:mosaic", "square tiles of one colour"),
        "halftone": Entry("finectl.data.edits.texture:halftone", "printed dots of ink"),
    },
)


@dataclass(frozen=True)
class Edit:
    """An edit: its colouring, its texture, and its share of the result, 0 (exclusive) to 1."""

    colour: str
    texture: str
    strength: float = FULL

    def __str__(self) -> str:
        return f"{self.colour}:{self.texture}" + ("" if self.strength == FULL else f":{self.strength:g}")


def parse_edit(text: str) -> Edit:
    """Read an edit's name.

    Raises:
        UsageError: there is no such colour or texture; the message names the nearest.
        InputError: it is of another form.
    """
    parts = text.split(":")
    try:
        strength = float(parts[2]) if len(parts) == 3 else FULL
    except ValueError:
        strength = 0.0
    if len(parts) not in (2, 3) or not 0 < strength <= FULL:
        raise InputError(f"{text!r} is no builtin edit", expected=FORM)
    _, _ = COLOURS[parts[0]], TEXTURES[parts[1]]
    return Edit(parts[0], parts[1], strength)


def apply(edit: str, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Edit an image.

    Args:
        edit: Its name.
        image: uint8 (H, W, 3), RGB levels 0..255.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UsageError: there is no such colour or texture.
        InputError: the edit is of another form, or the image is.
    """
    import numpy as np

    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(f"an image is {image.dtype} {image.shape}", expected="uint8 (H, W, 3)")
    parsed = parse_edit(edit)
    edited: NDArray[np.uint8] = COLOURS.load(parsed.colour)(TEXTURES.load(parsed.texture)(image))
    if parsed.strength == FULL:
        return edited
    mixed = image + (edited.astype(np.float32) - image) * np.float32(parsed.strength)
    return np.rint(mixed).astype(np.uint8)
