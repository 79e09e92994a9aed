"""Report: do generated weights help, and more than what costs nothing?

Held-out concepts are fine-tuned from every start, with the same data in the same order, rate, updates and
discriminator: from the base (LoRA start, and E2GAN's start, a control with the same budget), from the mean, the nearest
and a noised training LoRA, from a regression, from the prediction, from the prediction for another prompt, and from
the concept's own weights.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, section 5 and tables 1 and 4; the controls are ours.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.adapters.weight_dataset import INIT, concept_file
from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.errors import ComputationError
from finectl.metrics.representatives import subset_clip_digest
from finectl.metrics.starts import TunedRun, run_from
from finectl.stages.gen_weights.report.config import (
    OPTIONS,
    Config,
    Run,
    Sources,
    image_count,
    missing_oracles,
    oracle_settings,
    result_file,
    runs_of,
    seeds_of,
    settings_of,
    steps_of,
    updates_of,
)

if TYPE_CHECKING:
    from finectl.metrics.features import ExtractorInfo
    from finectl.stages.gen_weights.report.runs import Comparison
    from finectl.training.gan.adapting import Task

ROWS = "rows.json"
NO_CONCEPT = "a concept diverged while its own weights were trained, and is left out of the report"


def reads(config: Config) -> Reads:
    """Return what is read: a generator of weights; what it was made from is found by itself, or named."""
    named = {"weight-dataset": config.collection, "gan": config.base, "pairs": config.pairs}
    also = tuple(Reads(kind, (kind,), named=(name,)) for kind, name in named.items() if name)
    return Reads("generator", ("weight-generator",), also=also)


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Find what is compared, and count the work.

    Raises:
        UsageError: there is no such start or concept, or the numbers of updates are none.
        InputError: something that the generator was made from is gone.
    """
    sources = Sources.of(config, parents)
    inception = inception_of(config)
    resolved = replace(
        config,
        at=",".join(map(str, steps_of(config))),
        inception_digest=inception.digest if inception else "",
        subset_clip_digest=subset_clip_digest(config.subset, config.subset_clip),
    )
    work = updates_of(config, sources)
    image_count(sources)
    return Plan(
        resolved,
        slug=f"starts-{len(sources.concepts)}x{config.seeds}",
        data=InheritedData.of(parents[0]),
        summary=work,
        notes=(
            f"{work['runs']} runs on {work['concepts']} concepts: {work['updates']:,} updates, and "
            f"{work['oracle_updates']:,} for the concepts' own weights",
        ),
    )


def inception_of(config: Config) -> ExtractorInfo | None:
    """Return the network of clean FID, where its file is."""
    from finectl.metrics.pairs.inception import find_inception

    return find_inception(config.inception)


def run(job: Job[Config]) -> Outcome:
    """Make the concepts' own weights where they are missing, then all runs, then the comparison."""
    from finectl.metrics.pairs.measure import metrics_for
    from finectl.stages.gen_weights.report.write import write_report

    start_s = time.monotonic()
    sources = Sources.of(job.config, job.parents)
    inception = inception_of(job.config)
    metrics = metrics_for(image_count(sources), sources.image_size, inception)
    work = comparison(job, sources, metrics, inception)
    left_out = make_oracles(job, sources, work, start_s)
    runs = [one for one in runs_of(job.config, sources.concepts) if one.concept.name not in left_out]
    missing = [one for one in runs if not result_file(job.state, one).exists()]
    share(job, work, missing, start_s, "comparing", "run")
    done = [read_run(job, one) for one in runs]
    said = write_report(job, sources, done, metrics)
    if left_out:
        job.console.note(f"{', '.join(left_out)}: {NO_CONCEPT}")
    tuned = sum(max(run.values["l1"], default=0) for run in done)
    seconds = sum(run.tuning_s for run in done)
    found = {**said, "metrics": list(metrics), "diverged": left_out}
    return Outcome(metrics=json.loads(json.dumps(found)), cost={"steps": tuned, "tuning_s": round(seconds, 1)})


