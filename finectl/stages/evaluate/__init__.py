"""Evaluate: models and images measured in the same way, in one table.

Every model sees the same held-out images with the same noise, and starts its samples from the same noise, so two
values differ by the models alone. Values whose protocol differs are kept apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import read_json_object, sha256_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.manifest import Manifest
from finectl.artifacts.store import Artifact
from finectl.errors import ComputationError, InputError, UsageError
from finectl.metrics import METRICS
from finectl.metrics.report import row_names
from finectl.stages.evaluate.config import MADE, Condition, Config
from finectl.stages.evaluate.setup import Setup, extractor_key, needs_reference
from finectl.stages.evaluate.subjects import Subject, describe, drawn, list_subjects, logged_losses
from finectl.training.pretrained import LOCATIONS, UNCHANGED, pretrained_reads, resolve_pretrained, split_pretrained
from finectl.training.text_settings import unchanged

if TYPE_CHECKING:
    from finectl.metrics.measure import Against
    from finectl.metrics.sources import Source
    from finectl.stages.evaluate.work import Work


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check that everything that is to be measured can be, and hash the networks and the reference.

    Raises:
        UsageError: the options contradict each other, or a metric is not possible with them.
        InputError: a file, a data set or an artifact is missing, damaged, or does not fit.
    """
    parents, pretrained = split_pretrained(config, parents)
    setup = Setup.of(config, parents)
    models = [parent for parent in parents if parent.kind not in MADE]
    second = resolve_pretrained(config, models, pretrained, config.guidance)
    if config.fail_if is not None:
        Condition.parse("--fail-if", config.fail_if, setup.metrics)
    require_reachable(config, setup.metrics, parents)
    reference, files = setup.reference, setup.files
    resolved = replace(
        config,
        **setup.fields,
        **second,
        metrics=",".join(setup.metrics),
        vae=setup.vae["name"] if setup.vae else None,
        vae_digest=setup.vae["digest"] if setup.vae else "",
        labels=",".join(map(str, setup.labels)) if setup.labels else None,
        extractors_digest=",".join(f"{key}:{info.digest}" for key, info in sorted(setup.networks.items())),
        reference_digest=f"{reference.part}:{reference.fingerprint}" if reference else "",
        images_digest=f"{files.fingerprint}{files.prompts_digest}" if files else "",
    )
    sampled = any(METRICS[name].sampled for name in setup.metrics)
    slug = "images" if not parents else f"{len(parents)}-models"
    return Plan(
        resolved,
        slug=parents[0].name.rsplit("-", 1)[0] if len(parents) == 1 else slug,
        data=setup.data or (InheritedData.of(parents[0]) if parents else None),
        summary={
            "models": len(models),
            "images_to_sample": config.samples * len(models) * sampled,
            "reference": reference.name if reference else None,
            "reference_images": reference.count if reference else None,
        },
        notes=setup.notes,
    )


def require_reachable(config: Config, metrics: Sequence[str], parents: Sequence[Artifact]) -> None:
    """Check that `--reach` asks for something that checkpoints can show.

    Raises:
        UsageError: there are no checkpoints to look at, it names no model, or it asks for a metric to become worse.
    """
    if config.reach is None:
        return
    if not config.steps_every:
        raise UsageError(f"--reach {config.reach} is seen in checkpoints", fix="add --steps-every N")
    if config.reach in row_names([parent.name for parent in parents]):
        return
    condition = Condition.parse("--reach", config.reach, metrics)
    better = METRICS[condition.metric].better
    if (better == "lower") != condition.comparison.startswith("<"):
        raise UsageError(
            f"--reach {config.reach}: of {condition.metric} {better} is better",
            fix=f"--reach '{condition.metric}{'<' if better == 'lower' else '>'}{condition.bound:g}'",
        )


def run(job: Job[Config]) -> Outcome:
    """Measure every row, then write and print the comparison."""
    from finectl.stages.evaluate.report import write_report
    from finectl.stages.evaluate.work import Work

    parents, pretrained = split_pretrained(job.config, job.parents)
    setup = Setup.of(job.config, parents)
    subjects = list_subjects(job.workspace, job.config, parents)
    with Work.opened(job, setup, pretrained) as work:
        work.require_enough(subjects)
        sampled = bool(setup.extractors) or any(METRICS[name].paired for name in setup.metrics)
        each = setup.files.count if setup.files else job.config.samples
        images = (each * len(subjects) * sampled + work.reference.images_to_measure) // job.world.size
        images += len(work.heldout or ()) * sum(one.is_model for one in subjects)
        with job.console.progress("measuring", images, unit="image") as progress:
            work.reference.measure(progress)
            sources = [work.measure(number, subject, progress) for number, subject in enumerate(subjects)]
        job.world.barrier()
        if not job.world.leads:
            return Outcome()
        against = work.reference.fit()
        rows = [
            {**describe(job.workspace, one), **values(work, number, one, source, against)}
            for number, (one, source) in enumerate(zip(subjects, sources, strict=True))
        ]
        logs = {
            one.name: logged_losses(job.workspace, one.artifact)
            for one in subjects
            if one.artifact is not None and one.is_model and one.checkpoint is None
        }
        firsts = {one.name: work.preview(number) for number, one in enumerate(subjects) if one.checkpoint is None}
        write_report(job, rows, logs, {name: levels for name, levels in firsts.items() if levels is not None})
    generated = sum(source.count for one, source in zip(subjects, sources, strict=True) if source and one.is_model)
    return Outcome(metrics={"models": rows}, cost={"samples": generated})


