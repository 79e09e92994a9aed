"""The options of `finectl gen-weights collect`, and what they come to: concepts, adapters and their cost. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.adapters.lora import RANKS_854, count_lora, lora_layers
from finectl.adapters.parts import parse_shard
from finectl.adapters.weight_dataset import KIND, SHARD_KIND
from finectl.artifacts.job import InheritedData, Plan, Reads
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.concepts import ROLES, Concept, read_concepts
from finectl.data.pairs import IMAGES, INDEX, SOURCES, read_index
from finectl.errors import InputError, UsageError
from finectl.metrics.representatives import subset_clip_digest
from finectl.models.gan.io import GanConfig, read_gan
from finectl.models.text import find_recorded_text
from finectl.registry import nearest
from finectl.training.gan.settings import GanFields, describe_gan, gan_settings, last_checkpoints, resolve_gan

VERSION = 1
SMALL: dict[str, Any] = {"steps": 150, "batch_size": 16, "lr": 5e-3, "lr_discriminator": 2e-4, "gan_from": 2 / 3}
PAPER: dict[str, Any] = {"epochs": 100, "batch_size": 16, "lr": 2e-4, "lr_discriminator": 2e-4, "gan_from": 0.0}
RANKS = {"nano": "2", "e2gan": RANKS_854}
BYTES = 4


@dataclass(frozen=True)
class Config(GanFields):
    """The options of `finectl gen-weights collect`."""

    pairs: str | None
    weights: str
    ranks: str | None
    lora_seed: int
    checkpoints: int
    orders: int
    subset: int
    subset_clip: str | None
    roles: str
    only: str | None
    shard: str | None
    subset_clip_digest: str = ""


def reads(config: Config) -> Reads:
    """Return what is read: a base GAN, and pairs."""
    named = (config.pairs,) if config.pairs else ()
    return Reads("base", ("gan",), also=(Reads("pairs", ("pairs",), named=named),))


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Choose concepts and adapters, and count what they cost.

    Raises:
        UsageError: there are no such ranks, roles, shards or concepts, or not so many checkpoints.
        InputError: the pairs do not fit the base, or its text encoder is gone.
    """
    base, pairs = parents
    gan, concepts = read_gan(base), concepts_of(config, pairs)
    require_pairs(base, gan, pairs)
    if gan.text is not None:
        find_recorded_text(gan.text, str(base.path))
    count = sum(source.split == "train" for source in read_index(pairs.file(INDEX)))
    count = min(count, config.subset) if config.subset else count
    ranks = config.ranks or RANKS.get(gan.preset, "4")
    layers = lora_layers(gan.generator, ranks)
    digest = subset_clip_digest(config.subset, config.subset_clip)
    resolved = replace(config, ranks=ranks, subset_clip_digest=digest)
    resolved = replace(resolved, **resolve_gan(config, count, SMALL if gan.preset == "nano" else PAPER))
    settings = gan_settings(resolved)
    last_checkpoints(settings.steps, config.checkpoints)
    part = f"-{config.only}" if config.only else f"-{config.shard}".replace("/", "of") if config.shard else ""
    weights, updates = count_lora(layers), len(concepts) * config.orders * settings.steps
    orders = f", {config.orders} orders of the data" if config.orders > 1 else ""
    return Plan(
        resolved,
        slug=f"{base.name.rsplit('-', 1)[0]}-{len(concepts)}{part}",
        data=InheritedData.of(pairs),
        makes=SHARD_KIND if part else KIND,
        summary={
            "concepts": len(concepts),
            "training_pairs": count,
            "updates": updates,
            "weights": weights,
            "disk_bytes": BYTES * weights * (1 + config.checkpoints * config.orders * len(concepts)),
        },
        notes=(
            f"{len(concepts)} concepts of {weights:,} weights, {count} pairs each: {describe_gan(settings)}{orders}; "
            f"{updates:,} updates in all",
        ),
    )


def concepts_of(config: Config, pairs: Artifact) -> tuple[Concept, ...]:
    """Return the concepts of `--roles`, or the part of them that `--shard` or `--only` names.

    Raises:
        UsageError: there is no such role, shard or concept.
    """
    roles = [role.strip() for role in config.roles.split(",")]
    for role in roles:
        if role not in ROLES:
            raise UsageError(
                f"unknown role {role!r}{nearest(role, list(ROLES))}", expected=f"some of: {', '.join(ROLES)}"
            )
    concepts = read_concepts(pairs)
    if config.only is not None and config.shard is not None:
        raise UsageError("--only and --shard are both given", expected="one of them")
    if config.only is not None:
        found = tuple(concept for concept in concepts if concept.name == config.only)
        if not found:
            names = [concept.name for concept in concepts]
            raise UsageError(f"{pairs.path} has no concept {config.only!r}{nearest(config.only, names)}")
        return found
    chosen = tuple(concept for concept in concepts if concept.role in roles)
    if config.shard is not None:
        number, count = parse_shard(config.shard)
        chosen = chosen[number - 1 :: count]
    if not chosen:
        raise UsageError(f"{pairs.path} has no concepts of the roles {config.roles}", fix="other --roles or --shard")
    return chosen


def require_pairs(base: Artifact, gan: GanConfig, pairs: Artifact) -> None:
    """Check that a generator works on the images of these pairs.

    Raises:
        InputError: the images are of another size.
    """
    size = tensor_shapes(pairs.file(SOURCES))[IMAGES][-1]
    if size != gan.generator.image_size:
        raise InputError(
            f"{pairs.path} has images of {size} pixels",
            expected=f"images of {gan.generator.image_size} pixels, as {base.path} was trained on",
            fix="--pairs with the pairs that the base was trained on",
        )
