"""diffusers' UNets as models of finectl: what is known of one before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from finectl.diffusion.config import DDPM, DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.projections import NONE, Place, chosen, unet_places
from finectl.registry import nearest

UNET = "unet2d"
TEXT_UNET = "unet2d-condition"
CLASSES = {UNET: "UNet2DModel", TEXT_UNET: "UNet2DConditionModel"}
"""Architecture -> diffusers' class."""

KEPT_MAPS = 8
"""Feature maps of a residual block that its backward pass needs, about."""


@dataclass(frozen=True)
class UNetConfig:
    """A UNet of diffusers, with the properties by which every stage asks a model what it takes.

    Args:
        architecture: `unet2d` (unconditional, or with a table of classes) or `unet2d-condition` (text).
        network: The options of diffusers' class, as in the config.json that it writes.
        image_size: Side of the square input, in pixels (or latent pixels).
        channels: Channels of the input.
        parameters: Trainable parameters of diffusers' network, without projections.
        num_classes: Classes of the label table; 0 without one.
        null_class: Whether the table has one row more, the last, that stands for no class.
        label_dropout: Probability in [0, 1] with which training replaces a label by the null class.
        sigma_data: Standard deviation of the data in the preconditioning of EDM; None for a plain network.
        diffusion: The noise schedule and what is predicted.
        projections: Where channel-wise projections are: `none`, behind all `blocks`, or only the `foldable` or
            `unfoldable` ones of these (`finectl.models.projections`).
        text_length: Vectors a text, of a model of text that is given a table of texts for the labels (`with_texts`);
            a model on disk has none.

    Raises:
        InputError: the sizes are impossible or do not go together.
        UsageError: there are no such projections.
    """

    architecture: str
    network: Mapping[str, Any] = field(hash=False)
    image_size: int
    channels: int
    parameters: int
    num_classes: int = 0
    null_class: bool = False
    label_dropout: float = 0.0
    sigma_data: float | None = None
    diffusion: DiffusionConfig = DDPM
    projections: str = NONE
    text_length: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in CLASSES:
            raise InputError(f"the architecture {self.architecture!r} is no UNet", expected=f"one of {list(CLASSES)}")
        if self.image_size < 1 or self.channels < 1 or self.num_classes < 0:
            raise InputError(
                f"a UNet for {self.channels}x{self.image_size}x{self.image_size} images of {self.num_classes} classes"
            )
        if self.out_channels not in (self.channels, 2 * self.channels):
            raise InputError(
                f"the UNet maps {self.channels} channels to {self.out_channels}",
                expected="as many channels out as in, or twice as many with a learned variance",
            )
        if not 0.0 <= self.label_dropout <= 1.0 or (self.label_dropout and not self.null_class):
            raise InputError(
                f"label_dropout {self.label_dropout} with{'' if self.null_class else 'out'} a null class",
                expected="between 0 and 1, and 0 without a null class",
            )
        chosen(self.projections, self.all_places)
        self.diffusion.require_variance(self.learn_sigma)
        if self.sigma_data is not None and self.diffusion.is_edm and self.sigma_data != self.diffusion.sigma_data:
            raise InputError(
                f"sigma_data is {self.sigma_data} of the network and {self.diffusion.sigma_data} of the process",
                expected="the same of both",
            )

    @property
    def all_places(self) -> tuple[Place, ...]:
        """Where projections can be: behind down blocks, middle block and up blocks."""
        return unet_places(self.architecture, self.network, self.widths, self.image_size)

    @property
    def places(self) -> tuple[Place, ...]:
        """Where projections are."""
        return chosen(self.projections, self.all_places)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return int(self.network.get("out_channels", self.channels))

    @property
    def learn_sigma(self) -> bool:
        """Whether the output holds a variance beside the prediction."""
        return self.out_channels == 2 * self.channels

    @property
    def has_null_class(self) -> bool:
        """Whether there is a class that stands for none, which guidance needs; of texts it is the empty one."""
        return self.null_class or self.architecture == TEXT_UNET

    @property
    def depth(self) -> int:
        """Resolutions of the UNet."""
        return len(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each resolution, the finest first."""
        return tuple(int(width) for width in self.network.get("block_out_channels", ()))

    @property
    def activations(self) -> int:
        """Numbers that the backward pass keeps for one image, about."""
        layers = self.network.get("layers_per_block", 2)
        blocks = 2 * (max(layers) if isinstance(layers, list | tuple) else int(layers)) + 1
        side = self.image_size
        network = sum(
            KEPT_MAPS * blocks * width * math.ceil(side / 2**level) ** 2 for level, width in enumerate(self.widths)
        )
        return network + sum(place.channels * place.positions for place in self.places)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values; what has its default is left out where it may be."""
        values = asdict(self)
        values["network"] = dict(self.network)
        if self.sigma_data is None:
            del values["sigma_data"]
        values["diffusion"] = self.diffusion.to_dict()
        if self.diffusion == DDPM:
            del values["diffusion"]
        if self.projections == NONE:
            del values["projections"]
        del values["text_length"]
        return values

    def with_texts(self, count: int, length: int, dropout: float) -> UNetConfig:
        """Return the configuration of a model of text whose labels are the rows of a table of texts.

        Args:
            count: Texts; the row after them is the empty one.
            length: Vectors a text.
            dropout: Probability in [0, 1] with which training replaces a text by the empty one.
        """
        return replace(self, num_classes=count, null_class=True, label_dropout=dropout, text_length=length)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Build a configuration from what `to_dict` returned.

        Raises:
            InputError: a field is unknown, missing, of another type or out of range.
        """
        rest = dict(values)
        kinds: dict[str, tuple[type, ...]] = {
            "architecture": (str,), "network": (dict,), "image_size": (int,), "channels": (int,), "parameters": (int,),
            "num_classes": (int,), "null_class": (bool,), "label_dropout": (int, float), "sigma_data": (int, float),
            "diffusion": (dict,), "projections": (str,),
        }  # fmt: skip
        for name, value in rest.items():
            if name not in kinds:
                raise InputError(f"unknown field {name!r} in the configuration{nearest(name, list(kinds))}")
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and bool not in kinds[name]):
                raise InputError(
                    f"field {name!r} of the configuration is {value!r}",
                    expected=f"a value of type {kinds[name][-1].__name__}",
                )
        missing = [item.name for item in fields(cls)[:5] if item.name not in rest]
        if missing:
            raise InputError(f"the configuration lacks the fields {', '.join(missing)}")
        if "diffusion" in rest:
            rest["diffusion"] = DiffusionConfig.from_dict(rest["diffusion"])
        try:
            return cls(**rest)
        except UsageError as error:
            raise InputError(f"the configuration is wrong: {error.what}", expected=error.expected) from error


def is_text_model(config: Any) -> bool:
    """Tell whether a configuration is that of a model that is conditioned on text."""
    return isinstance(config, UNetConfig) and config.architecture == TEXT_UNET
