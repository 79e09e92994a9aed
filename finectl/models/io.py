"""Models on disk: config.json, model.safetensors (raw weights) and ema.safetensors (their moving average)."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.schedulers import require_scheduler
from finectl.errors import InputError, UsageError
from finectl.models.presets import ARCHITECTURE, DiTConfig, count_parameters
from finectl.models.projections import NONE, count_projections
from finectl.models.unet_config import TEXT_UNET, UNET, UNetConfig
from finectl.registry import nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finectl.models.dit import DiT
    from finectl.models.unet import UNet

ModelConfig = DiTConfig | UNetConfig

CONFIG = "config.json"
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors"}
CHECKPOINT = re.compile(r"checkpoints/(\d{6,})\.safetensors")


class Architecture(NamedTuple):
    """Where the configuration and the network of an architecture are."""

    config: type[DiTConfig] | type[UNetConfig]
    network: str


ARCHITECTURES: dict[str, Architecture] = {
    ARCHITECTURE: Architecture(DiTConfig, "finectl.models.dit:DiT"),
    UNET: Architecture(UNetConfig, "finectl.models.unet:UNet"),
    TEXT_UNET: Architecture(UNetConfig, "finectl.models.unet:TextUNet"),
}


def read_config(artifact: Artifact) -> ModelConfig:
    """Return the architecture of an artifact, without torch.

    Raises:
        InputError: it has none, or one that this finectl does not know.
    """
    return config_from(read_json_object(artifact.file(CONFIG)))


def config_from(values: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration that a config.json holds.

    Raises:
        InputError: the architecture is unknown, or a field is wrong.
    """
    name = values.get("architecture", ARCHITECTURE)
    if name not in ARCHITECTURES:
        raise InputError(
            f"the configuration is of architecture {name!r}{nearest(str(name), list(ARCHITECTURES))}",
            expected=f"one of: {', '.join(ARCHITECTURES)}",
        )
    return ARCHITECTURES[name].config.from_dict(values)


def read_dit_config(artifact: Artifact) -> DiTConfig:
    """Return the architecture of an artifact for a stage that works on Diffusion Transformers only.

    Raises:
        InputError: it is of another architecture, or has channel-wise projections, bottlenecks or prompts.
    """
    config = read_config(artifact)
    if not isinstance(config, DiTConfig):
        raise InputError(
            f"{artifact.path} is of architecture {config.architecture!r}",
            expected="a Diffusion Transformer (architecture 'dit'), whose layers have equal shapes",
        )
    if config.projections != NONE:
        raise InputError(
            f"{artifact.path} has channel-wise projections behind its blocks",
            expected="a Diffusion Transformer without them, such as the model that it was fine-tuned from",
        )
    require_no_extras(config, f"{artifact.path} has", "plain blocks")
    return config


def require_no_extras(config: ModelConfig, subject: str, expected: str) -> None:
    """Check that a model has no parts that parameter-efficient tuning left beside its layers.

    Args:
        config: The model's.
        subject: What the message begins with: `PATH has`.
        expected: What takes their place in the message.

    Raises:
        InputError: it has some.
    """
    if isinstance(config, DiTConfig) and config.extras:
        raise InputError(
            f"{subject} {config.extras.described} beside its layers, which --peft left and no dense weight can hold",
            expected=expected,
            fix="tune it with --peft lora or difffit, whose result has plain layers",
        )


def require_class_conditional(artifact: Artifact) -> ModelConfig:
    """Return the architecture of an artifact whose network takes (x, t, class), as training and sampling call it.

    Raises:
        InputError: it is conditioned on text.
    """
    config = read_config(artifact)
    if isinstance(config, UNetConfig) and config.architecture == TEXT_UNET:
        raise InputError(
            f"{artifact.path} is conditioned on text (architecture {TEXT_UNET!r})",
            expected="an unconditional or class-conditional model: this stage has no prompts",
        )
    return config


def require_null_class(config: ModelConfig, guidance: float) -> None:
    """Check that a model can be guided, which takes a class that stands for none.

    Raises:
        UsageError: it has none, and the guidance scale is not 1.
    """
    if guidance != 1.0 and not config.has_null_class:
        raise UsageError(
            f"--guidance {guidance:g} needs a model with a null class, and this one has none",
            expected="--guidance 1",
            fix="if the last row of its label table is the null class, import it again with --num-classes",
        )


def require_sampling(config: ModelConfig, *, scheduler: str, sampling_steps: int, guidance: float) -> None:
    """Check that a model can be sampled in this way.

    Raises:
        UsageError: there is no such scheduler, there are more steps than timesteps, or the model cannot be guided.
    """
    require_scheduler(scheduler, config.diffusion.prediction)
    require_null_class(config, guidance)
    if sampling_steps > config.diffusion.timesteps:
        raise UsageError(
            f"--sampling-steps {sampling_steps} is above the {config.diffusion.timesteps} timesteps of training",
            expected=f"between 1 and {config.diffusion.timesteps}",
        )


def total_parameters(config: ModelConfig) -> int:
    """Return the number of trainable parameters of a model, without building it."""
    if isinstance(config, UNetConfig):
        return config.parameters + count_projections(config.places)
    return count_parameters(config)["total"]


