"""Sizes of the GANs: configuration, named presets, layers in order, and parameter counts (no torch import).

Reference: E2GAN, arXiv 2401.06127, section 3; pix2pix, arXiv 1611.07004, section 6.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from finectl.errors import InputError, UsageError
from finectl.registry import nearest

NORMS = ("instance", "batch")
CHANNELS = 3
HALVINGS = 2
"""Between the image and the residual blocks; the transformer block works at half of that again."""
HEAD_WIDTH = 32
KERNEL, WIDE_KERNEL = 3, 7
PATCH_KERNEL = 4
FEED_FORWARD = 4


@dataclass(frozen=True)
class Layer:
    """One layer with a weight matrix or kernels.

    Args:
        name: The module's name.
        shape: Of its weight: (out, in) or (out, in, height, width).
        bias: Whether it has one.
        norm: The normalisation that follows it, if any, by its module's name.
        norm_affine: Numbers a channel that this normalisation learns: 2, or 0 without weight and bias.
    """

    name: str
    shape: tuple[int, ...]
    bias: bool = True
    norm: str | None = None
    norm_affine: int = 2

    @property
    def kind(self) -> str:
        """`conv` or `linear`."""
        return "conv" if len(self.shape) == 4 else "linear"

    @property
    def norm_size(self) -> int:
        """Channels of the normalisation whose weight and bias are learned; 0 without them."""
        return self.shape[0] if self.norm and self.norm_affine else 0

    @property
    def parameters(self) -> int:
        """Of the layer and of the normalisation that follows it."""
        return math.prod(self.shape) + self.bias * self.shape[0] + 2 * self.norm_size


@dataclass(frozen=True)
class GeneratorConfig:
    """Everything that decides the shape of a generator.

    Args:
        ngf: Channels after the first convolution; the residual blocks have four times as many.
        blocks: Residual blocks, at least 1. With text, the transformer block stands before the last one.
        image_size: Side of the images it is trained on, pixels, a multiple of 4, with text of 8; it works on others.
        text_width: Numbers a vector of the text encoder; 0 for a generator without text and transformer block.
        norm: `instance` or `batch`. Instance normalisation takes out each image's mean of every channel, and
            with it whatever a text adds evenly over the image.
        affine: Whether normalisations learn a weight and a bias.
        bias: Whether convolutions have biases; a normalisation behind one takes its bias out again.
        bypass: Whether what goes into the half-size transformer part is added to what comes out of it.
        skips: Whether what stands before a halving is added where its doubling ends, before the ReLU; without it, the
            details of small images are lost.

    Raises:
        UsageError: a value is out of range, or sizes do not divide.
    """

    ngf: int
    blocks: int
    image_size: int
    text_width: int = 0
    norm: str = "instance"
    affine: bool = True
    bias: bool = True
    bypass: bool = False
    skips: bool = False

    def __post_init__(self) -> None:
        for name, least in (("ngf", 1), ("blocks", 1), ("image_size", 1), ("text_width", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}", expected=f"an integer of at least {least}")
        _require_norm(self.norm)
        if self.norm == "batch" and not self.affine:
            raise UsageError("batch normalisation without weight and bias is not offered", expected="affine: true")
        divisor = 2 ** (HALVINGS + bool(self.text_width))
        if self.image_size % divisor or self.image_size < 2 * divisor:
            raise UsageError(
                f"images of {self.image_size} pixels cannot be halved {divisor.bit_length() - 1} times",
                expected=f"a multiple of {divisor}, at least {2 * divisor}",
            )

    @property
    def width(self) -> int:
        """Channels of the residual blocks and of the transformer block."""
        return self.ngf * 2**HALVINGS

    @property
    def heads(self) -> int:
        """Attention heads: of 32 numbers, and at least 4 where the width allows it."""
        return max(self.width // HEAD_WIDTH, math.gcd(self.width, 4))

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers in the order in which they are applied."""
        width, affine = self.width, 2 * self.affine

        def conv(name: str, inputs: int, outputs: int, kernel: int = KERNEL, norm: str | None = "norm") -> Layer:
            shape = (outputs, inputs, kernel, kernel)
            norm_name = None if norm is None else f"{name.rpartition('.')[0]}.{norm}"
            return Layer(name, shape, self.bias, norm_name, affine)

        found = [conv("stem.conv", CHANNELS, self.ngf, WIDE_KERNEL)]
        found += [conv(f"down{n + 1}.conv", self.ngf * 2**n, self.ngf * 2 ** (n + 1)) for n in range(HALVINGS)]
        blocks = [
            conv(f"res{block + 1}.conv{n}", width, width, norm=f"norm{n}")
            for block in range(self.blocks)
            for n in (1, 2)
        ]
        split = 2 * (self.blocks - 1) if self.text_width else len(blocks)
        found += blocks[:split]
        if self.text_width:
            found.append(conv("reduce.conv", width, width))
            found += self._transformer()
            found.append(conv("enlarge.conv", width, width))
        found += blocks[split:]
        found += [conv(f"up{n + 1}.conv", width // 2**n, width // 2 ** (n + 1)) for n in range(HALVINGS)]
        found.append(conv("head.conv", self.ngf, CHANNELS, WIDE_KERNEL, norm=None))
        return tuple(found)

    def _transformer(self) -> list[Layer]:
        width, hidden = self.width, self.width * FEED_FORWARD
        found = []
        for name, context in (("attn1", width), ("attn2", self.text_width)):
            found.append(Layer(f"transformer.{name}.to_q", (width, width), bias=False))
            found += [Layer(f"transformer.{name}.{part}", (width, context), bias=False) for part in ("to_k", "to_v")]
            found.append(Layer(f"transformer.{name}.to_out", (width, width)))
        found.append(Layer("transformer.ff.proj", (2 * hidden, width)))
        found.append(Layer("transformer.ff.out", (width, hidden)))
        return found

    @property
    def parameters(self) -> int:
        """Trainable parameters of the generator."""
        layer_norms = 3 * 2 * self.width if self.text_width else 0
        return sum(layer.parameters for layer in self.layers()) + layer_norms

    @property
    def frozen_parameters(self) -> int:
        """Those that stay while low-rank adapters and the normalisations behind the layers are trained."""
        return self.parameters - sum(2 * layer.norm_size for layer in self.layers())

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Return the configuration that `to_dict` wrote; one without `skips` is of a time when there were none.

        Raises:
            InputError: a field is missing, unknown or wrong.
        """
        return _from_dict(cls, {"skips": False, **values}, "generator")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Everything that decides the shape of a PatchGAN discriminator.

    Args:
        ndf: Channels after the first convolution.
        strided: Convolutions that halve the image: 3 judge patches of 70 pixels, 2 of 34, 1 of 16.
        norm: `instance` or `batch`.
    """

    ndf: int
    strided: int
    norm: str = "instance"

    def __post_init__(self) -> None:
        for name in ("ndf", "strided"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}", expected="an integer of at least 1")
        _require_norm(self.norm)

    def widths(self) -> tuple[int, ...]:
        """Return the channels after every convolution but the last: at most 8 times the first."""
        return tuple(self.ndf * min(2**n, 8) for n in range(self.strided + 1))

    def layers(self) -> tuple[Layer, ...]:
        """Return the layers in order: all but the first and the last are followed by a normalisation."""
        inputs, found = 2 * CHANNELS, []
        for n, outputs in enumerate(self.widths()):
            norm = f"norm{n + 1}" if n else None
            found.append(Layer(f"conv{n + 1}", (outputs, inputs, PATCH_KERNEL, PATCH_KERNEL), True, norm))
            inputs = outputs
        return (*found, Layer(f"conv{len(found) + 1}", (1, inputs, PATCH_KERNEL, PATCH_KERNEL)))

    @property
    def parameters(self) -> int:
        """Trainable parameters of the discriminator."""
        return sum(layer.parameters for layer in self.layers())

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiscriminatorConfig:
        """Return the configuration that `to_dict` wrote.

        Raises:
            InputError: a field is missing, unknown or wrong.
        """
        return _from_dict(cls, values, "discriminator")


@dataclass(frozen=True)
class Preset:
    """A named size: the fields of `GeneratorConfig` but for the image size, the discriminator's width, and a help line.

    `text_width` is that of `--text-encoder hash`; another encoder brings its own.
    """

    ngf: int
    blocks: int
    text_width: int
    ndf: int
    help: str
    affine: bool = True
    bias: bool = True
    bypass: bool = False
    skips: bool = False
    norm: str = "instance"


PRESETS = {
    "e2gan": Preset(64, 3, 768, 64, "7.06 million parameters, for images of 256 pixels"),
    "nano": Preset(
        8, 3, 64, 16, "0.11 million, for small images on a CPU", bias=False, bypass=True, skips=True, norm="batch"
    ),
    "pix2pix": Preset(64, 9, 0, 64, "11.38 million, without text: one concept", affine=False),
}


def preset(name: str, image_size: int, *, text_width: int | None = None, norm: str | None = None) -> GeneratorConfig:
    """Return the generator of a named size.

    Args:
        name: A key of `PRESETS`.
        image_size: Side of the images, pixels.
        text_width: Numbers a vector of the text encoder; that of the preset by default, and of no use without text.
        norm: `instance` or `batch`; that of the preset by default.

    Raises:
        UsageError: there is no such preset, or it does not work on such images.
    """
    if name not in PRESETS:
        raise UsageError(
            f"unknown generator preset {name!r}{nearest(name, list(PRESETS))}", expected=f"one of: {', '.join(PRESETS)}"
        )
    size = PRESETS[name]
    width = (text_width or size.text_width) if size.text_width else 0
    norm = norm or size.norm
    affine = size.affine or norm == "batch"
    return GeneratorConfig(size.ngf, size.blocks, image_size, width, norm, affine, size.bias, size.bypass, size.skips)


def discriminator_for(name: str, image_size: int, *, norm: str = "instance") -> DiscriminatorConfig:
    """Return the discriminator of a preset, with patches that fit the images: of 70, 34 or 16 pixels."""
    strided = 3 if image_size >= 128 else 2 if image_size >= 32 else 1
    return DiscriminatorConfig(PRESETS[name].ndf, strided, norm)


def resized(config: GeneratorConfig, image_size: int) -> GeneratorConfig:
    """Return the configuration for images of another size; the weights are the same."""
    return replace(config, image_size=image_size)


C = TypeVar("C", GeneratorConfig, DiscriminatorConfig)


def _from_dict(kind: type[C], values: Mapping[str, Any], what: str) -> C:
    known = {field.name for field in fields(kind)}
    odd = sorted(known ^ set(values))
    if odd:
        raise InputError(
            f"the {what}'s configuration has the wrong fields: {', '.join(odd)}", expected=", ".join(sorted(known))
        )
    try:
        return kind(**values)
    except (UsageError, TypeError) as error:
        raise InputError(f"the {what}'s configuration is wrong: {error}") from error


def _require_norm(norm: str) -> None:
    if norm not in NORMS:
        raise UsageError(f"unknown normalisation {norm!r}", expected=f"one of: {', '.join(NORMS)}")
