"""Sample: images from a model, as PNG files, one tensor file and a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.schedulers import require_scheduler
from finectl.errors import InputError, UsageError
from finectl.models.foreign import components
from finectl.models.io import load_model, require_class_conditional, require_null_class
from finectl.models.vae import MENDING, describe_vae, find_recorded, require_same_space

if TYPE_CHECKING:
    from torch import Tensor

GRID_IMAGES = 100
PIXEL_CHANNELS = (1, 3)


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


def find_autoencoder(given: str | None, artifact: Artifact, channels: int) -> dict[str, Any] | None:
    """Return what decodes a model's latents; None for a model of pixels.

    Args:
        given: What `--vae` names.
        artifact: The model.
        channels: Those of its images.

    Raises:
        UsageError: an autoencoder is named, and the model was trained on pixels.
        InputError: it is not the one whose latents the model was trained on, or it is nowhere to be found.
    """
    recorded = artifact.manifest.data.get("vae")
    if given is not None and artifact.manifest.data and recorded is None:
        raise UsageError(
            f"--vae {given}: {artifact.path} was trained on pixels ({artifact.manifest.data['name']})",
            fix="leave --vae out",
        )
    kept = components.read_parts(artifact).parts if artifact.has(components.NAME) else {}
    if given is not None:
        found = describe_vae(given)
    elif components.VAE in kept:
        found = describe_vae(str(components.locate(artifact, components.VAE, kept[components.VAE])))
    elif recorded is not None:
        return find_recorded(recorded, str(artifact.path))
    elif channels in PIXEL_CHANNELS:
        return None
    else:
        raise InputError(
            f"{artifact.path} works on {channels} channels, which are no pixels, and no autoencoder is recorded for it",
            expected="the one whose latents it was trained on",
            fix=MENDING,
        )
    if recorded is not None:
        require_same_space(recorded, found, str(artifact.path))
    if found["latent_channels"] != channels:
        raise InputError(
            f"{artifact.path} works on {channels} channels, the latents of {found['name']} have "
            f"{found['latent_channels']}",
            expected="the autoencoder whose latents the model was trained on",
        )
    return found


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

    from finectl.data.images import make_grid, save_pngs, to_uint8
    from finectl.diffusion.sampling import sample_images
    from finectl.models.vae import load_vae
    from finectl.training.device import arithmetic, resolve_device

    config = job.config
    device = resolve_device(job.execution.device)
    model = load_model(job.parents[0], config.weights).to(device).eval()
    vae = load_vae(config.vae, device) if config.vae else None
    wanted = parse_labels(config.labels, model.config.num_classes)
    labels = [wanted[index % len(wanted)] for index in range(config.samples)]
    batches: list[Tensor] = []
    with job.console.progress("sampling", config.samples, unit="image") as progress:
        for first in range(0, config.samples, config.batch_size):
            kept = job.state / f"images-{config.batch_size}-{first}.safetensors"
            some = labels[first : first + config.batch_size]
            if not kept.exists():
                with arithmetic(device, job.execution.dtype):
                    images = sample_images(
                        model,
                        (model.config.channels, model.config.image_size, model.config.image_size),
                        some,
                        null_label=model.config.num_classes,
                        scheduler=config.scheduler,
                        sampling_steps=config.sampling_steps,
                        guidance=config.guidance,
                        seed=config.seed,
                        first=first,
                        learned_sigma=model.config.learn_sigma,
                        device=device,
                        after_step=lambda: job.stop_if_requested(_keep_finished_batches if batches else None),
                        diffusion=model.config.diffusion,
                        clip=vae is None,
                    )
                if vae is not None:
                    images = vae.decode(images)
                save_tensors(kept, {"images": to_uint8(images)})
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
    reads=lambda config: Reads("model", ("model", "condensed")),
    plan=plan,
    run=run,
    locations=("vae",),
)
