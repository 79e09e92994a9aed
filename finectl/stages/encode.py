"""Encode: images as the latents of an autoencoder, in shards that training maps into memory.

Mean and log-variance of each image's latents are kept, not one draw, so that training draws anew each time. Shard k is
computed from its images alone, whoever computes it: several processes take shards in turn, and a run that was killed
goes on with the shards that are missing.

Reference: Rombach et al., arXiv 2112.10752, section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.files import sha256_json, write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.store import Artifact
from finectl.data.captions import ANY, captions_of
from finectl.data.latents import CAPTIONS, KIND, LatentIndex, Shard, is_whole, write_shard
from finectl.data.sources import SOURCES, DataInfo, parse_spec, split_classes
from finectl.errors import ComputationError, UsageError
from finectl.models.vae import MENDING, describe_vae, require_images
from finectl.training.settings import DataFields, data_options, resolve_data

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.data.dataset import Store
    from finectl.models.vae import Vae

MARK = "encoding"
VALUE_BYTES = {"float16": 2, "float32": 4}
# Models are trained on latents of about unit variance; a scaling factor of another autoencoder is the usual cause.
USUAL_STD = (0.5, 2.0)


@dataclass(frozen=True)
class Config(DataFields):
    """The options of `finectl encode`."""

    vae: str | None
    flip: bool
    storage: str
    shard_size: int
    batch_size: int
    vae_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the images and the autoencoder.

    Raises:
        UsageError: no autoencoder is named, or the data are latents.
        InputError: the images or the autoencoder are missing, or do not fit each other.
    """
    if config.vae is None:
        raise UsageError("no autoencoder is named", expected="--vae PATH or --vae OWNER/NAME", fix=MENDING)
    data, fields = resolve_data(config, (), captions=ANY)
    if data.vae is not None:
        raise UsageError(f"{data.name} are latents already", expected="images", fix="--data folder:PATH")
    if data.whole:
        raise UsageError(
            f"{data.name} are some classes of a set",
            expected="all of it: classes are chosen of the latents",
            fix=f"--data {split_classes(data.name)[0]}",
        )
    vae = describe_vae(config.vae)
    require_images(vae, data.channels, data.image_size, data.name)
    resolved = replace(config, **fields, vae=vae["name"], vae_digest=vae["digest"])
    index = index_of(resolved, data, vae)
    stored = VALUE_BYTES[config.storage] * (1 + config.flip) * data.count
    for side in index.row:
        stored *= side
    summary = {
        "images": data.count,
        "captions": bool(data.captions),
        "latents": f"{index.latent_channels}x{index.latent_size}x{index.latent_size}",
        "shards": len(index.shards),
        "disk_bytes": stored + 8 * data.count,
    }
    notes = () if config.data else (f"no --data: encoding the bundled {data.name}",)
    source = data.name.split(":")[-1].rstrip("/").rsplit("/", 1)[-1].removesuffix(".zip")
    slug = "".join(sign if sign.isalnum() else "-" for sign in source).strip("-")[:40] or "images"
    return Plan(resolved, slug=f"{slug}-{data.image_size}", data=data, summary=summary, notes=notes)


def index_of(config: Config, data: DataInfo, vae: dict[str, Any]) -> LatentIndex:
    """Return what the artifact will hold; nothing in it says where anything lies."""
    return LatentIndex(
        count=data.count,
        shard_size=config.shard_size,
        latent_channels=vae["latent_channels"],
        latent_size=data.image_size // vae["downscale"],
        image_size=data.image_size,
        storage=config.storage,
        flips=config.flip,
        class_names=data.class_names,
        vae={key: value for key, value in vae.items() if key != "name"},
        source={
            "fingerprint": data.split_by or data.fingerprint,
            "bundled": data.bundled,
            "resize_filter": data.resize_filter,
            "skipped": data.skipped,
        },
        captions=data.captions,
    )