def save_model(
    directory: Path, config: ModelConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model: its architecture, its raw weights and, apart from them, their moving average."""
    write_json(directory / CONFIG, config.to_dict())
    save_tensors(directory / FILES["raw"], raw)
    if ema is not None:
        save_tensors(directory / FILES["ema"], ema)


def weights_file(artifact: Artifact, weights: str) -> Path:
    """Return the file of the `ema` or `raw` weights; one that never had an EMA gives its raw weights for both."""
    return artifact.file(FILES[weights] if artifact.has(FILES[weights]) else FILES["raw"])


def checkpoint_file(update: int) -> str:
    """Return the path, inside an artifact, of the averaged weights of an update (`--keep-every`, `--keep-at`)."""
    return f"checkpoints/{update:06d}.safetensors"


def checkpoints(artifact: Artifact) -> list[int]:
    """Return the updates before the last whose averaged weights an artifact keeps, in ascending order."""
    found = (CHECKPOINT.fullmatch(file.path) for file in artifact.manifest.files)
    return sorted(int(match.group(1)) for match in found if match)


def load_weights(artifact: Artifact, weights: str, checkpoint: int | None = None) -> dict[str, Tensor]:
    """Return the `ema` or `raw` weights of an artifact; one that never had an EMA gives its raw weights for both.

    Args:
        artifact: A model.
        weights: `ema` or `raw`.
        checkpoint: The update whose weights are wanted; the last by default. Earlier ones are kept averaged only.

    Raises:
        UsageError: raw weights of an earlier update are asked for.
        InputError: the file is missing or damaged, or that update is not kept.
    """
    return load_tensors(_file_of(artifact, weights, checkpoint))


def _file_of(artifact: Artifact, weights: str, checkpoint: int | None) -> Path:
    if checkpoint is None:
        return weights_file(artifact, weights)
    if weights != "ema":
        raise UsageError(
            f"the {weights} weights of update {checkpoint} are not kept",
            expected="averaged weights, the only ones that --keep-every and --keep-at keep",
            fix="--weights ema",
        )
    kept = checkpoints(artifact)
    if checkpoint not in kept:
        shown = ", ".join(f"{update:,}" for update in kept)
        raise InputError(
            f"{artifact.path} keeps no weights of update {checkpoint}",
            expected=f"one of its updates {shown}"
            if kept
            else "a model made with --keep-every or --keep-at: it keeps the last only",
            fix="" if kept else "run the command that made it with --keep-every N or --keep-at LIST",
        )
    return artifact.file(checkpoint_file(checkpoint))


def build_model(config: ModelConfig) -> nn.Module:
    """Return the network of a configuration, without weights that mean anything.

    Raises:
        InputError: diffusers cannot build it.
    """
    name = ARCHITECTURE if isinstance(config, DiTConfig) else config.architecture
    module, _, attribute = ARCHITECTURES[name].network.partition(":")
    network: nn.Module = getattr(importlib.import_module(module), attribute)(config)
    return network


def load_any_model(artifact: Artifact, weights: str = "ema", checkpoint: int | None = None) -> nn.Module:
    """Build the model of an artifact, of any architecture, and load its weights.

    Args:
        artifact: A model.
        weights: `ema` or `raw`, as `load_weights` says; so `checkpoint`.

    Raises:
        UsageError: raw weights of an earlier update are asked for.
        InputError: the weights are not those of the architecture in config.json, or that update is not kept.
    """
    state = load_weights(artifact, weights, checkpoint)
    model = build_model(read_config(artifact))
    problems = misfits(model, state)
    if problems:
        raise InputError(
            f"the weights of {artifact.path} do not fit its {CONFIG}: {problems[0]}",
            expected=f"{len(list(model.parameters()))} tensors of the architecture's shapes",
            fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
        )
    model.load_state_dict(state)
    return model


def load_model(artifact: Artifact, weights: str = "ema", checkpoint: int | None = None) -> DiT | UNet:
    """Build the model of an artifact, a network of (x, t, class), and load its weights.

    One that is conditioned on text needs a table of texts before it is one (`finectl.training.texts`).

    Args:
        artifact: A model, dense or condensed, or experts of timestep ranges, which answer together as one does.
        weights: `ema` or `raw`, as `load_weights` says; so `checkpoint`.

    Raises:
        UsageError: raw weights of an earlier update are asked for.
        InputError: the weights are not those of the architecture in config.json, or that update is not kept.
    """
    if artifact.kind == "experts":
        from finectl.models.ensemble import load_ensemble

        return load_ensemble(artifact, weights)  # type: ignore[return-value]
    return load_any_model(artifact, weights, checkpoint)  # type: ignore[return-value]


def load_dit(artifact: Artifact, weights: str = "ema") -> DiT:
    """Build the model of an artifact for a stage that works on Diffusion Transformers only, and load its weights.

    Raises:
        InputError: it is of another architecture, or its weights are not those of config.json.
    """
    read_dit_config(artifact)
    return load_any_model(artifact, weights)  # type: ignore[return-value]


def misfits(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps a state from being loaded into a model, one line each."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    lines = [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} is unknown" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and wanted[name] != found[name]]
    return lines + [f"{name} has shape {found[name]}, not {wanted[name]}" for name in both]
