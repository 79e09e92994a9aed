"""Parts that parameter-efficient tuning leaves in a Diffusion Transformer: bottlenecks and prompts (no torch).

- A bottleneck stands beside the feed-forward part of every block: MLP(h) + s up(relu(down(h))), with the block's
  normalised and modulated tokens h.
- Prompts are tokens that every block gets beside its own, new ones in each block, whose outputs are dropped.

Neither can be written into the dense weights.

Reference: AdaptFormer, arXiv 2205.13535, section 3.2; Visual Prompt Tuning (VPT-Deep), arXiv 2203.12119, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finectl.errors import InputError, UsageError
from finectl.registry import nearest

BOTTLENECK = "mlp.bottleneck"
"""Module of a bottleneck inside a block."""
PROMPTS = "prompts"
"""Parameter of a block's prompts."""


@dataclass(frozen=True)
class Extras:
    """What the blocks of a Diffusion Transformer have beside their layers.

    Args:
        bottleneck: Width of the bottleneck, 0 for none.
        scale: What its output is multiplied by.
        prompts: Prompt tokens of every block, 0 for none.

    Raises:
        UsageError: a number is negative.
    """

    bottleneck: int = 0
    scale: float = 0.1
    prompts: int = 0

    def __post_init__(self) -> None:
        for name in ("bottleneck", "prompts"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is negative", expected="at least 0")

    def __bool__(self) -> bool:
        return bool(self.bottleneck or self.prompts)

    @property
    def described(self) -> str:
        """What they are, in words."""
        parts = [f"bottlenecks of width {self.bottleneck}"] if self.bottleneck else []
        parts += [f"{self.prompts} prompt tokens a block"] if self.prompts else []
        return " and ".join(parts)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return name to shape of the parameters in one block.

        Args:
            width: The model's.
        """
        found: dict[str, tuple[int, ...]] = {}
        if self.bottleneck:
            for layer, rows, columns in (("down", self.bottleneck, width), ("up", width, self.bottleneck)):
                found[f"{BOTTLENECK}.{layer}.weight"] = (rows, columns)
                found[f"{BOTTLENECK}.{layer}.bias"] = (rows,)
        if self.prompts:
            found[PROMPTS] = (self.prompts, width)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Extras:
        """Return what `to_dict` wrote.

        Raises:
            InputError: a field is unknown, of another type or out of range.
        """
        kinds: dict[str, tuple[type, ...]] = {"bottleneck": (int,), "scale": (int, float), "prompts": (int,)}
        if not isinstance(values, Mapping):
            raise InputError(f"field 'extras' of the configuration is {values!r}", expected="a table")
        for name, value in values.items():
            if name not in kinds:
                raise InputError(f"unknown field {name!r} among the extras{nearest(str(name), list(kinds))}")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                raise InputError(f"field {name!r} of the extras is {value!r}", expected="a number")
        try:
            return cls(**values)
        except UsageError as error:
            raise InputError(f"the configuration is wrong: {error.what}", expected=error.expected) from error


NO_EXTRAS = Extras()
