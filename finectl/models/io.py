"""Models on disk: config.json, model.safetensors (raw weights) and ema.safetensors (their moving average)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finectl.artifacts.files import write_json
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import InputError
from finectl.models.presets import DiTConfig

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.models.dit import DiT

CONFIG = "config.json"
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors"}


def read_config(artifact: Artifact) -> DiTConfig:
    """Return the architecture of an artifact, without torch.

    Raises:
        InputError: it has none, or one that this finectl does not know.
    """
    try:
        values = json.loads(artifact.file(CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{artifact.path / CONFIG} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{artifact.path / CONFIG} is a {type(values).__name__}", expected="an object")
    return DiTConfig.from_dict(values)


def save_model(
    directory: Path, config: DiTConfig, raw: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model: its architecture, its raw weights and, apart from them, their moving average."""
    write_json(directory / CONFIG, config.to_dict())
    save_tensors(directory / FILES["raw"], raw)
    if ema is not None:
        save_tensors(directory / FILES["ema"], ema)


def load_weights(artifact: Artifact, weights: str) -> dict[str, Tensor]:
    """Return the `ema` or `raw` weights of an artifact; one that never had an EMA gives its raw weights for both.

    Raises:
        InputError: the file is missing or damaged.
    """
    name = FILES[weights] if artifact.has(FILES[weights]) else FILES["raw"]
    return load_tensors(artifact.file(name))


def load_model(artifact: Artifact, weights: str = "ema") -> DiT:
    """Build the model of an artifact and load its weights.

    Raises:
        InputError: the weights are not those of the architecture in config.json.
    """
    from finectl.models.dit import DiT

    model = DiT(read_config(artifact))
    state = load_weights(artifact, weights)
    problems = misfits(model, state)
    if problems:
        raise InputError(
            f"the weights of {artifact.path} do not fit its {CONFIG}: {problems[0]}",
            expected=f"{len(list(model.parameters()))} tensors of the architecture's shapes",
            fix=f"make it again with --force: {' '.join(artifact.manifest.command)}",
        )
    model.load_state_dict(state)
    return model


def misfits(model: DiT, state: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps a state from being loaded into a model, one line each."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    lines = [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} is unknown" for name in found if name not in wanted]
    both = [name for name in wanted if name in found and wanted[name] != found[name]]
    return lines + [f"{name} has shape {found[name]}, not {wanted[name]}" for name in both]
