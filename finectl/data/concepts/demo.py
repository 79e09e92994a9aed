"""The concepts of the builtin editor: colours times textures, some of them faint.

Held-out concepts are combinations of atoms that training sees apart from each other; a pair of colour and texture that
is held out is so at every strength. The three `unseen` ones have an atom that training never sees: no generator can
know what it looks like.
"""

from __future__ import annotations

from finectl.data.concepts import Concept
from finectl.data.edits import FAINT, FULL, Edit

CATEGORY = "demo"
COLOUR_WORDS = {
    "plain": "natural colours", "sepia": "sepia tones", "grey": "shades of grey", "negative": "negative colours",
    "warm": "warm orange light", "cool": "cool cyan light", "swap": "swapped channels",
    "duotone": "violet yellow duotone", "solarise": "solarised colours", "faded": "faded pastels",
    "night-blue": "night blue",
}  # fmt: skip
TEXTURE_WORDS = {
    "smooth": "smooth painting", "poster": "flat poster", "emboss": "embossed relief", "pencil": "pencil drawing",
    "edges": "glowing outlines", "blur": "soft blur", "mosaic": "tile mosaic", "halftone": "halftone print",
}  # fmt: skip
UNSEEN_COLOUR, UNSEEN_TEXTURE = "night-blue", "halftone"
UNSEEN = ((UNSEEN_COLOUR, "pencil"), (UNSEEN_COLOUR, "smooth"), ("sepia", UNSEEN_TEXTURE))
BASE_COLOURS = ("plain", "sepia", "grey", "negative")
BASE_TEXTURES = ("smooth", "poster", "edges")
TEST = (
    ("cool", "emboss"), ("duotone", "poster"), ("warm", "pencil"), ("swap", "edges"), ("sepia", "blur"),
    ("grey", "mosaic"), ("negative", "emboss"), ("plain", "pencil"), ("solarise", "smooth"), ("faded", "mosaic"),
)  # fmt: skip
FAINT_TEST = (("warm", "edges"), ("swap", "pencil"))
VAL = (
    ("cool", "poster"), ("duotone", "pencil"), ("warm", "mosaic"), ("sepia", "emboss"), ("solarise", "blur"),
    ("faded", "edges"),
)  # fmt: skip
FAINT_TRAIN = (
    ("plain", "poster"), ("sepia", "edges"), ("grey", "emboss"), ("negative", "smooth"), ("warm", "blur"),
    ("cool", "mosaic"), ("duotone", "edges"), ("solarise", "pencil"),
)  # fmt: skip


def concepts() -> tuple[Concept, ...]:
    """Return 60 concepts for training (12 of them the base's), 6 for validation, 12 held out and 3 of unknown atoms."""
    aside = {*TEST, *FAINT_TEST, *VAL}
    seen = [
        (colour, texture)
        for colour in COLOUR_WORDS
        for texture in TEXTURE_WORDS
        if UNSEEN_COLOUR != colour and UNSEEN_TEXTURE != texture and (colour, texture) not in aside
    ]
    found = [_concept(*pair, FULL, "train") for pair in seen]
    found += [_concept(*pair, FAINT, "train") for pair in FAINT_TRAIN]
    found += [_concept(*pair, FULL, "val") for pair in VAL]
    found += [_concept(*pair, FULL, "test") for pair in TEST]
    found += [_concept(*pair, FAINT, "test") for pair in FAINT_TEST]
    found += [_concept(*pair, FULL, "unseen") for pair in UNSEEN]
    return tuple(found)


def _concept(colour: str, texture: str, strength: float, role: str) -> Concept:
    faint = strength == FAINT
    look, tint = TEXTURE_WORDS[texture], COLOUR_WORDS[colour]
    before = "faint " if faint else ""
    return Concept(
        name=f"{'faint-' if faint else ''}{colour}-{texture}",
        prompt=f"{before}{look} in {tint}",
        paraphrases=(f"{tint}, {before}{look}", f"turn the photo into a {before}{look} with {tint}"),
        atoms=(colour, texture, *(["faint"] if faint else [])),
        role=role,
        edit=str(Edit(colour, texture, strength)),
        base=not faint and colour in BASE_COLOURS and texture in BASE_TEXTURES,
        category=CATEGORY,
    )
