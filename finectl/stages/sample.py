"""Sample: images from a model, as PNG files, one tensor file and a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.schedulers import require_scheduler
from finectl.errors import UsageError
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import require_class_conditional, require_null_class

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 100


@dataclass(frozen=True)
class Config:
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
        InputError: the model is conditioned on text, or works on latents whose autoencoder is not at hand.
    """
    model = require_class_conditional(parents[0])
    require_scheduler(config.scheduler, model.diffusion.prediction)
    require_null_class(model, config.guidance)
    if config.sampling_steps > model.diffusion.timesteps:
        raise UsageError(
            f"--sampling-steps {config.sampling_steps} is above the {model.diffusion.timesteps} timesteps of training",
            expected=f"between 1 and {model.diffusion.timesteps}",
        )
    vae = find_autoencoder(config.vae, parents[0], model.channels)
    resolved = replace(
        config,
        labels=",".join(map(str, parse_labels(config.labels, model.num_classes))),
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
    )
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-n{config.samples}",
        data=InheritedData.of(parents[0]),
        summary={"images": config.samples, "network_calls": config.samples * config.sampling_steps},
    )


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
    generator = Generator.of(
        job.parents[0],
        config.weights,
        config.vae,
        resolve_device(job.execution.device),
        scheduler=config.scheduler,
        sampling_steps=config.sampling_steps,
        guidance=config.guidance,
        seed=config.seed,
        dtype=job.execution.dtype,
    )
    wanted = parse_labels(config.labels, generator.model.config.num_classes)
    labels = [wanted[index % len(wanted)] for index in range(config.samples)]
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
    save_tensors(job.directory / "samples.safetensors", {"images": levels, "labels": torch.tensor(labels)})
    make_grid(levels[:GRID_IMAGES], columns=min(10, len(levels))).save(job.directory / "grid.png")
    return Outcome(metrics={"images": config.samples}, cost={"samples": config.samples})


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
    locations=("vae",),
)
