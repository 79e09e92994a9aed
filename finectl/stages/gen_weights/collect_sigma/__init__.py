"""Collect, with `--target sigma`: sigma and biases of models that are tuned on many tasks, at several depths.

All start from one learngene, as `init --method fine` does, so that what they own can be generated from a task's text. A
task at a depth is one atomic file; finished ones are never tuned again, and parts go together as those of LoRAs do.

Reference: FINE, arXiv 2409.19289, section 3.3; the collection is ours, after arXiv 2407.11966, section 4.1.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from finectl.adapters.parts import take_parts
from finectl.adapters.sigma_dataset import SIGMA, task_name
from finectl.adapters.weight_dataset import CONFIG, INIT, concept_file
from finectl.artifacts.files import read_json_object, write_atomic, write_json
from finectl.artifacts.job import Job, Outcome, Reads, Stage
from finectl.artifacts.tensors import read_metadata, save_tensors, tensor_shapes
from finectl.data.concepts import FILE, Concept, write_concepts
from finectl.data.sources import DataInfo
from finectl.data.tasks import class_tasks
from finectl.errors import ComputationError
from finectl.models.io import read_dit_config
from finectl.models.learngene import CURVES, sigma_rule
from finectl.stages.gen_weights.collect_sigma.config import (
    DEPTH_SCALE,
    VERSION,
    Config,
    collection_of,
    items_of,
    parse_depths,
    plan,
    reading_of,
)
from finectl.training.gan.settings import last_checkpoints

if TYPE_CHECKING:
    from finectl.stages.gen_weights.collect_sigma.tuning import Item, SigmaWork

LOSSES, MODELS = "losses.jsonl", "models.json"


def run(job: Job[Config]) -> Outcome:
    """Tune what is neither here nor in a part that was made before, and gather everything."""
    from finectl.stages.gen_weights.collect_sigma.tuning import Item
    from finectl.training.device import resolve_device
    from finectl.training.gan.workers import train_all

    start_s, config, data = time.monotonic(), job.config, cast(DataInfo, job.data)
    every = class_tasks(data, config.tasks, config.task_classes, config.seed)
    items = [Item(task, depth) for task, depth in items_of(config, every)]
    # A staging directory without any state is taken for one in which nothing was done.
    write_json(job.state / MODELS, {"models": [item.name for item in items]})
    taken = take_parts(job, collection_of(job), [item.name for item in items])
    if taken:
        job.console.note(f"{taken} models are taken from parts that were made before")
    work = work_of(job)
    missing = [item for item in items if not work.finished(item.name)]
    on_cpu = resolve_device(job.execution.device).type == "cpu"
    processes = job.execution.workers or (os.cpu_count() or 1 if on_cpu else 1)
    if missing:
        train_all(job, work, missing, min(processes, len(missing)), start_s, "heldout_loss")
    return gather(job, work, every, items)


def work_of(job: Job[Config]) -> SigmaWork:
    """Return what all models have in common."""
    from finectl.stages.gen_weights.collect_sigma.tuning import SigmaWork, Tuning

    config = job.config
    _, fields = reading_of(config, job.parents[0])
    tuning = Tuning(
        **fields,
        sigma=sigma_rule(job.parents[0].manifest),
        depth_scale=DEPTH_SCALE,
        tune_steps=config.steps or 0,
        tune_lr=config.lr or 0.0,
        batch_size=config.batch_size or 0,
        seed=config.seed,
    )
    keep = last_checkpoints(tuning.tune_steps, config.checkpoints)
    return SigmaWork(
        learngene=job.parents[0].path.absolute(),
        tuning=tuning,
        keep=keep,
        directory=job.directory,
        state=job.state,
        execution=job.execution,
    )


def gather(job: Job[Config], work: SigmaWork, every: Sequence[Concept], items: Sequence[Item]) -> Outcome:
    """Write what describes the collection beside the values: the tasks that are there at all their depths.

    Raises:
        ComputationError: every task diverged at one depth at least.
    """
    config, learngene = job.config, job.parents[0]
    depths = parse_depths(config.depths)
    mine = {item.name for item in items}
    there = {item.name for item in items if (job.directory / concept_file(item.name)).exists()}
    diverged = [item.name for item in items if item.name not in there]
    # A part has some depths of a task; in a whole collection each task has all of them.
    tasks = [
        task
        for task in every
        if (wanted := [name for depth in depths if (name := task_name(task.name, depth)) in mine])
        and there.issuperset(wanted)
    ]
    if not tasks:
        reason = read_json_object(work.diverged(diverged[0]))["what"]
        raise ComputationError(
            f"every task diverged; {diverged[0]}: {reason}",
            expected="finite losses",
            fix="run again with --no-resume and a smaller --lr",
        )
    write_starts(job, work, depths)
    write_concepts(job.directory / FILE, tasks)
    described = {
        "target": SIGMA,
        "base": learngene.manifest.digest,
        "source": read_dit_config(learngene).to_dict(),
        "shapes": {name: shape[1:] for name, shape in tensor_shapes(learngene.file(CURVES)).items()},
        "depths": list(depths),
        "sigma": work.tuning.sigma,
        "depth_scale": work.tuning.depth_scale,
        "kept": list(work.keep),
        "tuning": {name: value for name, value in asdict(work.tuning).items() if name != "data"},
    }
    write_json(job.directory / CONFIG, json.loads(json.dumps(described)))
    found: list[tuple[str, Any]] = [
        (item.name, read_metadata(job.directory / concept_file(item.name))) for item in items if item.name in there
    ]
    lines = [json.dumps({"task": name, **record}) for name, record in found]
    write_atomic(job.directory / LOSSES, ("\n".join(lines) + "\n").encode())
    first, last = (sum(record["heldout_loss"][place] for _, record in found) / len(found) for place in (0, 1))
    metrics = {
        "target": SIGMA,
        "tasks": len(tasks),
        "models": len(there),
        "diverged": diverged,
        "collection": collection_of(job),
        "heldout_loss": {"first": first, "last": last},
    }
    job.console.note(f"{len(there)} models: mean held-out loss {first:.4f} -> {last:.4f}")
    updates = len(there) * work.tuning.tune_steps
    return Outcome(metrics=metrics, cost={"steps": updates, "samples": updates * work.tuning.batch_size})


def write_starts(job: Job[Config], work: SigmaWork, depths: Sequence[int]) -> None:
    """Write where tuning started at each depth."""
    from finectl.initializers.expansion import curves_at

    learngene, starts = work.opened(), {}
    for depth in depths:
        placed = curves_at(learngene, depth, work.tuning.sigma, work.tuning.depth_scale)
        starts.update({f"l{depth}.{name}": value for name, value in placed.items()})
    save_tensors(job.directory / INIT, starts)


STAGE = Stage(
    name="gen-weights-collect",
    version=VERSION,
    makes="weight-dataset",
    config=Config,
    reads=lambda config: Reads("learngene", ("learngene",)),
    plan=plan,
    run=run,
)
