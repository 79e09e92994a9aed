"""Builtin edits: deterministic, different from one another, and refused by name."""

from __future__ import annotations

import hashlib
from itertools import combinations

import numpy as np
import pytest

from finectl.data.edits import COLOURS, TEXTURES, Edit, apply, parse_edit
from finectl.errors import InputError, UsageError


def picture(side: int = 32) -> np.ndarray:
    """A smooth picture with an edge, some texture and all hues."""
    y, x = np.mgrid[0:side, 0:side] / side
    channels = [0.5 + 0.5 * np.sin(6 * x + shift) * np.cos(5 * y) for shift in (0, 2, 4)]
    image = np.stack(channels, axis=-1) * 200 + 25 * (x + y > 1)[:, :, None]
    return np.clip(image + 12 * np.sin(40 * x * y)[:, :, None], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("texture", TEXTURES)
@pytest.mark.parametrize("shape", [(32, 32), (5, 9), (1, 1), (64, 48)])
def test_a_texture_keeps_shape_and_type_and_leaves_its_source_alone(texture: str, shape: tuple[int, int]) -> None:
    image = picture(64)[: shape[0], : shape[1]].copy()
    before = image.copy()
    made = apply(f"plain:{texture}", image)
    assert made.shape == image.shape and made.dtype == np.uint8
    assert np.array_equal(image, before)
    assert np.array_equal(made, apply(f"plain:{texture}", image))


def test_every_edit_differs_from_every_other_one_and_from_the_source() -> None:
    image = picture()
    edits = [f"{colour}:{texture}" for colour in COLOURS for texture in TEXTURES]
    made = {edit: apply(edit, image).astype(int) for edit in edits}
    for one, other in combinations([*made.items(), ("source", image.astype(int))], 2):
        assert np.abs(one[1] - other[1]).mean() > 1, f"{one[0]} {other[0]}"


def test_colours_are_what_they_are_called() -> None:
    image = picture()
    assert np.array_equal(COLOURS.load("negative")(image), 255 - image)
    assert np.array_equal(COLOURS.load("swap")(image)[:, :, 1], image[:, :, 0])
    grey = COLOURS.load("grey")(image)
    assert np.array_equal(grey[:, :, 0], grey[:, :, 2])
    warm, cool = (COLOURS.load(name)(image).astype(int) for name in ("warm", "cool"))
    assert (warm[:, :, 0] - warm[:, :, 2]).mean() > 60 and (cool[:, :, 2] - cool[:, :, 0]).mean() > 60
    assert COLOURS.load("faded")(image).std() < 0.6 * image.std()


def test_textures_are_what_they_are_called() -> None:
    image = picture()
    assert set(np.unique(TEXTURES.load("poster")(image))) <= {0, 85, 170, 255}
    tiles = TEXTURES.load("mosaic")(image).reshape(8, 4, 8, 4, 3)
    assert (tiles == tiles[:, :1, :, :1]).all()
    flat = np.full((32, 32, 3), 90, np.uint8)
    assert TEXTURES.load("edges")(flat).max() == 0 and TEXTURES.load("emboss")(flat).std() == 0
    assert TEXTURES.load("blur")(image).astype(float).std() < image.astype(float).std()


def test_strength_is_the_edits_share() -> None:
    image = picture()
    half, full = apply("sepia:emboss:0.5", image).astype(float), apply("sepia:emboss", image).astype(float)
    assert np.abs(half - (image + full) / 2).max() <= 0.5


def test_the_bytes_of_an_edit_do_not_change_unnoticed() -> None:
    """Without PIL's filters, so that no version of it matters."""
    image = (np.arange(32 * 32 * 3).reshape(32, 32, 3) * 37 % 251).astype(np.uint8)
    digest = hashlib.sha256()
    for colour in COLOURS:
        if colour != "night-blue":  # a power, whose last bit may differ
            digest.update(apply(f"{colour}:mosaic", image).tobytes())
    assert digest.hexdigest()[:16] == "f997e4b4398665ef"


def test_names_are_read_and_written() -> None:
    assert parse_edit("sepia:emboss:0.5") == Edit("sepia", "emboss", 0.5)
    assert [str(parse_edit(text)) for text in ("cool:blur", "cool:blur:1", "cool:blur:0.25")] == [
        "cool:blur", "cool:blur", "cool:blur:0.25",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'sepia'"):
        parse_edit("sepa:emboss")
    for text in ("sepia", "sepia:emboss:0", "sepia:emboss:2", "sepia:emboss:x", "sepia:emboss:nan", "a:b:c:d"):
        with pytest.raises(InputError, match="no builtin edit"):
            parse_edit(text)
    with pytest.raises(InputError, match="uint8"):
        apply("plain:blur", np.zeros((4, 4), np.uint8))
