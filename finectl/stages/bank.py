"""Bank: images that a pre-trained model makes before it is fine-tuned, kept so that fine-tuning goes on seeing them.

Diff-Tuning retains what a model knows by training on its own samples, with weights that fall with the noise. Its
authors draw them once, before training, and keep them as pictures that are encoded anew at every step; here they are
kept as the model makes them, so that neither making nor using a bank of latents takes the autoencoder. Shard k is made
from its numbers alone, whoever makes it: several processes take shards in turn, and a run that was killed goes on with
those that are missing.

Reference: Diff-Tuning, arXiv 2406.00773: knowledge retention, with a bank of samples of the pre-trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finectl.artifacts.chunks import Shares
from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors
from finectl.console import Progress
from finectl.data.bank import KIND, LATENTS, PIXELS, ROLE, BankShards, stored_bytes
from finectl.data.captions import PROMPTS
from finectl.data.classes import drawn_labels, parse_labels
from finectl.errors import ComputationError, UsageError
from finectl.models.autoencoder import works_on_latents
from finectl.models.io import ModelConfig, read_config, require_sampling
from finectl.models.unet_config import is_text_model
from finectl.training.prompting import PromptFields, prompts_of, resolve_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.training.generate import Generator

GUIDANCE = 1.5
"""As Diff-Tuning's authors sample, where the model has a null class."""
AUTOMATIC = 2_000
"""The most images that fine-tuning makes by itself where there is no bank."""
A_CLASS, LEAST, MOST = 50, 5_000, 50_000
"""Images of a class, and of a bank, where `--samples` is left out: what more of them add falls off quickly."""
SMALL = 500
"""The same of a model of bundled data."""
GRID_IMAGES = 100
PLOTS = "plots"


@dataclass(frozen=True)
class Config(PromptFields):
    """The options of `finectl bank`."""

    weights: str
    samples: int | None
    labels: str | None
    scheduler: str
    sampling_steps: int
    guidance: float | None
    batch_size: int
    shard_size: int
    seed: int


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the model.

    Raises:
        UsageError: there is no such scheduler or label, there are too many steps, or the model cannot be guided.
        InputError: the model is conditioned on text, and its encoder or its prompts are not there.
    """
    parent, model = parents[0], read_config(parents[0])
    guidance = (GUIDANCE if model.has_null_class else 1.0) if config.guidance is None else config.guidance
    require_sampling(model, scheduler=config.scheduler, sampling_steps=config.sampling_steps, guidance=guidance)
    text, data = resolve_prompts(config, parents, model)
    if config.labels is not None and is_text_model(model):
        raise UsageError(f"--labels: {parent.path} is conditioned on text", fix="--prompt TEXT")
    labels, notes = drawn_labels(config.labels, parent.manifest, 0 if is_text_model(model) else model.num_classes)
    samples = config.samples or usual_samples(model, bundled=bool(parent.manifest.data.get("bundled")))
    space, shape = space_of(parent, model), (model.channels, model.image_size, model.image_size)
    named = None if is_text_model(model) else ",".join(map(str, labels))
    resolved = replace(config, **text, samples=samples, labels=named, guidance=guidance)
    shards = BankShards(parent.path, samples, config.shard_size)
    summary = {
        "images": samples,
        "classes": len(labels),
        "stored_as": f"{space} {shape[0]}x{shape[1]}x{shape[2]}",
        "network_calls": samples * config.sampling_steps,
        "images_per_call": 1 if guidance == 1.0 else 2,
        "shards": len(shards.firsts),
        "disk_bytes": stored_bytes(space, shape, samples),
    }
    slug = f"{parent.name.rsplit('-', 1)[0]}-n{samples}"
    return Plan(resolved, slug=slug, data=data, summary=summary, notes=notes)


def usual_samples(model: ModelConfig, *, bundled: bool) -> int:
    """Return the size of a bank that nobody named: 50 images a class, at least 5,000 and at most 50,000.

    Args:
        model: The architecture.
        bundled: Whether it was trained on a small bundled set; 500 are enough then.
    """
    return SMALL if bundled else min(max(A_CLASS * model.num_classes, LEAST), MOST)


def space_of(artifact: Artifact, model: ModelConfig) -> str:
    """Return whether a model's images are `latents` or `pixels`."""
    return LATENTS if works_on_latents(artifact, model.channels) else PIXELS


def run(job: Job[Config]) -> Outcome:
    """Make this process's shards; the process that leads waits for the others and says what is in them."""
    config, shares = job.config, Shares(job)
    shards = BankShards(job.directory, config.samples or 0, config.shard_size)
    mine = [shards.span(first) for first in shards.firsts[job.world.rank :: job.world.size]]
    sampler, made = None, 0
    with job.console.progress("sampling", sum(map(len, mine)), unit="image") as progress:
        for span in shares.mine(shards, progress):
            sampler = sampler or Sampler.of(job)
            shares.keep(shards, span, sampler.rows(span, shares, progress))
            made += len(span)
    job.world.barrier()
    if not job.world.leads:
        return Outcome()
    return Outcome(metrics=finish(job, shards), cost={"samples": made})


