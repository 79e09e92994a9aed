"""Init of a UNet: random, as diffusers draws it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from finectl.artifacts.job import Job, Outcome, Plan
from finectl.data.captions import ALL, NONE
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.io import save_model, total_parameters
from finectl.models.text import describe_text
from finectl.models.text.clip import MENDING
from finectl.models.unet_presets import TEXT_PRESETS, is_text_unet
from finectl.stages.init.config import UNREAD, Config
from finectl.training.process import unet_for
from finectl.training.settings import resolve_data

METHOD = "he"
"""The one method that makes a UNet."""


def require_unet_options(config: Config) -> None:
    """Check that nothing is asked of a UNet that only a Diffusion Transformer has.

    Raises:
        UsageError: the method needs equal layers, or an option goes with such methods.
    """
    if config.method != METHOD:
        raise UsageError(
            f"--model {config.model} does not go with --method {config.method}, which works on the equal layers of a "
            "Diffusion Transformer",
            expected=f"--method {METHOD}, diffusers' own random initialisation",
            fix=f"finectl init --method {METHOD} --model {config.model}",
        )
    for name in ("variant", "depth", "set"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name} does not go with --model {config.model}, a UNet", fix=f"leave --{name} out")


def text_encoder_of(config: Config) -> dict[str, Any] | None:
    """Return the text encoder for `--model`, None where that takes no text.

    Raises:
        UsageError: none is named, or one for a model that takes no text.
        InputError: it is not there.
    """
    if is_text_unet(config.model):
        if config.text_encoder is None:
            raise UsageError(f"--model {config.model} is conditioned on text, and no encoder is named", fix=MENDING)
        return describe_text(config.text_encoder, TEXT_PRESETS[cast(str, config.model).lower()].text_width)
    if config.text_encoder is not None:
        raise UsageError(
            f"--text-encoder {config.text_encoder}: no model of text is made",
            expected=f"--model {' or '.join(TEXT_PRESETS)}",
        )
    return None


def plan_unet(config: Config) -> Plan[Config]:
    """Resolve the options of a UNet against the target data.

    Raises:
        UsageError: the preset does not fit the data.
        InputError: the data set is missing or empty.
    """
    name = cast(str, config.model).lower()
    record = text_encoder_of(config)
    data, fields = resolve_data(config, (), captions=ALL if record else NONE)
    data = replace(data, text=record)
    target = unet_for(name, data, config.process)
    if unet_for(name, data, None) == target:
        config = replace(config, process=None)
    parameters = total_parameters(target)
    if record is not None:
        fields |= {"text_encoder": record["name"], "text_digest": record["digest"]}
    return Plan(
        replace(config, **fields, **{**UNREAD, "sigma": None}, model=name),
        slug=f"{name}-{config.method}",
        data=data,
        summary={"parameters": parameters, "disk_bytes": 4 * parameters},
    )


def run_unet(job: Job[Config]) -> Outcome:
    """Draw the weights of a UNet as diffusers does, and write it."""
    from finectl.diffusion.random import generator_for
    from finectl.models.unet import initial_state

    data = cast(DataInfo, job.data)
    target = unet_for(cast(str, job.config.model), data, job.config.process)
    if job.world.leads:
        save_model(job.directory, target, initial_state(target, generator_for("init", job.config.seed)))
    return Outcome(
        metrics={"method": job.config.method, "depth": target.depth, "parameters": total_parameters(target)}
        | dict.fromkeys(("parameters_transferred", "parameters_transferred_with_embedders"), 0)
    )
