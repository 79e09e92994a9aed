"""Collect: the low-rank weights of every concept, all trained from one start on the base generator.

A concept is one atomic file; finished ones are never trained again. `--shard i/n` and `--only` make artifacts of their
own with a part of the concepts; the same command without them takes what these hold and trains the rest.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, section 4.1.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finectl.adapters.lora import LoraLayer, count_lora, lora_layers
from finectl.adapters.weight_dataset import CONFIG, INIT, KIND, concept_file
from finectl.artifacts.files import read_json_object, write_atomic, write_json
from finectl.artifacts.job import Job, Outcome, Stage
from finectl.artifacts.tensors import read_metadata, save_tensors
from finectl.data.concepts import FILE, Concept, write_concepts
from finectl.errors import ComputationError
from finectl.models.gan.io import load_generator_state, read_gan
from finectl.stages.gen_weights.collect.config import VERSION, Config, concepts_of, plan, reads
from finectl.stages.gen_weights.collect.parts import collection_of, take_parts
from finectl.training.gan.settings import gan_settings, last_checkpoints

if TYPE_CHECKING:
    from finectl.training.gan.adapting import Task
    from finectl.training.gan.workers import Work

SUBSET, START, LOSSES = "subset.json", "start.safetensors", "losses.jsonl"


def run(job: Job[Config]) -> Outcome:
    """Train what is neither here nor in a part that was made before, and gather everything."""
    from finectl.training.device import resolve_device

    start_s = time.monotonic()
    concepts = concepts_of(job.config, job.parents[1])
    layers = lora_layers(read_gan(job.parents[0]).generator, job.config.ranks or "")
    work = prepare(job, layers)
    taken = take_parts(job, concepts)
    if taken:
        job.console.note(f"{taken} concepts are taken from parts that were made before")
    missing = [concept for concept in concepts if not work.finished(concept.name)]
    processes = job.execution.workers or (1 if resolve_device(work.task.device).type != "cpu" else os.cpu_count() or 1)
    if missing:
        train_missing(job, work, missing, min(processes, len(missing)), start_s)
    return gather(job, work, concepts, layers)


def prepare(job: Job[Config], layers: tuple[LoraLayer, ...]) -> Work:
    """Draw the start that all concepts share, and choose the images."""
    from finectl.adapters.lora import initial_lora
    from finectl.training.gan.workers import Work

    base, config = job.parents[0], job.config
    start = job.state / START
    save_tensors(start, initial_lora(load_generator_state(base, config.weights), layers, config.lora_seed))
    task = task_of(job, layers, chosen_rows(job))
    return Work(task=task, start=start, directory=job.directory, state=job.state, execution=job.execution)


def chosen_rows(job: Job[Config]) -> tuple[int, ...]:
    """Return the training images: all, or the `--subset` that stands for them; it is chosen once."""
    from finectl.data.pairs import open_pairs
    from finectl.metrics.representatives import representative_pairs
    from finectl.training.device import resolve_device

    path = job.state / SUBSET
    if path.exists():
        return tuple(read_json_object(path)["rows"])
    config, device = job.config, resolve_device(job.execution.device)
    rows = representative_pairs(open_pairs(job.parents[1]), config.subset, config.seed, config.subset_clip, device)
    write_json(path, {"rows": rows.tolist()})
    return tuple(rows.tolist())


def task_of(job: Job[Config], layers: tuple[LoraLayer, ...], rows: tuple[int, ...]) -> Task:
    """Return what all concepts have in common."""
    from finectl.training.gan.adapting import Task

    settings = gan_settings(job.config)
    return Task(
        base=job.parents[0].path.absolute(),
        pairs=job.parents[1].path.absolute(),
        layers=layers,
        settings=settings,
        rows=rows,
        keep=last_checkpoints(settings.steps, job.config.checkpoints),
        orders=job.config.orders,
        device=job.execution.device,
        weights=job.config.weights,
    )


def train_missing(job: Job[Config], work: Work, missing: Sequence[Concept], processes: int, start_s: float) -> None:
    """Say what it costs, and train.

    Raises:
        Interrupted: a signal came, or `--max-time` is over; the same command goes on.
    """
    from finectl.artifacts.tensors import load_tensors
    from finectl.training.gan.adapting import Adapter
    from finectl.training.gan.workers import train_all

    step_s = Adapter(work.task).seconds_a_step(missing[0], load_tensors(work.start))
    updates = work.task.settings.steps * work.task.orders
    minutes = step_s * updates * len(missing) / processes / 60
    job.console.note(
        f"{len(missing)} concepts x {updates} updates of {1000 * step_s:.0f} ms, "
        f"{processes} at a time: about {minutes:.1f} minutes"
    )
    train_all(job, work, missing, processes, start_s, "l1")


def gather(job: Job[Config], work: Work, concepts: Sequence[Concept], layers: tuple[LoraLayer, ...]) -> Outcome:
    """Write what describes the collection beside the weights.

    Raises:
        ComputationError: every concept diverged.
    """
    config, base = job.config, job.parents[0]
    there = [concept for concept in concepts if (job.directory / concept_file(concept.name)).exists()]
    diverged = [concept.name for concept in concepts if concept not in there]
    if not there:
        reason = read_json_object(work.diverged(diverged[0]))["what"]
        raise ComputationError(
            f"every concept diverged; {diverged[0]}: {reason}",
            expected="finite losses",
            fix="run again with --no-resume and a smaller --lr",
        )
    shutil.copyfile(work.start, job.directory / INIT)
    write_concepts(job.directory / FILE, there)
    described = {
        "base": base.manifest.digest,
        "text": read_gan(base).text,
        "generator": read_gan(base).generator.to_dict(),
        "weights": config.weights,
        "ranks": config.ranks,
        "layers": [layer.to_dict() for layer in layers],
        "kept": list(work.task.keep) * config.orders,
        "rows": list(work.task.rows),
        "steps": config.steps,
    }
    write_json(job.directory / CONFIG, described)
    records = [read_metadata(job.directory / concept_file(concept.name)) for concept in there]
    lines = [json.dumps({"concept": c.name, **record}) for c, record in zip(there, records, strict=True)]
    write_atomic(job.directory / LOSSES, ("\n".join(lines) + "\n").encode())
    metrics = {
        "concepts": len(there),
        "diverged": diverged,
        "collection": collection_of(job),
        "weights": count_lora(layers),
        "checkpoints": config.checkpoints,
        **_means(records),
    }
    updates = len(there) * config.orders * (config.steps or 0)
    return Outcome(metrics=metrics, cost={"steps": updates, "samples": updates * (config.batch_size or 0)})


def _means(records: Sequence[Any]) -> dict[str, float]:
    """Return the mean held-out L1 over the concepts, at the start and at the end."""
    held = [record["losses"]["heldout_l1"] for record in records if "heldout_l1" in record["losses"]]
    if not held:
        return {}
    first, last = (sum(course[place][1] for course in held) / len(held) for place in (0, -1))
    return {"heldout_l1_at_start": first, "heldout_l1": last}


STAGE = Stage(
    name="gen-weights-collect",
    version=VERSION,
    makes=KIND,
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("pairs", "subset_clip"),
    unchanged_at={"orders": 1},
)
