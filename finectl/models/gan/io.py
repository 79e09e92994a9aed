"""GANs on disk: config.json with both networks' sizes and the text encoder, and a file of weights for each.

Only what reads weights imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError
from finectl.models.gan.config import DiscriminatorConfig, GeneratorConfig

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.models.gan.discriminator import PatchDiscriminator
    from finectl.models.gan.generator import Generator

CONFIG = "config.json"
GENERATOR, AVERAGED, DISCRIMINATOR = "generator.safetensors", "ema.safetensors", "discriminator.safetensors"
ARCHITECTURE = "pair-gan"


@dataclass(frozen=True)
class GanConfig:
    """What an artifact of kind `gan` is.

    Args:
        generator: Its sizes.
        discriminator: Its sizes.
        text: Name, digest, length and width of the text encoder; None without text.
        preset: The named size that both are of.
    """

    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    text: Mapping[str, Any] | None
    preset: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON."""
        return {
            "architecture": ARCHITECTURE,
            "preset": self.preset,
            "generator": self.generator.to_dict(),
            "discriminator": self.discriminator.to_dict(),
            "text": None if self.text is None else dict(self.text),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GanConfig:
        """Return the configuration that `to_dict` wrote.

        Raises:
            InputError: it is that of something else, or a field is wrong.
        """
        if values.get("architecture") != ARCHITECTURE:
            raise InputError(
                f"the configuration is of architecture {values.get('architecture')!r}", expected=repr(ARCHITECTURE)
            )
        parts = {name: values.get(name) for name in ("generator", "discriminator")}
        text = values.get("text")
        if not all(isinstance(part, dict) for part in parts.values()) or not (text is None or _is_text(text)):
            raise InputError("the configuration of the GAN is not whole", expected="generator, discriminator and text")
        return cls(
            GeneratorConfig.from_dict(parts["generator"] or {}),
            DiscriminatorConfig.from_dict(parts["discriminator"] or {}),
            text,
            str(values.get("preset", "")),
        )


def _is_text(value: Any) -> bool:
    return isinstance(value, dict) and {"name", "digest", "length", "width"} <= set(value)


def read_gan(artifact: Artifact) -> GanConfig:
    """Return what an artifact of kind `gan` is, without torch.

    Raises:
        InputError: its config.json is damaged.
    """
    return GanConfig.from_dict(read_json_object(artifact.file(CONFIG), expected="the configuration of a GAN"))


def save_gan(
    directory: Path,
    config: GanConfig,
    generator: Mapping[str, Tensor],
    discriminator: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
) -> None:
    """Write both networks, and the generator with averaged weights in place of its own where there are any."""
    write_json(directory / CONFIG, config.to_dict())
    save_tensors(directory / GENERATOR, generator)
    save_tensors(directory / DISCRIMINATOR, discriminator)
    if ema is not None:
        save_tensors(directory / AVERAGED, {**generator, **ema})


def load_generator_state(artifact: Artifact, weights: str = "ema") -> dict[str, Tensor]:
    """Return the weights of the generator: `ema` or `raw`; one without averages gives its raw ones for both."""
    return load_tensors(artifact.file(AVERAGED if weights == "ema" and artifact.has(AVERAGED) else GENERATOR))


def load_generator(artifact: Artifact, weights: str = "ema") -> Generator:
    """Build the generator and load its weights.

    Raises:
        InputError: a file is damaged, or the weights are not those of config.json.
    """
    from finectl.models.gan.generator import Generator

    model = Generator(read_gan(artifact).generator)
    _load(model, load_generator_state(artifact, weights), artifact)
    return model


def load_discriminator(artifact: Artifact) -> PatchDiscriminator:
    """Build the discriminator and load its weights.

    Raises:
        InputError: a file is damaged, or the weights are not those of config.json.
    """
    from finectl.models.gan.discriminator import PatchDiscriminator

    model = PatchDiscriminator(read_gan(artifact).discriminator)
    _load(model, load_tensors(artifact.file(DISCRIMINATOR)), artifact)
    return model


def _load(model: Any, state: Mapping[str, Tensor], artifact: Artifact) -> None:
    from finectl.models.io import misfits

    problems = misfits(model, state)
    if problems:
        raise InputError(
            f"the weights of {artifact.path} do not fit its {CONFIG}: {problems[0]}",
            fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
        )
    model.load_state_dict(state)