def run(job: Job[Config]) -> Outcome:
    """Encode this process's shards; the process that leads waits for the others and writes the index."""
    config, data = job.config, cast(DataInfo, job.data)
    index = index_of(config, data, describe_vae(config.vae or ""))
    mine = index.shards[job.world.rank :: job.world.size]
    missing = [shard for shard in mine if not is_whole(job.directory, index, shard)]
    done = sum(shard.count for shard in mine) - sum(shard.count for shard in missing)
    total = sum(shard.count for shard in mine)
    if done:
        mark_saved(job)
    if missing:
        encoder = Encoder.of(job)
        with job.console.progress("encoding", total, unit="image", done=done) as progress:
            for shard in missing:
                encoder.encode(job, index, shard)
                progress.advance(shard.count, samples=shard.count)
    job.world.barrier()
    if not job.world.leads:
        return Outcome()
    for shard in index.shards:
        if not is_whole(job.directory, index, shard):
            raise ComputationError(
                f"the shard {shard.file} is missing",
                expected="the files of all processes in one directory, which every machine sees",
                fix="run the same command again: it makes the missing shards",
            )
    if data.captions:
        index = replace(index, captions=write_captions(job))
    index.write(job.directory)
    std = measured_std(job, index)
    if not USUAL_STD[0] < std < USUAL_STD[1]:
        job.console.note(
            f"the scaled latents have a standard deviation of {std:.3g}, and training wants about 1: is "
            f"scaling_factor {index.vae['scaling_factor']:g} that of this autoencoder?"
        )
    encoded = sum(shard.count for shard in missing)
    return Outcome(metrics={"images": data.count, "latent_std": std}, cost={"samples": encoded * (1 + config.flip)})


def write_captions(job: Job[Config]) -> str:
    """Write the images' captions beside their latents, and return their digest.

    It is that of the captions one by one, also where the data's own is that of its classes.
    """
    data, options = cast(DataInfo, job.data), replace(data_options(job.config, job), captions=ANY)
    name, argument = parse_spec(data.name)
    labels = SOURCES.load(name).open_images(argument, data, options).labels.tolist()
    texts = list(captions_of(data, options, labels))
    write_json(job.directory / CAPTIONS, texts)
    return sha256_json(texts)


@dataclass(frozen=True, eq=False)
class Encoder:
    """The images, and the autoencoder on its device."""

    store: Store
    vae: Vae
    device: torch.device
    dtype: str

    @classmethod
    def of(cls, job: Job[Config]) -> Encoder:
        """Open what a job names.

        Arithmetic is as exact as what is stored: float16 keeps 10 bits, as TF32 does.
        """
        from finectl.models.vae import load_vae
        from finectl.training.device import resolve_device

        config, data = job.config, cast(DataInfo, job.data)
        device = resolve_device(job.execution.device, job.world.local_rank)
        name, argument = parse_spec(config.data or "")
        store: Store = SOURCES.load(name).open_images(argument, data, data_options(config, job))
        dtype = job.execution.dtype
        if dtype == "auto":
            dtype = "tf32" if config.storage == "float16" else "float32"
        return cls(store, load_vae(config.vae or "", device), device, dtype)

    def encode(self, job: Job[Config], index: LatentIndex, shard: Shard) -> None:
        """Make a shard.

        Raises:
            Interrupted: a signal asked to stop; the shards that are done stay.
            ComputationError: latents are not finite.
        """
        import torch

        moments: list[Tensor] = []
        flipped: list[Tensor] = []
        for first in range(shard.first, shard.first + shard.count, job.config.batch_size):
            job.stop_if_requested(_keep_finished_shards if (job.state / MARK).exists() else None)
            indices = torch.arange(first, min(first + job.config.batch_size, shard.first + shard.count))
            images = self.store.transform(self.store.read(indices).to(self.device))
            moments.append(self._moments(images))
            if index.flips:
                flipped.append(self._moments(images.flip(-1)))
        write_shard(
            job.directory / shard.file,
            index.storage,
            torch.cat(moments),
            self.store.labels[shard.first : shard.first + shard.count],
            torch.cat(flipped) if index.flips else None,
        )
        mark_saved(job)

    def _moments(self, images: Tensor) -> Tensor:
        from finectl.training.device import arithmetic

        with arithmetic(self.device, self.dtype):
            return self.vae.encode_moments(images).cpu()


def mark_saved(job: Job[Config]) -> None:
    """Leave something in the state directory: while it is empty, the runner holds that nothing is saved."""
    job.state.mkdir(exist_ok=True)
    (job.state / MARK).touch()


def _keep_finished_shards() -> None:
    """Nothing is left to save: each finished shard is in its place already."""


def measured_std(job: Job[Config], index: LatentIndex) -> float:
    """Return the standard deviation of the scaled latents that training draws, over the first shard."""
    from finectl.artifacts.tensors import load_tensors

    moments = load_tensors(job.directory / index.shards[0].file)["moments"].double()
    mean, log_variance = moments.chunk(2, dim=1)
    std = (mean.var(correction=0) + log_variance.exp().mean()).sqrt() * index.vae["scaling_factor"]
    return round(float(std), 4)


STAGE = Stage(
    name="encode",
    version=1,
    makes=KIND,
    config=Config,
    reads=lambda config: None,
    plan=plan,
    run=run,
    locations=("data", "vae"),
    shares_work=True,
)