def comparison(
    job: Job[Config], sources: Sources, metrics: tuple[str, ...], inception: ExtractorInfo | None
) -> Comparison:
    """Return what all runs have in common."""
    from finectl.stages.gen_weights.report.runs import Comparison

    return Comparison(
        task=task_of(job, sources),
        start=sources.collection.file(INIT).absolute(),
        directory=job.directory,
        state=job.state,
        execution=job.execution,
        generator=sources.generator.path.absolute(),
        collection=sources.collection.path.absolute(),
        concepts=sources.concepts,
        at=steps_of(job.config),
        metrics=metrics,
        inception=inception,
        pictured=seeds_of(job.config)[0],
        pictures=job.config.pictures,
        pix2pix=job.config.pix2pix,
    )


def task_of(job: Job[Config], sources: Sources) -> Task:
    """Return base, images, adapters and rates."""
    from finectl.training.gan.adapting import Task

    return Task(
        base=sources.base.path.absolute(),
        pairs=sources.pairs.path.absolute(),
        layers=sources.dataset.layers,
        settings=settings_of(job.config),
        rows=chosen_rows(job, sources),
        device=job.execution.device,
        weights=str(sources.dataset.config["weights"]),
    )


def chosen_rows(job: Job[Config], sources: Sources) -> tuple[int, ...]:
    """Return the training images: `--subset` of them that stand for all, chosen once."""
    from finectl.data.pairs import open_pairs
    from finectl.metrics.representatives import representative_pairs
    from finectl.training.device import resolve_device

    path = job.state / ROWS
    if not path.exists():
        config, device = job.config, resolve_device(job.execution.device)
        rows = representative_pairs(open_pairs(sources.pairs), config.subset, config.seed, config.subset_clip, device)
        write_json(path, {"rows": rows.tolist()})
    return tuple(read_json_object(path)["rows"])


def make_oracles(job: Job[Config], sources: Sources, work: Comparison, start_s: float) -> list[str]:
    """Train the concepts' own weights as the collection's were, and return the concepts that diverged."""
    from finectl.training.gan.settings import last_checkpoints
    from finectl.training.gan.workers import Work

    wanted = missing_oracles(job.config, sources)
    settings = oracle_settings(job.config, sources)
    keep = last_checkpoints(settings.steps, min(len({*sources.dataset.kept}), max(1, settings.steps // 5)))
    rows = tuple(int(row) for row in sources.dataset.config["rows"])
    task = replace(work.task, settings=settings, keep=keep, rows=rows)
    oracles = Work(
        task=task,
        start=work.start,
        directory=job.state,
        state=job.state / "oracles",
        execution=job.execution,
    )
    missing = [concept for concept in wanted if not oracles.finished(concept.name)]
    oracles.state.mkdir(exist_ok=True)
    share(job, oracles, missing, start_s, "training the concepts' own weights", "concept")
    return [concept.name for concept in wanted if not (job.state / concept_file(concept.name)).exists()]


def share(job: Job[Config], work: Any, items: Sequence[Any], start_s: float, stage: str, unit: str) -> None:
    """Do pieces of work in as many processes as the options say.

    Raises:
        Interrupted: a signal came, or `--max-time` is over; the same command goes on.
    """
    from finectl.training.device import resolve_device
    from finectl.training.gan.workers import train_all

    if items:
        device = resolve_device(job.execution.device)
        processes = job.execution.workers or (os.cpu_count() or 1 if device.type == "cpu" else 1)
        train_all(job, work, items, min(len(items), processes), start_s, "l1", stage=stage, unit=unit)


def read_run(job: Job[Config], one: Run) -> TunedRun:
    """Read the result of a run.

    Raises:
        ComputationError: it is not there.
    """
    path = result_file(job.state, one)
    if not path.exists():
        raise ComputationError(f"the run {one.name} has left no result", fix="run the same command again")
    return run_from(read_json_object(path))


STAGE = Stage(
    name="gen-weights-report",
    version=1,
    makes="evaluation",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=(*(option[2:] for option in OPTIONS.values()), "inception", "subset_clip"),
)
