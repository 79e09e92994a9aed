"""Sample: images from a model, as PNG files, one tensor file and a grid."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.files import sha256_json, write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.data.captions import ALL, PROMPTS
from finectl.data.prompts import lines_of, read_lines
from finectl.data.sources import DataInfo, DataOptions
from finectl.diffusion.schedulers import require_scheduler
from finectl.errors import UsageError
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import read_config, require_null_class
from finectl.models.unet_config import UNetConfig
from finectl.training.settings import resolve_data
from finectl.training.text_settings import TextFields, inherited_fields, resolve_text, unchanged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.training.texts import Prompts

STDIN = "-"
GRID_IMAGES = 100


@dataclass(frozen=True)
class Config(TextFields):
    """The options of `finectl sample`."""

    weights: str
    samples: int
    labels: str | None
    scheduler: str
    sampling_steps: int
    guidance: float
    batch_size: int
    seed: int
    vae: str | None = None
    vae_digest: str = ""
    prompts: str | None = None
    prompt: Sequence[str] | None = None
    prompts_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check the options against the model.

    Raises:
        UsageError: there is no such scheduler or label, there are too many steps, or the model cannot be guided.
        InputError: the model works on latents whose autoencoder is not at hand, or is conditioned on text whose
            encoder is not, or on captions that are not there.
    """
    model = read_config(parents[0])
    require_scheduler(config.scheduler, model.diffusion.prediction)
    require_null_class(model, config.guidance)
    if config.sampling_steps > model.diffusion.timesteps:
        raise UsageError(
            f"--sampling-steps {config.sampling_steps} is above the {model.diffusion.timesteps} timesteps of training",
            expected=f"between 1 and {model.diffusion.timesteps}",
        )
    vae = find_autoencoder(config.vae, parents[0], model.channels)
    record, text = resolve_text(config, parents[0], model)
    data: Any = InheritedData.of(parents[0])
    if record is None and (config.prompts is not None or config.prompt):
        raise UsageError(f"--prompt and --prompts: {parents[0].path} is not conditioned on text", fix="--labels")
    if record is not None:
        if config.labels is not None:
            raise UsageError(f"--labels: {parents[0].path} is conditioned on text", fix="--prompt TEXT")
        text |= named_prompts(config)
        if not text["prompt"] and config.prompts is None:
            data = replace(captioned_data(parents), text=record)
    resolved = replace(
        config,
        **{"prompt": None, **text},
        labels=",".join(map(str, parse_labels(config.labels, model.num_classes))) if record is None else None,
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
    )
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-n{config.samples}",
        data=data,
        summary={"images": config.samples, "network_calls": config.samples * config.sampling_steps},
    )


def named_prompts(config: Config) -> dict[str, Any]:
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


def captioned_data(parents: Sequence[Artifact]) -> DataInfo:
    """Return the data set of a model, whose held-out captions are the prompts where none are named.

    Raises:
        UsageError: it has none.
    """
    if not parents[0].manifest.data.get("name"):
        raise UsageError(
            f"no prompts are named, and {parents[0].path} was trained on no data whose captions could be them",
            expected="--prompt TEXT or --prompts FILE",
        )
    return resolve_data(inherited_fields(), parents, captions=ALL)[0]


def parse_labels(text: str | None, classes: int) -> list[int]:
    """Return the classes of a comma-separated list; all of them by default, the null class where there are none.

    Raises:
        UsageError: an entry is no class of the model.
    """
    if text is None:
        return list(range(classes)) or [0]
    parts = [part.strip() for part in text.split(",")]
    last = max(classes - 1, 0)
    if not all(part.isdecimal() and int(part) <= last for part in parts):
        raise UsageError(f"--labels {text!r}", expected=f"classes between 0 and {last}, separated by commas")
    return [int(part) for part in parts]


def run(job: Job[Config]) -> Outcome:
    """Generate the images batch by batch, keeping finished batches for a resumed run."""
    import torch

    from finectl.data.images import make_grid, save_pngs
    from finectl.training.device import resolve_device
    from finectl.training.generate import Generator

    config = job.config
    device = resolve_device(job.execution.device)
    prompts = prompts_of(job, device)
    generator = Generator.of(
        job.parents[0],
        config.weights,
        config.vae,
        device,
        scheduler=config.scheduler,
        sampling_steps=config.sampling_steps,
        guidance=config.guidance,
        seed=config.seed,
        dtype=job.execution.dtype,
        prompts=prompts,
    )
    every = range(config.samples)
    if prompts is not None:
        labels, classes = prompts.rows_of(every), prompts.classes_of(every)
        write_json(job.directory / PROMPTS, prompts.texts_of(every))
    else:
        wanted = parse_labels(config.labels, generator.model.config.num_classes)
        labels = [wanted[index % len(wanted)] for index in every]
        classes = torch.tensor(labels)
    batches: list[Tensor] = []
    with job.console.progress("sampling", config.samples, unit="image") as progress:
        for first in range(0, config.samples, config.batch_size):
            kept = job.state / f"images-{config.batch_size}-{first}.safetensors"
            some = labels[first : first + config.batch_size]
            if not kept.exists():
                images = generator.images(
                    first, some, lambda: job.stop_if_requested(_keep_finished_batches if batches else None)
                )
                save_tensors(kept, {"images": images})
            batches.append(load_tensors(kept)["images"])
            save_pngs(job.directory / "samples", batches[-1], first)
            progress.advance(len(some), samples=len(some))
    levels = torch.cat(batches)
    save_tensors(job.directory / "samples.safetensors", {"images": levels, "labels": classes})
    make_grid(levels[:GRID_IMAGES], columns=min(10, len(levels))).save(job.directory / "grid.png")
    return Outcome(metrics={"images": config.samples}, cost={"samples": config.samples})


def prompts_of(job: Job[Config], device: torch.device) -> Prompts | None:
    """Return what a model of text generates images of: the prompts that were named, else the held-out captions."""
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
        held = load(data.name, "heldout", data.image_size, options)
        return Prompts.of_captions(Captions.opened(job, held, data, device, options), held)
    named = [*(read_lines(config.prompts) if config.prompts else ()), *(config.prompt or ())]
    width = int(cast(UNetConfig, read_config(job.parents[0])).network["cross_attention_dim"])
    record = describe_text(config.text_encoder, width)
    return Prompts.of(named, open_table(named, record, device, job.console, job.stop_if_requested))


def _keep_finished_batches() -> None:
    """Nothing is left to save: each finished batch is in the state already."""


STAGE = Stage(
    name="sample",
    version=1,
    makes="samples",
    config=Config,
    reads=lambda config: Reads("model", ("model", "condensed", "experts", "expert")),
    plan=plan,
    run=run,
    locations=("vae", "text_encoder", "prompts"),
    unchanged_at={**unchanged("text_digest"), "prompt": None, "prompts_digest": ""},
)
