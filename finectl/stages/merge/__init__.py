"""Merge: one model out of the experts of timestep ranges, or out of any models fine-tuned from one.

theta(w) = theta_0 + sum_i w_i (theta_i - theta_0), over averaged (EMA) weights; projections are merged around the
identity. `--weights` merges at once; otherwise w is searched for (`searching.py`), and beside the winner the controls
are measured: theta_0, equal shares, the sum, each expert alone, and their ensemble. Writing goes stretch by stretch
over the files (`finectl.artifacts.merging`), so that memory does not depend on the model's size.

Reference: DeMe, arXiv 2410.06664, section 3.3, Eq. 8; Ilharco et al., arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finectl.artifacts.files import write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.errors import UsageError
from finectl.models.io import CONFIG, FILES, total_parameters
from finectl.models.parts import Parts, missing_projections
from finectl.stages.merge.config import Config, parse_weights
from finectl.stages.merge.parts import tensor_weights
from finectl.stages.merge.setup import resolve_search, without_search
from finectl.training.text_settings import unchanged

EXPERTS = "experts"


def reads(config: Config) -> Reads:
    """Return what is merged: experts, or with `--base`, or `--method linear`, any models."""
    if config.base is not None:
        base = Reads("base", ("model",), named=(config.base,))
        return Reads("model", ("model",), many=True, also=(base,))
    if config.method == "linear":
        return Reads("model", ("model",), many=True)
    several = "models that are no experts are merged around --base MODEL, or without one by --method linear"
    return Reads(EXPERTS, (EXPERTS,), several=several)


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the models.

    Raises:
        UsageError: weights, grid or objective do not fit, or an option goes with the search alone.
        InputError: the models are not of one architecture, the base is gone, or the data is missing.
    """
    parts = Parts.of(parents, based=config.base is not None)
    if config.ranges not in (None, parts.count):
        raise UsageError(
            f"--ranges {config.ranges}, and {parents[0].path} has {parts.count}",
            expected=f"--ranges {parts.count}, or experts of {config.ranges} ranges",
            fix=f"finectl finetune-ranges --ranges {config.ranges}",
        )
    resolved = replace(
        config,
        base=str(parents[-1].path.resolve()) if config.base is not None else None,
        ranges=parts.count if parts.borders else None,
    )
    data: Any = InheritedData.of(parents[0])
    notes: tuple[str, ...] = ()
    summary: dict[str, Any] = {}
    tensor_weights(config, parts)  # a block that does not exist is an error here
    if config.block_weights is not None and config.weights is None:
        raise UsageError("--block-weights without --weights", expected="--weights for all other blocks")
    if config.fold:
        require_foldable(parts)
    if config.weights is not None:
        weights = parse_weights(config.weights, parts.count)
        resolved = without_search(replace(resolved, weights=",".join(f"{weight:g}" for weight in weights)))
    else:
        resolved, data, summary = resolve_search(resolved, parts, parents)
        notes = (f"{parts.described()}; {summary['search']}",)
    bytes_written = 4 * total_parameters(parts.config)
    return Plan(
        resolved,
        slug=f"{parents[0].name.rsplit('-', 1)[0]}-merged",
        data=data,
        summary={"models": parts.count, **summary, "disk_bytes": bytes_written},
        notes=notes,
    )


def require_foldable(parts: Parts) -> None:
    """Check that there is something to fold.

    Raises:
        UsageError: the models have no projections, or none that a convolution can take.
    """
    places = parts.config.places
    if not places:
        raise UsageError("--fold: the models have no projections", fix="leave --fold out")
    if not any(place.convolutions for place in places):
        raise UsageError(
            f"--fold: no projection of these models can be folded; that of {places[0].where}: {places[0].reason}",
            expected="models with projections behind up blocks that end in a convolution",
            fix="leave --fold out: the projections stay as layers",
        )


def run(job: Job[Config]) -> Outcome:
    """Search for the weights where none are given, and write the merged model.

    Raises:
        InputError: a file is damaged.
        ComputationError: no candidate can be measured.
        Interrupted: a signal came; every candidate that was measured is kept.
    """
    config = job.config
    parts = Parts.of(job.parents, based=config.base is not None)
    found: dict[str, Any] = {}
    if config.weights is not None:
        weights = parse_weights(config.weights, parts.count)
    else:
        from finectl.stages.merge.searching import search

        weights, found = search(job, parts)
    digest = write(job, parts, weights)
    metrics = {"weights": list(weights), "method": config.method, **found}
    known = {FILES["raw"]: digest}
    if config.fold:
        metrics["projections_kept"], known = fold(job, parts), {}
    else:
        write_json(job.directory / CONFIG, parts.config.to_dict())
    # No training: images that candidates generate are no images that a model has seen.
    return Outcome(metrics=metrics, cost={"steps": 0, "samples": 0}, sha256=known)


def write(job: Job[Config], parts: Parts, weights: Sequence[float]) -> str:
    """Write the merged weights and return the SHA-256 of their file."""
    from finectl.artifacts.merging.engine import merge_files
    from finectl.artifacts.merging.plan import MergePlan

    config, out = job.config, job.directory / FILES["raw"]
    plan = MergePlan(
        tuple(weights), config.method, config.density, seed=config.seed, tensor_weights=tensor_weights(config, parts)
    )
    megabytes = max(1, 4 * total_parameters(parts.config) // 10**6)
    with job.console.progress("merging", megabytes, unit="megabyte") as progress:
        done = 0

        def advance(written: int, total: int) -> None:
            nonlocal done
            progress.advance(megabytes * written // max(total, 1) - done)
            done = megabytes * written // max(total, 1)

        return merge_files(
            parts.base,
            parts.files,
            plan,
            out,
            dtype=None if config.output_dtype == "same" else config.output_dtype,
            missing=missing_projections(parts.config),
            finite=True,
            check=job.stop_if_requested,
            progress=advance,
        )


def fold(job: Job[Config], parts: Parts) -> list[str]:
    """Fold projections into neighbouring convolutions, as far as that is exact; return where others stay as layers."""
    from finectl.adapters.fold import fold as fold_state
    from finectl.artifacts.tensors import load_tensors, save_tensors

    path = job.directory / FILES["raw"]
    folded = fold_state(parts.config, load_tensors(path))
    save_tensors(path, folded.state)
    write_json(job.directory / CONFIG, folded.config.to_dict())
    for where, reason in folded.kept.items():
        job.console.note(f"the projection behind {where} stays as a layer: {reason}")
    return list(folded.kept)


STAGE = Stage(
    name="merge",
    version=2,
    makes="model",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "base", "vae", "reference", "journal", "features_weights", "inception", "dino", "text_encoder"),
    unchanged_at=unchanged("text_digest"),
)
