"""Evaluate: one or several models measured in the same way, in one table.

Every model sees the same held-out images with the same noise, and starts its samples from the same noise, so two
values differ by the models alone.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.lineage import model_chain, total_cost, trace
from finectl.artifacts.manifest import Manifest
from finectl.artifacts.store import Artifact
from finectl.console import format_table
from finectl.errors import ComputationError, UsageError
from finectl.metrics import METRICS, SAMPLE_METRICS
from finectl.models.io import load_model, read_config, require_class_conditional, require_null_class, total_parameters
from finectl.training.log import NAME as LOG
from finectl.training.log import read_log
from finectl.training.settings import DataFields, data_options, require_fit, resolve_data

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.data.dataset import ImageSet
    from finectl.metrics.generated import GeneratedMetrics
    from finectl.models.dit import DiT
    from finectl.models.unet import UNet

OPERATORS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
FAIL_IF = re.compile(r"\s*(\w+)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*")
GRID_COLUMNS = 20
LEAST_FRECHET_SAMPLES = 2


@dataclass(frozen=True)
class Config(DataFields):
    """The options of `finectl evaluate`."""

    metrics: str
    weights: str
    draws: int
    samples: int
    scheduler: str
    sampling_steps: int
    guidance: float
    batch_size: int
    fail_if: str | None
    seed: int


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check that the metrics exist and that the models take the data.

    Raises:
        UsageError: there is no such metric, or too few samples for it, or `--fail-if` is no condition on one of them.
        InputError: the data set is missing or does not fit a model.
    """
    names = [name.strip() for name in config.metrics.split(",") if name.strip()]
    for name in names:
        METRICS[name]  # an unknown name is an error here
    if not names:
        raise UsageError("--metrics names no metric", expected=f"one or several of: {', '.join(METRICS)}")
    data, fields = resolve_data(config, parents, read_config(parents[0]).image_size)
    for parent in parents:
        require_null_class(require_class_conditional(parent), config.guidance)
        require_fit(parent, data)
    notes = []
    if data.name != "digits" and set(names) & set(SAMPLE_METRICS):
        left_out = [name for name in names if name in SAMPLE_METRICS]
        names = [name for name in names if name not in SAMPLE_METRICS] or ["loss"]
        notes.append(f"{', '.join(left_out)} left out: the bundled features are made for digits, not for {data.name}")
    if "frechet" in names and config.samples < LEAST_FRECHET_SAMPLES:
        raise UsageError(
            f"--samples {config.samples} have no covariance",
            expected=f"at least {LEAST_FRECHET_SAMPLES} images for the Fréchet distance",
            fix="--samples 1000, or --metrics without frechet",
        )
    if config.fail_if is not None:
        parse_condition(config.fail_if, names)
    resolved = replace(config, metrics=",".join(names), **fields)
    slug = parents[0].name.rsplit("-", 1)[0] if len(parents) == 1 else f"{len(parents)}-models"
    summary = {"models": len(parents), "images_to_sample": config.samples * len(parents) * _samples(resolved)}
    return Plan(resolved, slug=slug, data=data, summary=summary, notes=tuple(notes))


def _samples(config: Config) -> bool:
    return bool(set(config.metrics.split(",")) & set(SAMPLE_METRICS))


def parse_condition(text: str, metrics: Sequence[str]) -> tuple[str, str, float]:
    """Return metric, comparison and value of a condition such as `loss>0.1`.

    Raises:
        UsageError: it is none, or its metric is not measured.
    """
    match = FAIL_IF.fullmatch(text)
    try:
        name, comparison, value = match.group(1), match.group(2), float(match.group(3))  # type: ignore[union-attr]
    except (AttributeError, ValueError) as error:
        raise UsageError(f"--fail-if {text!r} is no condition", expected="such as 'loss>0.1'") from error
    if name not in metrics:
        raise UsageError(f"--fail-if {text!r} asks for {name!r}", expected=f"one of: {', '.join(metrics)}")
    return name, comparison, value


