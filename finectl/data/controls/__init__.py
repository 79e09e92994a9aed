"""Controls: what a ControlNet is given beside the prompt, one file a kind. What is said of one here needs no torch.

A control that is measured on an image is described by a `ControlInfo`; its module defines `SETTINGS`, `CHANNELS`, and
`make(info, device) -> Extractor`. `folder` measures nothing: its images are the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import sha256_json
from finectl.errors import UsageError
from finectl.registry import Entry, Registry, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Extractor = Callable[["Tensor"], "Tensor"]
"""uint8 (B, C, H, W), grey or RGB, on the CPU -> uint8 (B, c, H, W), the maps; each image's by itself."""

VERSION = 1
"""Raised when a control of the same settings becomes another map: it is part of every digest."""

MSE, SSIM, ACCURACY = "mse", "ssim", "accuracy"
FOLDER = "folder"


@dataclass(frozen=True)
class Control(Entry):
    """One line of the table.

    Args:
        measures: How far a map is from the one that was asked for, the measure of convergence first.
        network: Whether a network measures it, which `--control-model` names.
        example: A network that does.
    """

    measures: tuple[str, ...] = ()
    network: bool = False
    example: str = ""


CONTROLS: Registry[Control] = Registry(
    "control",
    {
        "edge": Control("finectl.data.controls.edge", "Canny edges, white on black", (SSIM, MSE)),
        "sketch": Control("finectl.data.controls.sketch", "soft lines by differences of Gaussians", (SSIM, MSE)),
        "depth": Control(
            "finectl.data.controls.depth", "depth by a network, near is bright", (MSE,), True, "Intel/dpt-large"
        ),
        "normal": Control(
            "finectl.data.controls.normal", "surface normals of such a depth", (MSE,), True, "Intel/dpt-large"
        ),
        "segmentation": Control(
            "finectl.data.controls.segmentation",
            "a colour a class, by a network",
            (ACCURACY,),
            True,
            "nvidia/segformer-b0-finetuned-ade-512-512",
        ),
        FOLDER: Control("finectl.data.controls.folder", "your own images, one for each image of --data folder:PATH"),
    },
)


@dataclass(frozen=True)
class Setting:
    """A number in the definition of a control: its usual value, its range, and what it is."""

    value: float
    least: float
    most: float
    help: str


@dataclass(frozen=True)
class ControlInfo:
    """All that decides the maps of a control.

    Args:
        name: A key of `CONTROLS`.
        channels: Of its maps: 1 or 3.
        settings: Its numbers.
        model: The network that measures it ("name", "digest"), if any.
        images: The user's control images ("path", "fingerprint"), for `folder`.
    """

    name: str
    channels: int
    settings: Mapping[str, float] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    images: Mapping[str, str] | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) of what decides the maps, wherever its parts lie."""
        model = self.model["digest"] if self.model else None
        images = self.images["fingerprint"] if self.images else None
        return sha256_json([VERSION, self.name, self.channels, dict(self.settings), model, images])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values, for a manifest."""
        return {
            "name": self.name,
            "channels": self.channels,
            "settings": dict(self.settings),
            "model": dict(self.model) if self.model else None,
            "images": dict(self.images) if self.images else None,
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ControlInfo:
        """Return what `to_dict` wrote."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def extractor(self, device: str | torch.device = "cpu") -> Extractor:
        """Return what measures the control on images.

        Raises:
            InputError: the library or the network that does it is not there, or is another one.
            UsageError: it is not measured at all (`folder`).
        """
        if self.name == FOLDER:
            raise UsageError("a control from a folder is not measured on images")
        made: Extractor = CONTROLS.load(self.name).make(self, device)
        return made


def describe_control(name: str, settings: str | None = None, model: str | None = None) -> ControlInfo:
    """Say what a control is that is measured on images, without torch.

    Args:
        name: A key of `CONTROLS`, not `folder`.
        settings: What `--control-set` says: NAME=VALUE, several with commas.
        model: What `--control-model` names: a folder or a hub id.

    Raises:
        UsageError: there is no such control or setting, a network is named where there is none, or none where one is
            needed.
        InputError: the network is not there, or of another kind.
    """
    from finectl.data.controls.network import describe_network, mending

    control = CONTROLS[name]
    module = CONTROLS.load(name)
    if model is not None and not control.network:
        raise UsageError(f"--control-model {model}: --control {name} needs none", fix="leave --control-model out")
    if model is None and control.network:
        raise UsageError(
            f"--control {name} is measured by a network, and none is named",
            expected="--control-model PATH|ID, the network as transformers writes it, with safetensors",
            fix=mending(control.example),
        )
    values = parse_settings(name, module.SETTINGS, settings)
    record = describe_network(model, control.example) if model is not None else None
    return ControlInfo(name, module.CHANNELS, values, record)


def parse_settings(name: str, known: Mapping[str, Setting], text: str | None) -> dict[str, float]:
    """Return the numbers of a control: the usual ones, and in their place those that `--control-set` gives.

    Raises:
        UsageError: there is no such setting, or a value is no number in its range.
    """
    values = {key: setting.value for key, setting in known.items()}
    for part in [part.strip() for part in (text or "").split(",") if part.strip()]:
        key, _, number = part.partition("=")
        key = key.strip()
        if key not in known:
            raise UsageError(
                f"--control {name} has no setting {key!r}{nearest(key, list(known))}",
                expected=f"some of: {', '.join(known)}" if known else "no --control-set: it has none",
            )
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if not known[key].least <= value <= known[key].most:
            raise UsageError(
                f"--control-set {part}", expected=f"{key} between {known[key].least:g} and {known[key].most:g}"
            )
        values[key] = value
    return values