def values(
    work: Work, number: int, subject: Subject, source: Source | None, against: Against
) -> dict[str, dict[str, Any]]:
    """Return the metrics of one row: value, interval, n, and the protocol that makes it comparable."""
    from finectl.metrics.measure import Rows, measure, protocol

    setup, config = work.setup, work.job.config
    found: dict[str, dict[str, Any]] = {}
    if "loss" in setup.metrics and subject.is_model:
        found["loss"] = loss_record(work, number, subject)
    names = [name for name in setup.metrics if METRICS[name].sampled]
    if not names or source is None:
        return found
    rows = Rows.of(work.chunks(number, subject, source).load())
    for name in names:
        measured = measure(name, extractor_key(name, setup.options), rows, against, config.seed)
        compared = setup.reference if needs_reference(name) else None
        size = {"image_size": setup.shape[1] if setup.shape else "as stored"}
        same = protocol(
            setup.network_of(name), setup.options.dtype, rows.count, compared.protocol() if compared else size
        )
        if (labels := drawn(config, subject)) is not None:
            same["labels"] = labels
        if name == "clip-score":
            same["prompts_digest"] = sha256_json(list(source.prompts() or ()))
        found[name] = {**measured.record(), "n": rows.count, "protocol": same}
    if subject.is_model:
        found["sampling"] = {
            key: getattr(config, key) for key in ("scheduler", "sampling_steps", "guidance", "seed", "weights")
        }
        if work.pretrained is not None:
            role = "domain_guidance" if config.fraction is None else "handover"
            found["sampling"] |= {role: work.pretrained.manifest.digest, "fraction": config.fraction}
    return found


def loss_record(work: Work, number: int, subject: Subject) -> dict[str, Any]:
    """Return the held-out loss of a row with all that decides it beside the model."""
    from finectl.models.io import read_config

    summary, config, data = read_json_object(work.loss_file(number)), work.job.config, work.setup.data
    if subject.artifact is None or data is None:
        raise InputError(f"{subject.name} has no model")
    diffusion = read_config(subject.artifact).diffusion
    same = {
        "n": summary["images"],
        "draws": config.draws,
        "seed": config.seed,
        "data": f"{data.name}/heldout",
        "data_fingerprint": data.fingerprint,
        "image_size": data.image_size,
        "resize_filter": data.resize_filter,
        "weights": config.weights,
        "prediction": diffusion.prediction,
        "noise_schedule": sha256_json(diffusion.to_dict()),
        **({"text_encoder": config.text_digest} if config.text_digest else {}),
    }
    return {**summary, "n": summary["images"], "protocol": same}


def verdict(config: Config, manifest: Manifest) -> ComputationError | None:
    """Return the error of `--fail-if` when a row meets its condition."""
    if config.fail_if is None:
        return None
    condition = Condition.parse("--fail-if", config.fail_if, (config.metrics or "").split(","))
    for row in manifest.metrics["models"]:
        if condition.metric in row and condition.holds(row[condition.metric]["value"]):
            value = row[condition.metric]["value"]
            return ComputationError(f"--fail-if {config.fail_if}: {row['name']} has {condition.metric} {value:.6g}")
    return None


def printed(config: Config, artifact: Artifact) -> str | None:
    """Return the table in the format that `--format` names."""
    return artifact.file(f"table.{config.format}").read_bytes().decode() if config.format else None


STAGE = Stage(
    name="evaluate",
    version=2,
    makes="evaluation",
    config=Config,
    reads=lambda config: (
        None
        if config.images
        else Reads(
            "model",
            ("model", "condensed", "experts", "expert", *MADE),
            many=True,
            also=pretrained_reads(config),
        )
    ),
    plan=plan,
    run=run,
    verdict=verdict,
    locations=(
        *("data", "vae", "reference", "images", "inception", "clip", "dino", "lpips", "features_weights"),
        *("text_encoder", *LOCATIONS),
    ),
    unchanged_at={**unchanged("text_digest"), "labels": None, **UNCHANGED},
    presentation=("format", "fail_if"),
    prints=printed,
    shares_work=True,
)