def run(job: Job[Config]) -> Outcome:
    """Measure every model, then write and print the comparison."""
    from finectl.data.dataset import load
    from finectl.metrics.report import comparison_table, draw_samples, plot_convergence, row_names
    from finectl.training.device import resolve_device

    config = job.config
    device = resolve_device(job.execution.device)
    heldout = load(config.data or "", "heldout", config.image_size, data_options(config, job))
    generated = generated_metrics(config, device)
    names = row_names([artifact.name for artifact in job.parents])
    rows: list[dict[str, Any]] = []
    pictures: list[Tensor] = []
    curves: dict[str, list[tuple[int, float]]] = {}
    with job.console.progress("measuring", len(job.parents), unit="model") as progress:
        for name, artifact in zip(names, job.parents, strict=True):
            row: dict[str, Any] = {"name": name, **describe(job, artifact)}
            model = load_model(artifact, config.weights).to(device).eval()
            if "loss" in config.metrics:
                row["loss"] = measure_loss(config, model, heldout, device)
            if generated is not None:
                levels, labels = generated.sample(model, job.execution.dtype, job.stop_if_requested)
                row.update(generated.measure(levels, labels, config.metrics.split(",")))
                pictures.append(levels[:GRID_COLUMNS])
            curves[name] = convergence(job, artifact)
            rows.append(row)
            progress.advance()
    columns, cells = comparison_table(rows)
    job.console.table("Comparison", columns, cells)
    write_atomic(job.directory / "table.md", (format_table(columns, cells) + "\n").encode())
    write_json(job.directory / "metrics.json", [{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    drawn = plot_convergence(job.directory / "plots" / "convergence.png", curves)
    if not drawn and any(curves.values()):
        job.console.note("no plot: matplotlib is not installed (pip install 'finectl[plots]')")
    if pictures:
        draw_samples(job.directory / "samples.png", pictures)
    return Outcome(metrics={"models": rows}, cost={"samples": config.samples * len(rows) * _samples(config)})


def describe(job: Job[Config], artifact: Artifact) -> dict[str, Any]:
    """Return what the manifests of a model and its ancestors say: method, depth, parameters transferred and cost."""
    chain = model_chain(trace(job.workspace, artifact))
    first = chain[0].manifest.metrics
    cost = total_cost(chain)
    config = read_config(artifact)
    return {
        "digest": artifact.manifest.digest,
        "method": first.get("method", artifact.kind),
        "depth": config.depth,
        "parameters": total_parameters(config),
        "transferred": first.get("parameters_transferred"),
        "transferred_with_embedders": first.get("parameters_transferred_with_embedders"),
        "steps": cost["steps"],
        "seconds": cost["wall_s"],
    }


def generated_metrics(config: Config, device: torch.device) -> GeneratedMetrics | None:
    """Return what generates and measures images under these options; None when no metric needs any."""
    from finectl.metrics.generated import GeneratedMetrics

    if not _samples(config):
        return None
    return GeneratedMetrics(
        data=config.data or "",
        samples=config.samples,
        scheduler=config.scheduler,
        sampling_steps=config.sampling_steps,
        guidance=config.guidance,
        seed=config.seed,
        batch_size=config.batch_size,
        device=device,
    )


def measure_loss(config: Config, model: DiT | UNet, heldout: ImageSet, device: torch.device) -> dict[str, Any]:
    """Return the held-out loss with its interval, and by timestep range."""
    from finectl.metrics.heldout_loss import heldout_loss

    diffusion = model.config.diffusion
    measured = heldout_loss(model, heldout, draws=config.draws, seed=config.seed, device=device, diffusion=diffusion)
    return {**measured.summary(), "seed": config.seed, "data_fingerprint": heldout.info.fingerprint}


def convergence(job: Job[Config], artifact: Artifact) -> list[tuple[int, float]]:
    """Return (optimiser updates, held-out loss) over the whole training of a model, tuning counted."""
    points, before = [], 0
    for link in model_chain(trace(job.workspace, artifact)):
        entries = read_log(link.file(LOG)) if link.has(LOG) else []
        points += [(before + entry["step"], entry["heldout_loss"]) for entry in entries if "heldout_loss" in entry]
        before += link.manifest.cost.get("steps", 0)
    return points


def verdict(config: Config, manifest: Manifest) -> ComputationError | None:
    """Return the error of `--fail-if` when a model meets its condition."""
    if config.fail_if is None:
        return None
    name, comparison, bound = parse_condition(config.fail_if, config.metrics.split(","))
    for row in manifest.metrics["models"]:
        value = cast(float, row[name]["value"])
        if OPERATORS[comparison](value, bound):
            return ComputationError(f"--fail-if {config.fail_if}: {row['name']} has {name} {value:.6g}")
    return None


STAGE = Stage(
    name="evaluate",
    version=1,
    makes="evaluation",
    config=Config,
    reads=lambda config: Reads("model", ("model", "condensed"), many=True),
    plan=plan,
    run=run,
    verdict=verdict,
)
