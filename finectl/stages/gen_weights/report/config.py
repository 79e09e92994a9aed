"""The options of `report`, what they mean for one collection, and which runs they ask for. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finectl.adapters.weight_dataset import WeightDataset, open_weights
from finectl.artifacts.ancestors import require_ancestor
from finectl.artifacts.store import Artifact
from finectl.data.concepts import ROLES, TRAINABLE, Concept, read_concepts
from finectl.data.pairs import INDEX, SOURCES, read_index
from finectl.errors import InputError, UsageError
from finectl.models.gan.io import GanConfig, read_gan
from finectl.registry import nearest
from finectl.training.gan.settings import GanSettings
from finectl.training.weights.names import STARTS

PIX2PIX = "pix2pix"
PIX2PIX_LR = 2e-4
BASELINE, PREDICTION = "lora", "prediction"
OPTIONS = {"weight-dataset": "--collection", "gan": "--base", "pairs": "--pairs"}


@dataclass(frozen=True)
class Config:
    """The options of `finectl gen-weights report`."""

    collection: str | None
    base: str | None
    pairs: str | None
    concepts: str
    starts: str
    at: str
    seeds: int
    seed: int
    subset: int
    subset_clip: str | None
    batch_size: int
    lr: float
    lr_discriminator: float
    l1: float
    gan_from: float
    pix2pix: int
    oracle_steps: int | None
    pictures: int
    inception: str | None
    inception_digest: str = ""
    subset_clip_digest: str = ""


@dataclass(frozen=True)
class Sources:
    """What a report is made of.

    Args:
        generator: Of weights.
        collection: That it was trained on.
        base: The GAN that the weights belong to.
        pairs: The images.
        dataset: The collection, opened.
        gan: The GAN's sizes.
        concepts: Those that are compared on.
    """

    generator: Artifact
    collection: Artifact
    base: Artifact
    pairs: Artifact
    dataset: WeightDataset
    gan: GanConfig
    concepts: tuple[Concept, ...]

    @classmethod
    def of(cls, config: Config, parents: Sequence[Artifact]) -> Sources:
        """Find what the generator was made from, where the options do not name it.

        Raises:
            InputError: something is gone, or does not belong together.
            UsageError: there is no such concept.
        """
        found = {artifact.kind: artifact for artifact in parents}
        generator = found["weight-generator"]
        for kind, option in OPTIONS.items():
            if kind not in found:
                found[kind] = require_ancestor(found.get("weight-dataset", generator), kind, option)
        dataset = open_weights(found["weight-dataset"])
        base, pairs = found["gan"], found["pairs"]
        if dataset.base != base.manifest.digest:
            raise InputError(
                f"{base.path} is not the base of the weights in {found['weight-dataset'].path}",
                expected="the GAN that they were trained on",
                fix="--base PATH",
            )
        concepts = chosen_concepts(config.concepts, read_concepts(pairs), pairs)
        return cls(generator, found["weight-dataset"], base, pairs, dataset, read_gan(base), concepts)

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.gan.generator.image_size

    def images(self, split: str) -> int:
        """How many images a split has."""
        return sum(source.split == split for source in read_index(self.pairs.file(INDEX)))


def chosen_concepts(text: str, concepts: Sequence[Concept], pairs: Artifact) -> tuple[Concept, ...]:
    """Return the concepts that a list of roles and names means.

    Raises:
        UsageError: an entry is neither, or a concept was trained on.
        InputError: there is none.
    """
    named: list[Concept] = []
    for entry in (part.strip() for part in text.split(",")):
        found = [concept for concept in concepts if entry in (concept.role, concept.name)]
        if not found and entry not in ROLES:
            known = [*ROLES, *(concept.name for concept in concepts)]
            raise UsageError(
                f"--concepts: {entry!r} is no role and no concept of {pairs.path}{nearest(entry, known)}",
                expected="roles such as test and unseen, or names",
            )
        named += [concept for concept in found if concept not in named]
    seen = [concept.name for concept in named if concept.role in TRAINABLE]
    if seen:
        raise UsageError(
            f"--concepts: {seen[0]} is a training concept",
            expected="concepts that no training saw: val, test or unseen",
        )
    if not named:
        raise InputError(f"{pairs.path} has no concepts of {text}", fix="--concepts val, or other pairs")
    return tuple(named)


def steps_of(config: Config) -> tuple[int, ...]:
    """Return the updates after which every run is measured, ascending.

    Raises:
        UsageError: they are no such list.
    """
    try:
        steps = tuple(sorted({int(part) for part in config.at.split(",")}))
    except ValueError as error:
        raise UsageError(f"--at {config.at!r}", expected="numbers of updates, such as 0,10,20,50") from error
    if steps[0] < 0 or steps[-1] < 1:
        raise UsageError(f"--at {config.at!r}", expected="0 or more, and the last one above 0")
    return steps


def starts_of(config: Config) -> tuple[str, ...]:
    """Return the starts that are compared, in the order of the table; the one that all are held against is among them.

    Raises:
        UsageError: there is no such start.
    """
    if config.starts == "all":
        return tuple(STARTS)
    named = [part.strip() for part in config.starts.split(",")]
    for name in named:
        if name not in STARTS:
            raise UsageError(
                f"--starts: {name!r}{nearest(name, list(STARTS))}", expected=f"some of: {', '.join(STARTS)}"
            )
    return tuple(name for name in STARTS if name in (BASELINE, *named))


def seeds_of(config: Config) -> tuple[int, ...]:
    """Return the seeds."""
    return tuple(range(config.seed, config.seed + config.seeds))


def settings_of(config: Config) -> GanSettings:
    """Return how every run is trained, but for its seed."""
    return GanSettings(
        steps=steps_of(config)[-1],
        batch_size=config.batch_size,
        lr=config.lr,
        lr_discriminator=config.lr_discriminator,
        l1=config.l1,
        gan_from=config.gan_from,
        seed=config.seed,
    )


def oracle_settings(config: Config, sources: Sources) -> GanSettings:
    """Return how the collection's weights were trained, which is how an oracle that is missing there is made."""
    used = sources.collection.manifest.config
    steps = config.oracle_steps or int(used["steps"])
    names = ("batch_size", "lr", "lr_discriminator", "l1", "gan_from", "seed")
    return GanSettings(steps=steps, **{name: used[name] for name in names})


