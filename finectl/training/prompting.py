"""What a model of text makes images of: prompts that are named, or the captions of its data. Plans need no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import DataRecord, InheritedData, Job
from finectl.artifacts.store import Artifact
from finectl.data.captions import ALL
from finectl.data.prompts import lines_of, read_lines
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import UsageError
from finectl.models.io import ModelConfig, read_config
from finectl.models.unet_config import UNetConfig
from finectl.training.settings import resolve_data
from finectl.training.text_settings import TextFields, inherited_fields, resolve_text

if TYPE_CHECKING:
    import torch

    from finectl.training.texts import Prompts

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class PromptFields(TextFields):
    """The options of every stage that makes images of prompts."""

    prompts: str | None = None
    prompt: Sequence[str] | None = None
    prompts_digest: str = ""


def resolve_prompts(
    config: PromptFields, parents: Sequence[Artifact], model: ModelConfig
) -> tuple[dict[str, Any], DataRecord | None]:
    """Find out what a model makes images of.

    Args:
        config: The options.
        parents: The input artifacts, the model first.
        model: Its architecture.

    Returns:
        The fields of `PromptFields`, resolved; and the data set of the plan: for a model of text whose prompts are not
        named that which has the captions, else what the model was trained on.

    Raises:
        UsageError: prompts are named for a model of classes, or a model of text has neither prompts nor data.
        InputError: the text encoder, the file of prompts or the captions are not there.
    """
    record, text = resolve_text(config, parents[0], model)
    inherited = InheritedData.of(parents[0])
    if record is None:
        if config.prompts is not None or config.prompt:
            raise UsageError(f"--prompt and --prompts: {parents[0].path} is not conditioned on text", fix="--labels")
        return {"prompt": None, **text}, inherited
    text |= _named_prompts(config)
    if text["prompt"] or config.prompts is not None:
        return text, inherited
    return text, replace(_captioned_data(parents), text=record)


def _named_prompts(config: PromptFields) -> dict[str, Any]:
    """Return the fields of the prompts that the options name, those of standard input read.

    Raises:
        InputError: the file is missing, or there are no prompts in it.
    """
    named = list(config.prompt or ())
    if config.prompts is None:
        return {"prompt": named or None}
    if config.prompts == STDIN:
        return {"prompt": [*lines_of(sys.stdin.read(), "standard input"), *named], "prompts": None}
    lines = read_lines(config.prompts)
    return {"prompt": named or None, "prompts": os.path.abspath(config.prompts), "prompts_digest": sha256_json(lines)}


def _captioned_data(parents: Sequence[Artifact]) -> DataInfo:
    """Return the data set of a model, whose captions are the prompts where none are named.

    Raises:
        UsageError: it has none.
    """
    if not parents[0].manifest.data.get("name"):
        raise UsageError(
            f"no prompts are named, and {parents[0].path} was trained on no data whose captions could be them",
            expected="--prompt TEXT or --prompts FILE",
        )
    return resolve_data(inherited_fields(), parents, captions=ALL)[0]


def prompts_of(job: Job[Any], device: torch.device, split: str = "heldout") -> Prompts | None:
    """Return what a model of text makes images of: the prompts that were named, else the captions of a split.

    Args:
        job: Of a plan that `resolve_prompts` resolved.
        device: Where to encode them.
        split: "heldout" or "train".

    Returns:
        The prompts; None for a model of classes.
    """
    from finectl.data.dataset import load
    from finectl.models.text import describe_text
    from finectl.training.texts import Captions, Prompts, open_table

    config, data = job.config, job.data
    if config.text_encoder is None:
        return None
    if config.prompts is None and not config.prompt and isinstance(data, DataInfo):
        read = job.parents[0].manifest.config
        options = DataOptions(
            resize_filter=data.resize_filter if read.get("resize_filter") is None else read["resize_filter"],
            skip_bad=bool(read.get("skip_bad")),
            console=job.console,
            check=job.stop_if_requested,
            captions=ALL,
        )
        images = load(data.name, split, data.image_size, options)
        return Prompts.of_captions(Captions.opened(job, images, data, device, options), images)
    named = [*(read_lines(config.prompts) if config.prompts else ()), *(config.prompt or ())]
    width = int(cast(UNetConfig, read_config(job.parents[0])).network["cross_attention_dim"])
    record = describe_text(config.text_encoder, width)
    return Prompts.of(named, open_table(named, record, device, job.console, job.stop_if_requested))
