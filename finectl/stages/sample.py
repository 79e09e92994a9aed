"""Sample: images from a model, as PNG files, one tensor file and a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.data.captions import PROMPTS
from finectl.data.classes import drawn_labels, parse_labels
from finectl.errors import UsageError
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import read_config, require_sampling
from finectl.models.unet_config import is_text_model
from finectl.training.pretrained import (
    LOCATIONS,
    UNCHANGED,
    PretrainedFields,
    network_calls,
    pretrained_reads,
    resolve_pretrained,
    split_pretrained,
)
from finectl.training.prompting import PromptFields, prompts_of, resolve_prompts
from finectl.training.text_settings import unchanged

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 100


@dataclass(frozen=True)
class Config(PromptFields, PretrainedFields):
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


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check the options against the model.

    Raises:
        UsageError: there is no such scheduler or label, there are too many steps, or the model cannot be guided.
        InputError: the model works on latents whose autoencoder is not at hand, or is conditioned on text whose
            encoder is not, or on captions that are not there; or a second model does not go with it.
    """
    parents, pretrained = split_pretrained(config, parents)
    model = read_config(parents[0])
    second = resolve_pretrained(config, parents, pretrained, config.guidance)
    own = 1.0 if config.domain_guidance is not None else config.guidance  # the second model has the null class then
    require_sampling(model, scheduler=config.scheduler, sampling_steps=config.sampling_steps, guidance=own)
    vae = find_autoencoder(config.vae, parents[0], model.channels)
    text, data = resolve_prompts(config, parents, model)
    if config.labels is not None and is_text_model(model):
        raise UsageError(f"--labels: {parents[0].path} is conditioned on text", fix="--prompt TEXT")
    labels, notes = drawn_labels(config.labels, parents[0].manifest, 0 if is_text_model(model) else model.num_classes)
    resolved = replace(
        config,
        **text,
        **second,
        labels=None if is_text_model(model) else ",".join(map(str, labels)),
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
    )
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-n{config.samples}",
        data=data,
        summary={"images": config.samples, **network_calls(resolved, config.samples, config.sampling_steps)},
        notes=notes,
    )


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
        pretrained=split_pretrained(config, job.parents)[1],
        fraction=config.fraction,
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


def _keep_finished_batches() -> None:
    """Nothing is left to save: each finished batch is in the state already."""


STAGE = Stage(
    name="sample",
    version=1,
    makes="samples",
    config=Config,
    reads=lambda config: Reads("model", ("model", "condensed", "experts", "expert"), also=pretrained_reads(config)),
    plan=plan,
    run=run,
    locations=("vae", "text_encoder", "prompts", *LOCATIONS),
    unchanged_at={**unchanged("text_digest"), "prompt": None, "prompts_digest": "", **UNCHANGED},
)