@dataclass(frozen=True)
class Run:
    """One concept fine-tuned from one start with one seed.

    Args:
        concept: The concept.
        start: A name of `STARTS`, or `pix2pix`.
        seed: Of the order of the data, and of the start.
    """

    concept: Concept
    start: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.concept.name}/{self.start}-{self.seed}"


def runs_of(config: Config, concepts: Sequence[Concept]) -> tuple[Run, ...]:
    """Return all runs; those of a generator from scratch have one seed, for the time that they take."""
    seeds = seeds_of(config)
    found = [Run(concept, start, seed) for concept in concepts for start in starts_of(config) for seed in seeds]
    if config.pix2pix:
        found += [Run(concept, PIX2PIX, seeds[0]) for concept in concepts]
    return tuple(found)


def updates_of(config: Config, sources: Sources) -> dict[str, Any]:
    """Return what there is to do, for `--dry-run`."""
    runs = runs_of(config, sources.concepts)
    tuned = sum(run.start != PIX2PIX for run in runs)
    oracles = missing_oracles(config, sources)
    return {
        "concepts": len(sources.concepts),
        "starts": list(starts_of(config)),
        "seeds": config.seeds,
        "runs": len(runs),
        "updates": tuned * steps_of(config)[-1],
        "oracle_updates": len(oracles) * oracle_settings(config, sources).steps,
        "pix2pix_updates": (len(runs) - tuned) * config.pix2pix,
    }


def missing_oracles(config: Config, sources: Sources) -> tuple[Concept, ...]:
    """Return the concepts whose own weights have to be trained first."""
    if "oracle" not in starts_of(config):
        return ()
    known = {concept.name for concept in sources.dataset.concepts}
    return tuple(concept for concept in sources.concepts if concept.name not in known)


def result_file(state: Path, run: Run) -> Path:
    """Return where the result of a run is kept."""
    return state / "runs" / f"{run.name}.json"


def picture_file(state: Path, run: Run) -> Path:
    """Return where what a run made of the first images is kept."""
    return state / "runs" / f"{run.name}.safetensors"


def pictured_places(images: int, count: int) -> list[int]:
    """Return which of the test images are drawn: evenly among all, for neighbours are crops of one photograph."""
    count = min(count, images)
    return [index * images // count for index in range(count)]


def image_count(sources: Sources) -> int:
    """Return how many pairs a run is measured on: those of the split `test`.

    Raises:
        InputError: there are none.
    """
    count = sources.images("test")
    if not count:
        raise InputError(f"{sources.pairs.file(SOURCES)} has no test images", expected="pairs with a test split")
    return count