@dataclass(frozen=True, eq=False)
class Sampler:
    """The model on its device.

    Args:
        generator: What samples it.
        space: `latents` or `pixels`.
        drawn: The classes in turn.
        batch_size: Images computed at a time.
    """

    generator: Generator
    space: str
    drawn: Sequence[int]
    batch_size: int

    @classmethod
    def of(cls, job: Job[Config]) -> Sampler:
        """Load what a job names."""
        from finectl.training.device import resolve_device
        from finectl.training.generate import Generator

        config, parent = job.config, job.parents[0]
        device = resolve_device(job.execution.device, job.world.local_rank)
        generator = Generator.of(
            parent,
            config.weights,
            None,
            device,
            scheduler=config.scheduler,
            sampling_steps=config.sampling_steps,
            guidance=1.0 if config.guidance is None else config.guidance,
            seed=config.seed,
            dtype=job.execution.dtype,
            prompts=prompts_of(job, device, "train"),
        )
        model = read_config(parent)
        drawn = parse_labels(config.labels, model.num_classes)
        return cls(generator, space_of(parent, model), drawn, config.batch_size)

    def rows(self, span: range, shares: Shares, progress: Progress) -> dict[str, Tensor]:
        """Make images of consecutive numbers; image k depends on the seed and k alone, its class is the k-th in turn.

        Raises:
            Interrupted: a signal asked to stop; finished shards stay.
            ComputationError: an image is not finite.
        """
        import torch

        prompts, classes = self.generator.prompts, self._classes(span)
        labels = classes.tolist() if prompts is None else prompts.rows_of(span)
        parts = []
        for place in range(0, len(span), self.batch_size):
            some = labels[place : place + self.batch_size]
            values = self.generator.values(span.start + place, some, shares.check, clip=self.space == PIXELS)
            parts.append(_stored(values, self.space))
            progress.advance(len(some), samples=len(some))
        return {"images": torch.cat(parts), "labels": classes}

    def _classes(self, span: range) -> Tensor:
        import torch

        if self.generator.prompts is not None:
            return self.generator.prompts.classes_of(span)
        return torch.tensor([self.drawn[index % len(self.drawn)] for index in span])


def _stored(values: Tensor, space: str) -> Tensor:
    """Return images in the type in which they are kept, on the CPU.

    Raises:
        ComputationError: a latent is not finite in float16.
    """
    import torch

    from finectl.data.images import to_uint8

    if space == PIXELS:
        return to_uint8(values).cpu()
    stored = values.to(torch.float16).cpu()
    if not bool(stored.isfinite().all()):
        raise ComputationError(
            f"latents up to {float(values.abs().max()):.3g} are beyond float16",
            expected="scaled latents, of about unit variance",
            fix="look at what the model makes: finectl sample; a smaller --guidance, or --dtype float32",
        )
    return stored


def finish(job: Job[Config], shards: BankShards) -> dict[str, object]:
    """Check that all shards are there, draw the first images where they are pixels, and say what the bank holds.

    Raises:
        ComputationError: a shard is missing, which another machine may have written elsewhere.
    """
    for first in shards.firsts:
        if not shards.has(first):
            raise ComputationError(
                f"the shard {shards.file(first).name} is missing",
                expected="the files of all processes in one directory, which every machine sees",
                fix="run the same command again: it makes the missing shards",
            )
    parent = job.parents[0]
    model = read_config(parent)
    space = space_of(parent, model)
    if space == PIXELS:
        _draw(job, shards)
    if job.config.text_encoder is not None:
        _write_prompts(job, shards.count)
    labels = shards.load(lambda name: name == "labels")["labels"]
    return {
        "images": shards.count,
        "space": space,
        "channels": model.channels,
        "image_size": model.image_size,
        "labels": labels.bincount(minlength=max(model.num_classes, 1)).tolist(),
    }


def _draw(job: Job[Config], shards: BankShards) -> None:
    """Draw the first images."""
    import torch

    from finectl.data.images import make_grid

    (job.directory / PLOTS).mkdir(exist_ok=True)
    few = BankShards(job.directory, min(GRID_IMAGES, shards.count), shards.size)
    levels = torch.cat([load_tensors(few.file(first))["images"] for first in few.firsts])[: few.count]
    make_grid(levels, columns=min(10, few.count)).save(job.directory / PLOTS / "grid.png")


def _write_prompts(job: Job[Config], count: int) -> None:
    """Write the prompt of every image."""
    from finectl.training.device import resolve_device

    prompts = prompts_of(job, resolve_device(job.execution.device), "train")
    write_json(job.directory / PROMPTS, prompts.texts_of(range(count)) if prompts else [])


STAGE = Stage(
    name="bank",
    version=1,
    makes=KIND,
    config=Config,
    reads=lambda config: Reads(ROLE, ("model",)),
    plan=plan,
    run=run,
    locations=("text_encoder", "prompts"),
    shares_work=True,
)
