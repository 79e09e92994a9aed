"""The captions of a data set: one text an image, in the order of the images. No torch.

A source that has captions defines `captions(argument, info, options, labels) -> Sequence[str]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from finectl.artifacts.files import sha256_json
from finectl.data.prompts import PROMPT_FILES
from finectl.data.sources import SOURCES, DataInfo, DataOptions, parse_spec
from finectl.errors import InputError

NONE, ANY, ALL = "none", "any", "all"
PROMPTS = "prompts.json"
"""The prompt of every generated image, in an artifact of samples."""


def captioned(info: DataInfo, digest: str, options: DataOptions) -> DataInfo:
    """Return the description of a set with its captions, where they are asked for.

    The captions become part of the fingerprint; the split stays that of the images.

    Args:
        info: The images alone.
        digest: sha256 (hex) of the captions; empty where there are none.
        options: `captions` says whether they are wanted.

    Raises:
        InputError: all are wanted and there are none.
    """
    if options.captions == NONE:
        return info
    if not digest:
        if options.captions == ALL:
            raise without_captions(info.name)
        return info
    whole = sha256_json([info.fingerprint, digest])
    return replace(info, fingerprint=whole, split_by=info.split_by or info.fingerprint, captions=digest)


def without_captions(name: str) -> InputError:
    """Return the error of a set that has no captions, for a model that is conditioned on them."""
    return InputError(
        f"{name} has no captions, and the model is conditioned on text",
        expected=f"images with captions: {PROMPT_FILES}",
        fix="for latents, encode images that have captions: finectl encode --data folder:PATH",
    )


def captions_of(info: DataInfo, options: DataOptions, labels: Sequence[int]) -> tuple[str, ...]:
    """Return the caption of every image of a set.

    Args:
        info: What `describe` returned under options that ask for captions.
        options: The same options.
        labels: The class of every image.

    Raises:
        InputError: there are none, or they have changed since they were described.
    """
    name, argument = parse_spec(info.name)
    read = getattr(SOURCES.load(name), "captions", None)
    if read is None or not info.captions:
        raise without_captions(info.name)
    found = tuple(read(argument, info, options, labels))
    if len(found) != len(labels):  # of the whole set, also where some classes of it are wanted
        raise InputError(
            f"{info.name} has {len(found)} captions and {len(labels)} images",
            expected="data that stay as they are until they have been read",
            fix="run the same command again",
        )
    return found


def of_classes(texts: Sequence[str]) -> str:
    """Return the digest of captions that follow from the images' classes."""
    return sha256_json(list(texts))
