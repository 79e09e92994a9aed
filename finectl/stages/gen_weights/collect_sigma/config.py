"""The options of `finectl gen-weights collect --target sigma`, and the models that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from finectl.adapters.parts import parse_shard
from finectl.adapters.sigma_dataset import task_name
from finectl.adapters.weight_dataset import KIND, SHARD_KIND
from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Job, Plan
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.concepts import ROLES, Concept
from finectl.data.sources import DataInfo, split_classes
from finectl.data.tasks import class_tasks
from finectl.errors import InputError, UsageError
from finectl.initializers import PAPER_TUNE_STEPS, SMALL_TUNE_STEPS
from finectl.models.io import read_dit_config
from finectl.models.learngene import CURVES, require_condensed_by
from finectl.registry import nearest
from finectl.training.gan.settings import last_checkpoints
from finectl.training.settings import PAPER, SMALL, DataFields, resolve_data

VERSION = 1
DEPTH_SCALE = 0.75
"""That of `init`."""
LR = 1e-2
CHECKPOINTS = 3
WHICH = ("data", "tasks", "task_classes", "depths", "roles", "only", "shard")
"""Options that say which models are tuned, not how; the data counts by its fingerprint."""


@dataclass(frozen=True)
class Config:
    """The options."""

    target: str
    data: str | None
    tasks: int
    task_classes: int
    depths: str
    roles: str
    only: str | None
    shard: str | None
    checkpoints: int
    steps: int | None
    batch_size: int | None
    lr: float | None
    seed: int


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Draw the tasks, and count what tuning them costs.

    Raises:
        UsageError: there are no such tasks, roles, shards or depths, or not so many checkpoints.
        InputError: the learngene was not made by FINE, or the data set is missing.
    """
    learngene = parents[0]
    require_condensed_by(learngene, "fine")
    data, fields = reading_of(config, learngene)
    if data.whole:
        fix = f"--data {split_classes(data.name)[0]}"
        raise UsageError(
            f"{data.name} are some classes, and tasks are drawn among all", expected="a whole set", fix=fix
        )
    if data.num_classes < 2:
        raise InputError(f"{data.name} has no classes, and tasks are some of them", expected="a set with labels")
    usual = SMALL if data.bundled else PAPER
    steps = SMALL_TUNE_STEPS if data.bundled else PAPER_TUNE_STEPS
    resolved = replace(
        config,
        data=fields["data"],
        depths=",".join(map(str, parse_depths(config.depths))),
        steps=config.steps or steps,
        batch_size=config.batch_size or int(usual["batch_size"]),
        lr=LR if config.lr is None else config.lr,
    )
    last_checkpoints(resolved.steps or 0, config.checkpoints)
    every = class_tasks(data, config.tasks, config.task_classes, config.seed)
    items = items_of(resolved, every)
    part = f"-{config.only}" if config.only else f"-{config.shard}".replace("/", "of") if config.shard else ""
    updates = len(items) * (resolved.steps or 0)
    weights = sum(_numbers(shape[1:]) for shape in tensor_shapes(learngene.file(CURVES)).values())
    layers = sum(depth for _, depth in items)
    return Plan(
        resolved,
        slug=f"sigma-{learngene.name.rsplit('-', 1)[0]}-{len(items)}{part}",
        data=data,
        makes=SHARD_KIND if part else KIND,
        summary={
            "tasks": {role: sum(task.role == role for task in every) for role in ("train", "val", "test")},
            "models": len(items),
            "updates": updates,
            "weights_a_layer": weights,
            "disk_bytes": 4 * weights * layers * config.checkpoints,
        },
        notes=(
            f"{len(items)} models of {len({task.name for task, _ in items})} tasks at depths {resolved.depths}, "
            f"{resolved.steps} updates each of {weights:,} numbers a layer: {updates:,} updates in all",
        ),
    )


def reading_of(config: Config, learngene: Artifact) -> tuple[DataInfo, dict[str, Any]]:
    """Return the data set, and how it is read: that of the learngene where none is named.

    Raises:
        InputError: it is missing, empty or corrupt.
    """
    given = DataFields(config.data, None, None, None)
    size = read_dit_config(learngene).image_size
    return resolve_data(given, (learngene,), size if config.data is None else None)


def _numbers(shape: Sequence[int]) -> int:
    total = 1
    for side in shape:
        total *= int(side)
    return total


def parse_depths(text: str) -> tuple[int, ...]:
    """Return the depths of `--depths`, each once and in ascending order.

    Raises:
        UsageError: it is no list of positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--depths {text!r} is no list of depths", expected="positive integers such as 2,4,6")
    return tuple(sorted({int(part) for part in parts}))


def items_of(config: Config, every: Sequence[Concept]) -> list[tuple[Concept, int]]:
    """Return the models of `--roles`, or the part of them that `--shard` or `--only` names: task and depth.

    Raises:
        UsageError: there is no such role, shard, task or depth.
    """
    roles = [role.strip() for role in config.roles.split(",")]
    for role in roles:
        if role not in ROLES:
            raise UsageError(
                f"unknown role {role!r}{nearest(role, list(ROLES))}", expected=f"some of: {', '.join(ROLES)}"
            )
    if config.only is not None and config.shard is not None:
        raise UsageError("--only and --shard are both given", expected="one of them")
    depths = parse_depths(config.depths)
    models = [(task, depth) for task in every for depth in depths]
    if config.only is not None:
        found = [(task, depth) for task, depth in models if config.only in (task.name, task_name(task.name, depth))]
        if not found:
            names = [task.name for task in every]
            raise UsageError(
                f"there is no task {config.only!r}{nearest(config.only, names)}",
                expected=f"one of: {', '.join(names)}; with -l{depths[0]} behind it, at that depth alone",
            )
        return found
    models = [(task, depth) for task, depth in models if task.role in roles]
    if config.shard is not None:
        number, count = parse_shard(config.shard)
        models = models[number - 1 :: count]
    if not models:
        raise UsageError(f"there are no tasks of the roles {config.roles}", fix="other --roles or --shard")
    return models


def collection_of(job: Job[Config]) -> str:
    """Return the hash of all that decides the values of a model: equal in all parts of a collection."""
    config: dict[str, Any] = asdict(job.config)
    for name in WHICH:  # a task at a depth is the same among more tasks and depths
        del config[name]
    data, fields = reading_of(job.config, job.parents[0])
    read = [data.fingerprint, fields["image_size"], fields["resize_filter"]]
    return sha256_json([VERSION, config, DEPTH_SCALE, read, *(parent.manifest.digest for parent in job.parents)])
