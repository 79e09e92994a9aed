"""Sizes of the Diffusion Transformer: configuration, named presets and parameter counts (no torch import)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.extras import NO_EXTRAS, Extras
from finectl.models.projections import NONE, Place, chosen, count_projections, transformer_places
from finectl.models.tying import LAYER_TYPES, FactorConfig, Tying, require_positive, tying_from_dict, tying_to_dict
from finectl.models.unet_presets import UNET_PRESETS, is_unet
from finectl.registry import nearest

ARCHITECTURE = "dit"
NORM_EPS = 1e-6
FREQUENCIES = 256
"""Length of the sinusoidal timestep embedding."""

PATCH_SIZES = (2, 4, 8)
__all__ = [
    "LAYER_TYPES",
    "PRESETS",
    "DiTConfig",
    "FactorConfig",
    "Preset",
    "count_parameters",
    "family_name",
    "layer_shapes",
    "preset",
]


@dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the shape of a DiT.

    Args:
        width: Channels of the residual stream, a multiple of `heads` and of 4.
        depth: Transformer blocks, at least 1.
        heads: Attention heads.
        patch_size: Side of a patch, in pixels of the input.
        image_size: Side of the square input, in pixels (or latent pixels), a multiple of `patch_size`.
        channels: Channels of the input.
        num_classes: Classes of the label table; one more row, the last, is the null class.
        mlp_ratio: Hidden width of the feed-forward part over `width`.
        label_dropout: Probability in [0, 1] with which training replaces a label by the null class.
        learn_sigma: Whether the output holds a variance beside the prediction (twice the channels).
        frequency_divisor: Timestep frequencies are exp(-ln(1e4) i / divisor): 128 as in published DiT checkpoints,
            127 as in diffusers.
        factorized: How the layers share their parameters, or None for a dense DiT.
        mlp_norm_eps: Epsilon of the norm before the feed-forward part; the others are 1e-6 in every DiT.
        diffusion: The noise schedule and what is predicted.
        projections: Channel-wise projections: `none`, or `blocks`, one behind every block. None can be folded.
        extras: Bottlenecks and prompts that tuning left in the blocks.

    Raises:
        UsageError: a value is out of range, or sizes do not divide.

    Reference: Peebles and Xie, arXiv 2212.09748, section 3.
    """

    width: int
    depth: int
    heads: int
    patch_size: int
    image_size: int
    channels: int
    num_classes: int
    mlp_ratio: int = 4
    label_dropout: float = 0.1
    learn_sigma: bool = False
    frequency_divisor: int = 128
    factorized: Tying | None = None
    mlp_norm_eps: float = NORM_EPS
    diffusion: DiffusionConfig = DDPM
    projections: str = NONE
    extras: Extras = NO_EXTRAS

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "patch_size", "image_size", "channels", "mlp_ratio"):
            require_positive(name, getattr(self, name))
        require_positive("frequency_divisor", self.frequency_divisor)
        if self.num_classes < 0:
            raise UsageError(f"num_classes {self.num_classes} is negative", expected="at least 0")
        if self.width % self.heads or self.width % 4:
            raise UsageError(
                f"width {self.width} does not fit {self.heads} heads",
                expected="a multiple of the number of heads, and of 4 for the position embedding",
            )
        if self.image_size % self.patch_size:
            raise UsageError(
                f"patch size {self.patch_size} pixels does not divide the image size {self.image_size} pixels",
                expected=f"an image size that is a multiple of {self.patch_size}, or another patch size",
            )
        if not 0.0 <= self.label_dropout <= 1.0:
            raise UsageError(f"label_dropout {self.label_dropout} is no probability", expected="between 0 and 1")
        if not self.mlp_norm_eps > 0.0:
            raise UsageError(f"mlp_norm_eps {self.mlp_norm_eps} is not positive")
        if self.factorized is not None:
            for kind in self.factorized.types:  # a form that does not fit these shapes says so
                self.factorized.shared_count(kind, *layer_shapes(self)[kind])
        chosen(self.projections, self.all_places)
        self.diffusion.require_variance(self.learn_sigma)

    @property
    def all_places(self) -> tuple[Place, ...]:
        """Where projections can be: behind every block."""
        return transformer_places(self.width, self.depth, self.tokens)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where projections are."""
        return chosen(self.projections, self.all_places)

    @property
    def out_channels(self) -> int:
        """Channels of the output: `channels`, or twice as many with a learned sigma."""
        return self.channels * (2 if self.learn_sigma else 1)

    @property
    def patch_inputs(self) -> int:
        """Numbers of one patch of the input."""
        return self.channels * self.patch_size**2

    @property
    def tokens(self) -> int:
        """Tokens of one image: (image_size / patch_size)^2."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_null_class(self) -> bool:
        """Whether there is a class that stands for none: in a DiT always, the last row of its table."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, with `"architecture": "dit"` first.

        `mlp_norm_eps`, `diffusion`, `projections` and `extras` are left out where they are what finectl trains with.
        """
        values = asdict(self)
        if self.mlp_norm_eps == NORM_EPS:
            del values["mlp_norm_eps"]
        values["diffusion"] = self.diffusion.to_dict()
        if self.diffusion == DDPM:
            del values["diffusion"]
        if self.projections == NONE:
            del values["projections"]
        if self.extras == NO_EXTRAS:
            del values["extras"]
        if self.factorized is not None:
            values["factorized"] = tying_to_dict(self.factorized)
        return {"architecture": ARCHITECTURE, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """Build a configuration from what `to_dict` returned.

        Args:
            values: Fields by name; fields with a default may be missing.

        Raises:
            InputError: the architecture is another one, a field is unknown, missing, of another type or out of range.
        """
        rest = dict(values)
        architecture = rest.pop("architecture", ARCHITECTURE)
        if architecture != ARCHITECTURE:
            raise InputError(f"the configuration is of architecture {architecture!r}", expected=f"{ARCHITECTURE!r}")
        factors = rest.pop("factorized", None)
        try:
            if factors is not None:
                rest["factorized"] = tying_from_dict(factors, _checked)
            if "diffusion" in rest:
                rest["diffusion"] = DiffusionConfig.from_dict(rest["diffusion"])
            if "extras" in rest:
                rest["extras"] = Extras.from_dict(rest["extras"])
            return cls(**_checked(cls, rest, skip=("factorized", "diffusion", "extras")))
        except UsageError as error:
            raise InputError(f"the configuration is wrong: {error.what}", expected=error.expected) from error


class Preset(NamedTuple):
    """Width, depth and heads of a named size, with one line of help."""

    width: int
    depth: int
    heads: int
    help: str


PRESETS: dict[str, Preset] = {
    "dit-nano": Preset(64, 6, 4, "0.5 M parameters: seconds on a laptop, for 8x8 digits and tests"),
    "dit-s": Preset(384, 12, 6, "33 M parameters"),
    "dit-b": Preset(768, 12, 12, "130 M parameters"),
    "dit-l": Preset(1024, 24, 16, "458 M parameters"),
    "dit-xl": Preset(1152, 28, 16, "675 M parameters"),
}


def preset(
    name: str,
    *,
    image_size: int,
    channels: int,
    num_classes: int,
    depth: int | None = None,
    learn_sigma: bool = False,
) -> DiTConfig:
    """Return the configuration of a named size for a given kind of image.

    Args:
        name: A name of `PRESETS`, with an optional patch size: "dit-b" is "dit-b/2"; also "/4" and "/8".
        image_size: Side of the square input, in pixels.
        channels: Channels of the input.
        num_classes: Classes of the data.
        depth: Blocks, at least 1; None takes the size's own.
        learn_sigma: Whether the output holds a variance beside the prediction.

    Returns:
        A dense configuration.

    Raises:
        UsageError: unknown name or patch size, a patch size that does not divide the image size, depth below 1.
    """
    base, _, suffix = name.lower().partition("/")
    if is_unet(base):
        raise UsageError(
            f"{name} is a UNet",
            expected=f"a Diffusion Transformer: {', '.join(PRESETS)}",
            fix=f"init --method he --model {base}",
        )
    if base not in PRESETS:
        known = [*PRESETS, *UNET_PRESETS]
        raise UsageError(f"unknown model {name!r}{nearest(base, known)}", expected=f"one of: {', '.join(PRESETS)}")
    if suffix not in ("", *map(str, PATCH_SIZES)):
        raise UsageError(f"unknown patch size {suffix!r} of model {name!r}", expected="/2, /4 or /8")
    size = PRESETS[base]
    return DiTConfig(
        width=size.width,
        depth=size.depth if depth is None else depth,
        heads=size.heads,
        patch_size=int(suffix or PATCH_SIZES[0]),
        image_size=image_size,
        channels=channels,
        num_classes=num_classes,
        learn_sigma=learn_sigma,
    )


def family_name(config: DiTConfig) -> str:
    """Return the preset that a configuration belongs to, as `preset` takes it, or its width where there is none."""
    for name, size in PRESETS.items():
        if (size.width, size.heads) == (config.width, config.heads):
            return name if config.patch_size == PATCH_SIZES[0] else f"{name}/{config.patch_size}"
    return f"{ARCHITECTURE}-w{config.width}"


def layer_shapes(config: DiTConfig) -> dict[str, tuple[int, int]]:
    """Return (m1, m2) = (outputs, inputs) of a block's linear layer of each type."""
    width, hidden = config.width, config.width * config.mlp_ratio
    return {
        "qkv": (3 * width, width),
        "o": (width, width),
        "in": (hidden, width),
        "out": (width, hidden),
        "adaln": (6 * width, width),
    }


def count_parameters(config: DiTConfig) -> dict[str, int]:
    """Count the trainable parameters of a DiT by component, without building it.

    Returns:
        `x_embedder`, `t_embedder`, `y_embedder`, `blocks`, `final_layer`, `factors` (what all layers share, 0 when
        dense), `projections`, `total` (their sum); `block` (one block) and `block.<type>` (one layer: what it has of
        its own; `block.extras` where there are bottlenecks or prompts).
    """
    width = config.width
    shapes = layer_shapes(config)
    patch = config.patch_size**2
    factors = config.factorized
    factored = () if factors is None else factors.types

    def layer(kind: str) -> int:
        rows, columns = shapes[kind]
        return factors.own_count(kind, rows, columns) if factors and kind in factored else rows + rows * columns

    one = {f"block.{kind}": layer(kind) for kind in LAYER_TYPES}
    if config.extras:
        one["block.extras"] = sum(math.prod(shape) for shape in config.extras.shapes(width).values())
    parts = {
        "x_embedder": (patch * config.channels + 1) * width,
        "t_embedder": (FREQUENCIES + 1) * width + (width + 1) * width,
        "y_embedder": (config.num_classes + 1) * width,
        "blocks": config.depth * sum(one.values()),
        "final_layer": (width + 1) * patch * config.out_channels + 2 * (width + 1) * width,
        "factors": sum(factors.shared_count(kind, *shapes[kind]) for kind in factored) if factors else 0,
        "projections": count_projections(config.places),
    }
    return {**parts, "total": sum(parts.values()), "block": sum(one.values()), **one}


def _checked(cls: type[Any], values: dict[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """Return `values` when every name is a field of the dataclass `cls`, none is missing and all types fit."""
    known = {field.name: field for field in fields(cls)}
    for name, value in values.items():
        if name not in known:
            raise InputError(f"unknown field {name!r} in the configuration{nearest(name, known)}")
        if name in skip:
            continue
        kind = str(known[name].type)
        allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[kind]
        if not isinstance(value, allowed) or (kind != "bool" and isinstance(value, bool)):
            raise InputError(f"field {name!r} of the configuration is {value!r}", expected=f"a value of type {kind}")
    needed = [name for name, field in known.items() if field.default is field.default_factory is not None]
    missing = [name for name in needed if name not in values and name not in skip]
    if missing:
        raise InputError(f"the configuration lacks the fields {', '.join(missing)}")
    return values
