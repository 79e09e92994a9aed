"""Text encoders: what turns texts into the vectors that a model is conditioned on.

What is said of one (`describe_text`) is found out without torch; it is read and run by `load_text`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from finectl.errors import InputError
from finectl.hub import is_hub_id
from finectl.models.text.hashed import NAME as HASH
from finectl.models.text.hashed import describe_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SHOWN_DIGITS = 12


class TextEncoder(Protocol):
    """Turns texts into vectors.

    Attributes:
        name: As the user named it.
        digest: sha256 (hex) of all that decides its vectors.
        length: Vectors a text.
        width: Numbers a vector.
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def width(self) -> int: ...

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode texts, each of them without regard to the others.

        Args:
            texts: N texts; the empty one is allowed.

        Returns:
            Vectors, float32 (N, length, width), and which of them stand for something that was written and not for
            what fills the rest, bool (N, length); both on the encoder's device.
        """


def describe_text(name: str, width: int | None = None) -> dict[str, Any]:
    """Say what a text encoder is, without torch.

    Args:
        name: `hash`, a folder, or a hub id; see `finectl.models.text.clip`.
        width: Numbers a vector of `hash`; its own by default.

    Returns:
        "name" (`hash`, hub id or absolute path), "digest" (sha256, hexadecimal), "length" and "width".

    Raises:
        InputError: it is not there, is of another kind, or its weights are not safetensors.
    """
    if name == HASH:
        return describe_hash(width)
    from finectl.models.text.clip import describe_clip

    return describe_clip(name)


def load_text(record: Mapping[str, Any], device: str | torch.device = "cpu") -> TextEncoder:
    """Read the text encoder that `describe_text` described.

    Raises:
        InputError: it is gone or damaged, or another one is in its place.
    """
    if record["name"] == HASH:
        from finectl.models.text.hashed import HashEncoder

        return HashEncoder(record, device)
    from finectl.models.text.clip import load_clip

    encoder = load_clip(str(record["name"]), device)
    require_same_text(record, {"name": encoder.name, "digest": encoder.digest}, "this run")
    return encoder


def text_space(record: Mapping[str, Any]) -> str:
    """Return what a message calls a text encoder: its name and the start of its digest."""
    return f"{record['name']} (digest {str(record['digest'])[:SHOWN_DIGITS]})"


def require_same_text(recorded: Mapping[str, Any], found: Mapping[str, Any], whose: str) -> None:
    """Check that a text encoder is the one that a model was trained with.

    Raises:
        InputError: it is not; the message names both.
    """
    if recorded["digest"] != found["digest"]:
        raise InputError(
            f"{whose} works with the texts of {text_space(recorded)}, and this encoder is {text_space(found)}",
            expected="the text encoder that the model was trained with",
            fix=f"--text-encoder {recorded['name']}, or another folder with the same files",
        )


def find_recorded_text(recorded: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Describe the text encoder that a manifest records, where it was then.

    Raises:
        InputError: it is no longer there, or another one is; the message names the option that says where it is.
    """
    name = str(recorded["name"])
    try:
        found = describe_text(name, int(recorded["width"]))
    except InputError as error:
        raise InputError(
            f"{whose} works with the texts of {text_space(recorded)}, which cannot be read: {error.what}",
            expected=error.expected,
            fix=f"say where it is now: --text-encoder PATH{'; or fetch it with --download' * is_hub_id(name)}",
        ) from error
    require_same_text(recorded, found, whose)
    return found
