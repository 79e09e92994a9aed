"""What a weight generator is: the numbers of its network, which travel in config.json (no torch import).

Reference: arXiv 2407.11966, section 4.3 and figure 2; its widths are not published, so the presets are this project's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.registry import nearest

ARCHITECTURE = "weight-unet"
PRESETS: dict[str, tuple[int, int, int]] = {
    "tiny": (32, 64, 128),
    "small": (64, 128, 256),
    "base": (192, 384, 768),
    "paper": (320, 640, 1280),
}
"""Channels at the three resolutions."""
INDEX_EMBEDS = ("sin", "sin+table")
POS_EMBEDS = ("none", "learned")
TEXT_INPUTS = ("tokens", "tokens+pooled")
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
"""As the command line says it -> in diffusers' words."""
LEVELS = 4
"""The length is halved twice."""
FREQUENCIES = 10_000.0
EMBEDDING = 4
"""Width of the time and index embedding, in first channels."""
FEED_FORWARD = 4
GROUPS = 8


@dataclass(frozen=True)
class WeightUNetConfig:
    """The network that denoises one block at a time.

    Args:
        channels: At its three resolutions.
        blocks: N, how many different blocks there are.
        length: Numbers of a block as the network sees it: the block size, or the coefficients of a basis.
        text_width: Numbers a text vector.
        index_embed: How it is told which block: sine and cosine of n, and a learned table beside them.
        pos_embed: `learned`: a table of every position of every block is a second input channel.
        text_input: `tokens`: cross-attention; `tokens+pooled`: their mean joins the time and index embedding too.
        text_rank: Rank of a linear path from the mean text vector to every block; 0 for none, as in the paper.
        head_width: Channels of an attention head.
        diffusion: The forward process and what is predicted.

    Raises:
        UsageError: a value is out of range.
    """

    channels: tuple[int, int, int]
    blocks: int
    length: int
    text_width: int
    index_embed: str = "sin+table"
    pos_embed: str = "none"
    text_input: str = "tokens"
    text_rank: int = 0
    head_width: int = 32
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("index-embed", self.index_embed, INDEX_EMBEDS),
            ("pos-embed", self.pos_embed, POS_EMBEDS),
            ("text-input", self.text_input, TEXT_INPUTS),
        ):
            if value not in allowed:
                raise UsageError(f"--{name} {value!r}", expected=f"one of: {', '.join(allowed)}")
        if self.length < LEVELS or self.length % LEVELS:
            raise UsageError(
                f"blocks of {self.length} numbers", expected=f"a multiple of {LEVELS}: the length is halved twice"
            )
        if any(channels % GROUPS or channels % self.head_width for channels in self.channels) or len(self.channels) < 3:
            raise UsageError(
                f"channels {self.channels}", expected=f"three multiples of {GROUPS} and of {self.head_width}"
            )
        if min(self.blocks, self.text_width) < 1 or self.text_rank < 0:
            raise UsageError(f"{self.blocks} blocks, text vectors of {self.text_width}, rank {self.text_rank}")

    @property
    def depth(self) -> int:
        """Transformer blocks."""
        return 5

    @property
    def embedding(self) -> int:
        """Width of the time and index embedding."""
        return EMBEDDING * self.channels[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "architecture": ARCHITECTURE,
            **asdict(self),
            "channels": list(self.channels),
            "diffusion": self.diffusion.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WeightUNetConfig:
        """Build it from what `to_dict` returned.

        Raises:
            InputError: it is of another architecture, or a field is missing, unknown or out of range.
        """
        given = dict(values)
        if given.pop("architecture", None) != ARCHITECTURE or set(given) != set(cls.__dataclass_fields__):
            odd = sorted(set(given) ^ set(cls.__dataclass_fields__))
            raise InputError(
                f"the configuration is none of a weight generator{': ' + odd[0] if odd else ''}",
                expected=f"architecture {ARCHITECTURE!r} and the fields {', '.join(cls.__dataclass_fields__)}",
            )
        try:
            channels = tuple(int(width) for width in given.pop("channels"))
            diffusion = DiffusionConfig.from_dict(given.pop("diffusion"))
            return cls(channels=channels, diffusion=diffusion, **given)  # type: ignore[arg-type]
        except (UsageError, TypeError, ValueError) as error:
            raise InputError(f"the configuration of a weight generator is wrong: {error}") from error


def preset(name: str, **fields: Any) -> WeightUNetConfig:
    """Return the network of a preset.

    Args:
        name: A name of `PRESETS`.
        fields: All other fields of `WeightUNetConfig`.

    Raises:
        UsageError: there is no such preset, or a field is out of range.
    """
    if name not in PRESETS:
        raise UsageError(
            f"there is no size {name!r}{nearest(name, list(PRESETS))}", expected=f"one of: {', '.join(PRESETS)}"
        )
    channels = PRESETS[name]
    return WeightUNetConfig(channels=channels, head_width=64 if channels[0] % 64 == 0 else 32, **fields)


def require_basis(name: str, block_size: int) -> str:
    """Check `--basis` and return it in its one way of writing.

    Raises:
        UsageError: it is neither `none` nor `pcaN` with a possible N.
    """
    found = re.fullmatch(r"pca0*([1-9]\d*)", name)
    if name != "none" and (not found or int(found.group(1)) % LEVELS or int(found.group(1)) > block_size):
        raise UsageError(
            f"--basis {name!r}",
            expected=f"none, or pcaN with N a multiple of {LEVELS} up to the block size {block_size}, such as pca16",
        )
    return f"pca{found.group(1)}" if found else name


def coefficients_of(basis: str) -> int | None:
    """Return N of `pcaN`, None for `none`; see `require_basis`."""
    found = re.fullmatch(r"pca(\d+)", basis)
    return int(found.group(1)) if found else None


def count_parameters(config: WeightUNetConfig) -> int:
    """Return the number of trainable parameters, without building the network."""
    first, second, third = config.channels
    width, text = config.embedding, config.text_width

    def linear(inputs: int, outputs: int, bias: bool = True) -> int:
        return inputs * outputs + bias * outputs

    def conv(inputs: int, outputs: int) -> int:
        return linear(3 * inputs, outputs)

    def res(inputs: int, outputs: int) -> int:
        skip = linear(inputs, outputs) if inputs != outputs else 0
        film = linear(width, 2 * outputs)
        return 2 * inputs + conv(inputs, outputs) + film + 2 * outputs + conv(outputs, outputs) + skip

    def transformer(c: int) -> int:
        attention = linear(c, 3 * c, False) + linear(c, c)
        cross = linear(c, c, False) + linear(text, 2 * c, False) + linear(c, c)
        return 3 * 2 * c + attention + cross + linear(c, FEED_FORWARD * c) + linear(FEED_FORWARD * c, c)

    def embedding(inputs: int) -> int:
        return linear(inputs, width) + linear(width, width)

    total = 2 * embedding(first) + conv(1 + (config.pos_embed == "learned"), first)
    total += res(first, first) + transformer(first) + conv(first, first)
    total += res(first, second) + transformer(second) + conv(second, second)
    total += res(second, third) + transformer(third)
    total += res(2 * third, third) + conv(third, second)
    total += res(2 * second, second) + transformer(second) + conv(second, first)
    total += res(2 * first, first) + transformer(first) + 2 * first + conv(first, 1)
    total += config.blocks * width if config.index_embed == "sin+table" else 0
    total += config.blocks * config.length if config.pos_embed == "learned" else 0
    total += embedding(text) if config.text_input == "tokens+pooled" else 0
    return total + config.text_rank * (text + config.blocks * config.length)
