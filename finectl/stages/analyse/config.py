"""The options of `analyse`, and which analyses they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.errors import UsageError
from finectl.training.settings import DataFields
from finectl.training.text_settings import TextFields

NORMS, COSINES, GRADIENTS, LANDSCAPE, ACTIVATIONS = "norms", "cosines", "gradients", "landscape", "activations"
ANALYSES = (NORMS, COSINES, GRADIENTS, LANDSCAPE, ACTIVATIONS)
OF_DATA = (GRADIENTS, LANDSCAPE, ACTIVATIONS)
"""Those that need images."""
OF_PAIRS = (COSINES, LANDSCAPE)
"""Those that need two task vectors."""
# What an analysis reads; where none of them is made, these fields are neutral, so that they make no other artifact.
READ_BY: dict[str, tuple[str, ...]] = {
    "timesteps": (GRADIENTS,),
    "images": OF_DATA,
    "batch_size": OF_DATA,
    "seed": OF_DATA,
    "draws": (LANDSCAPE,),
    "plane": (LANDSCAPE,),
    "grid": (LANDSCAPE,),
    **dict.fromkeys((*DataFields.__dataclass_fields__, "text_encoder", "text_digest"), OF_DATA),
}


@dataclass(frozen=True)
class Config(DataFields, TextFields):
    """The options of `finectl analyse`; None is a default that depends on the input or the data."""

    base: str | None
    only: str | None
    timesteps: int
    images: int
    draws: int
    plane: str
    grid: int
    merged: str | None
    batch_size: int
    seed: int

    @property
    def chosen(self) -> tuple[str, ...]:
        """The analyses of a resolved configuration."""
        return tuple((self.only or "").split(","))

    @property
    def needs_data(self) -> bool:
        """Whether images are read."""
        return any(name in OF_DATA for name in self.chosen)


def parse_plane(text: str, names: Sequence[str]) -> tuple[int, int]:
    """Return the two models whose task vectors span the plane of `--plane`.

    Args:
        text: Two numbers, counted from 0, such as 0,1.
        names: The models.

    Raises:
        UsageError: they are not two different models.
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2 and all(part.isascii() and part.isdecimal() for part in parts):
        first, second = map(int, parts)
        if first != second and max(first, second) < len(names):
            return first, second
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    raise UsageError(f"--plane {text!r} names no two task vectors", expected=f"two of: {listed}", fix="--plane 0,1")


def neutral(config: Config) -> Config:
    """Return a configuration in which nothing counts that no chosen analysis reads."""
    unread: dict[str, Any] = {
        name: DEFAULTS[name] for name, readers in READ_BY.items() if not set(readers) & set(config.chosen)
    }
    return replace(config, **unread)


DEFAULTS: dict[str, Any] = {
    "timesteps": 20,
    "images": 128,
    "batch_size": 64,
    "seed": 0,
    "draws": 4,
    "plane": "0,1",
    "grid": 9,
    **dict.fromkeys(DataFields.__dataclass_fields__),
    "text_encoder": None,
    "text_digest": "",
}
