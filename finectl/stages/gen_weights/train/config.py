"""What `finectl gen-weights train` is asked for, and what it would do: options, network, text encoder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.adapters.weight_dataset import LORA
from finectl.artifacts.job import InheritedData, Plan
from finectl.artifacts.store import Artifact
from finectl.diffusion.config import DiffusionConfig
from finectl.errors import InputError, UsageError
from finectl.models.text import describe_text
from finectl.models.text.hashed import NAME as HASH
from finectl.models.weights.config import (
    PREDICTIONS,
    WeightUNetConfig,
    coefficients_of,
    count_parameters,
    preset,
    require_basis,
)
from finectl.training.settings import TrainSettings
from finectl.training.weights.files import SPLITS, TRAIN, VAL, concepts_of, require_images
from finectl.training.weights.targets import Dataset, target


@dataclass(frozen=True)
class Config:
    """The options of `finectl gen-weights train`."""

    size: str
    rule: int
    block_size: int
    basis: str
    prediction: str
    beta_schedule: str
    loss: str
    image_weight: float
    image_concepts: int
    index_embed: str
    pos_embed: str
    text_input: str
    linear_rank: int
    linear_start: str | None
    t_min: int
    t_max: int
    t_star: int | None
    select: str
    text_encoder: str | None
    steps: int
    batch_size: int
    lr: float
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    clip_grad: float
    ema: float
    ema_power: float
    eval_every: int | None
    seed: int
    text_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check the options against the collection, and find its text encoder.

    Raises:
        UsageError: options contradict each other.
        InputError: no concept is there to train on, or the text encoder is missing.
    """
    found = target(parents[0], config.rule, config.block_size)
    dataset, layout = found.dataset, found.layout
    counts = {split: len(concepts_of(dataset.concepts, split)) for split in SPLITS}
    if not counts[TRAIN]:
        raise InputError(f"{parents[0].path} has no concept for training", fix="finectl gen-weights collect")
    if config.t_min >= config.t_max:
        raise UsageError(f"--t-min {config.t_min} --t-max {config.t_max}", expected="the first below the last")
    if config.linear_start == "ridge" and not config.linear_rank:
        raise UsageError("--linear-start ridge starts a path that --linear-rank 0 leaves out", fix="--linear-rank 64")
    if config.image_weight:
        require_lora_images(found.name, parents[0])
    text = text_of(config, dataset)
    basis = require_basis(config.basis, config.block_size)
    resolved = replace(
        config,
        basis=basis,
        linear_start=config.linear_start or ("ridge" if config.linear_rank else "zero"),
        text_encoder=str(text["name"]),
        text_digest=str(text["digest"]),
        eval_every=max(1, config.steps // 10) if config.eval_every is None else config.eval_every,
        select=config.select if counts[VAL] else "last",
    )
    prefix = "" if found.name == LORA else f"{found.name}-"
    network = network_of(resolved, found.network_blocks, int(text["width"]))
    data = InheritedData.of(parents[0])
    return Plan(
        resolved,
        slug=f"{prefix}{config.size}-{basis}-{config.prediction}-t{config.steps}",
        data=replace(data, text=text) if data else None,
        summary={
            "concepts": counts,
            "blocks": layout.blocks,
            "weights": layout.length,
            "padding": layout.padding,
            "parameters": count_parameters(network),
            "text_encoder": text,
        },
        notes=(
            f"training on {counts[TRAIN]} concepts: {layout.blocks} blocks of {config.block_size}, basis {basis}, "
            f"{config.steps} steps of {config.batch_size} blocks",
        ),
    )


def require_lora_images(target_name: str, collection: Artifact) -> None:
    """Check that there are images to learn from.

    Raises:
        UsageError: the collection is one of sigma, which makes no edited images.
        InputError: the base or the pairs of the collection are gone.
    """
    if target_name != LORA:
        raise UsageError(
            f"--image-weight goes with low-rank weights, and {collection.path} holds {target_name}",
            fix="--image-weight 0",
        )
    require_images(collection)


def text_of(config: Config, dataset: Dataset) -> dict[str, Any]:
    """Return the record of the text encoder: that of the option, else the one that the GAN was trained with.

    Raises:
        InputError: it is missing.
    """
    recorded = dataset.text or {}
    name = config.text_encoder or str(recorded.get("name", HASH))
    return describe_text(name, recorded.get("width") if name == recorded.get("name") else None)


def network_of(config: Config, blocks: int, text_width: int) -> WeightUNetConfig:
    """Return the network that the options describe."""
    return preset(
        config.size,
        blocks=blocks,
        length=coefficients_of(config.basis) or config.block_size,
        text_width=text_width,
        index_embed=config.index_embed,
        pos_embed=config.pos_embed,
        text_input=config.text_input,
        text_rank=min(config.linear_rank, text_width),
        diffusion=DiffusionConfig(beta_schedule=config.beta_schedule, prediction=PREDICTIONS[config.prediction]),
    )


def settings_of(config: Config) -> TrainSettings:
    """Return how the network is trained; checkpoints are kept to choose from."""
    names = [name for name in TrainSettings.__dataclass_fields__ if name in Config.__dataclass_fields__]
    kept = {"keep_every": config.eval_every} if config.select == "best" else {}
    return TrainSettings(**{**{name: getattr(config, name) for name in names}, **kept})
