"""Options of a ControlNet's training, and what they come to with a model and its data. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.job import InheritedData, Plan, Reads
from finectl.artifacts.store import Artifact
from finectl.data.bank import KIND, bank_info, require_bank_of
from finectl.data.controls import CONTROLS, FOLDER, ControlInfo, describe_control
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import InputError, UsageError
from finectl.models.control_config import count_branch, require_controllable
from finectl.models.io import read_config
from finectl.models.unet_config import UNetConfig
from finectl.models.vae import find_recorded
from finectl.training.chain_settings import BANK, DIFF_TUNING, FULL, ChainFields, chain_of, resolve_chain
from finectl.training.estimate import BYTES, COPIES, SAVED_COPIES
from finectl.training.settings import (
    DEFAULT_DATA,
    DataFields,
    OptimiserFields,
    TrainFields,
    TrainSettings,
    describe_settings,
    require_fit,
    resolve_settings,
    settings_of,
    settled_betas,
)
from finectl.training.text_settings import CaptionFields, resolve_captioned
from finectl.world import World

EMPTY, EXTRACTED = "empty", "extracted"
SMALL = {"steps": 600, "batch_size": 32, "lr": 1e-3, "ema": 0.99, "warmup_steps": 0}
PAPER = {"steps": 15_000, "batch_size": 5, "lr": 1e-5, "ema": 0.9999, "warmup_steps": 0}
"""As ControlNets are trained with Diff-Tuning: batches of 4, beside which one image is retained."""
VALIDATED_EVERY = 100
VALIDATION_IMAGES, VALIDATION_STEPS = 16, 50
VALIDATIONS = 30
"""Of a run on bundled data: enough to tell a drop from noise."""
LOCATIONS = ("data", "text_encoder", "control_model", "control_images", "bank", "vae")


@dataclass(frozen=True)
class Config(DataFields, TrainFields, OptimiserFields, CaptionFields, ChainFields):
    """The options of `finectl finetune --control`; None is a default that depends on the data."""

    weights: str
    control: str
    control_model: str | None = None
    control_set: str | None = None
    control_images: str | None = None
    bank_control: str | None = None
    validate_every: int | None = None
    validation_images: int = VALIDATION_IMAGES
    validation_steps: int = VALIDATION_STEPS
    control_digest: str = ""
    vae: str | None = None
    vae_digest: str = ""


def reads(config: Config) -> Reads:
    """Return the inputs: the model, and its bank where one is used."""
    bank = (Reads(KIND, (KIND,), named=(config.bank,)),) if config.bank is not None else ()
    return Reads("model", ("model",), also=bank)


def uses_bank(config: Config) -> bool:
    """Tell whether images of a bank are retained."""
    return config.method == DIFF_TUNING and (config.retention or BANK) == BANK


def _bank_control(config: Config) -> str | None:
    """Return what the bank's images are seen with: their own controls, wherever these can be measured."""
    if not uses_bank(config):
        return None
    return config.bank_control or (EMPTY if config.control == FOLDER else EXTRACTED)


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model, the data and the bank.

    Raises:
        UsageError: the model takes no ControlNet, or options contradict one another.
        InputError: data, captions, encoders, the network of the control or the bank are missing, or do not fit.
    """
    base = parents[0]
    model = require_controllable(read_config(base), str(base.path))
    data, fields = resolve_captioned(config, [base], model, model.image_size)
    require_fit(base, data)
    _require_sense(config, data)
    vae = _autoencoder(config, data)
    scale = int(vae["downscale"]) if vae else 1
    info = control_of(config, data, DataOptions(resize_filter=fields["resize_filter"], skip_bad=fields["skip_bad"]))
    settings = resolve_settings(config, data.bundled, small=SMALL, paper=PAPER)
    resolved = replace(
        config,
        **fields,
        **settings,
        **resolve_chain(config),
        betas=settled_betas(config.betas),
        control_model=info.model["name"] if info.model else None,
        control_images=info.images["path"] if info.images else None,
        control_set=",".join(f"{name}={value:g}" for name, value in info.settings.items()) or None,
        control_digest=info.digest,
        validate_every=_validate_every(config, settings["steps"], data.bundled),
        validation_images=min(config.validation_images, data.heldout_count),
        bank=str(parents[1].path.absolute()) if len(parents) > 1 else None,
        bank_control=_bank_control(config),
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
    )
    if len(parents) > 1:
        _require_bank(parents[1], base, model)
    training = settings_of(resolved)
    chain_of(resolved, training.batch_size)  # the batch has room for what is retained
    how = "" if config.method == FULL else f"-{config.method}"
    return Plan(
        resolved,
        slug=f"{base.name.rsplit('-', 1)[0]}-{config.control}-t{training.steps}{how}",
        data=data,
        summary=_estimate(base, model, training, scale),
        notes=(
            f"ControlNet for {config.control} on {data.name}: {describe_settings(training)}",
            *_data_note(config, base, data),
        ),
    )


def control_of(config: Config, data: DataInfo, options: DataOptions) -> ControlInfo:
    """Return what the control is.

    Raises:
        UsageError: an option of one control is given with another, or is missing.
        InputError: the network or the images of the control are not there, or do not fit.
    """
    if config.control == FOLDER:
        from finectl.data.controls.folder import describe_folder

        for name, value in (("--control-model", config.control_model), ("--control-set", config.control_set)):
            if value is not None:
                raise UsageError(f"{name} {value} with --control folder", fix=f"leave {name} out")
        return describe_folder(data, config.control_images, options)
    if config.control_images is not None:
        raise UsageError(
            f"--control-images {config.control_images} with --control {config.control}, which is measured",
            expected="one of them",
            fix="--control folder",
        )
    return describe_control(config.control, config.control_set, config.control_model)


def _validate_every(config: Config, steps: int, bundled: bool) -> int:
    if config.validate_every is not None:
        return config.validate_every
    return max(1, steps // VALIDATIONS) if bundled else VALIDATED_EVERY


def _autoencoder(config: Config, data: DataInfo) -> dict[str, Any] | None:
    """Return what decodes the data, so that controls can be measured; None for pixels.

    Raises:
        UsageError: one is named, and the data are pixels.
        InputError: it is not where it was, or is another one.
    """
    if data.vae is None:
        if config.vae is not None:
            raise UsageError(f"--vae {config.vae}: {data.name} holds pixels", fix="leave --vae out")
        return None
    return find_recorded({**data.vae, "name": config.vae or data.vae["name"]}, data.name)


def _require_sense(config: Config, data: DataInfo) -> None:
    """Check options that go together.

    Raises:
        UsageError: they do not.
    """
    if config.flip:
        raise UsageError("--flip mirrors images and not their controls", fix="leave --flip out")
    if config.bank_control is not None and not uses_bank(config):
        raise UsageError(
            f"--bank-control {config.bank_control}, and there is no bank",
            expected="--method diff-tuning --retention bank",
            fix="leave --bank-control out",
        )
    if config.bank_control == EXTRACTED and config.control == FOLDER:
        raise UsageError(
            "--bank-control extracted with --control folder: the bank's images have no control there",
            fix="--bank-control empty",
        )


def _require_bank(artifact: Artifact, base: Artifact, model: UNetConfig) -> None:
    """Check the bank against the model.

    Raises:
        InputError: it is another model's.
    """
    require_bank_of(artifact, base)
    bank = bank_info(artifact)
    if bank.shape != (model.channels, model.image_size, model.image_size):
        raise InputError(
            f"{artifact.path} holds images of {bank.shape}",
            expected=f"{(model.channels, model.image_size, model.image_size)}, as {base.path} makes",
            fix=f"finectl bank {base.path}",
        )


def _data_note(config: Config, base: Artifact, data: DataInfo) -> tuple[str, ...]:
    if config.data is not None:
        return ()
    inherited = InheritedData.of(base)
    return (f"no --data: {'that of the model' if inherited else f'the bundled {DEFAULT_DATA}'}, {data.name}",)


def _estimate(base: Artifact, model: UNetConfig, settings: TrainSettings, scale: int) -> dict[str, Any]:
    """Estimate what the training takes: the branch as any training, beside it the frozen model and its activations."""
    branch, world = count_branch(base, model, scale), World.from_environment()
    images = -(-settings.batch_size // world.size)
    activations = BYTES * model.activations * 3 // 2  # of the branch, half a UNet, too
    return {
        "parameters": model.parameters,
        "trainable_parameters": branch,
        "processes": world.size,
        "steps": settings.steps,
        "memory_bytes": BYTES * (COPIES * branch + model.parameters) + images * activations,
        "memory_per": "device" if world.size > 1 else "process",
        "disk_bytes": BYTES * (SAVED_COPIES + settings.kept) * branch,
    }


def measures_of(config: Config) -> tuple[str, ...]:
    """Return how the control of generated images is compared with the one that was asked for; none for `folder`."""
    return CONTROLS[config.control].measures
