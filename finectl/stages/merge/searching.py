"""The search of `merge`: candidates measured one after another, each kept at once, and the controls beside the winner.

All candidates see the same noise; the best few are measured again on fresh noise, which decides. The controls, theta_0,
equal shares, the sum, each expert alone and the ensemble of experts, are measured on that fresh noise, too.

Reference: DeMe, arXiv 2410.06664, section 8; the controls are ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors
from finectl.data.captions import NONE
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DataInfo
from finectl.metrics.features import FeatureOptions
from finectl.metrics.measured import Measured as Value
from finectl.metrics.measuring import Measuring
from finectl.metrics.objective import Objective
from finectl.models.candidates import Candidates
from finectl.models.io import build_model, read_config
from finectl.models.parts import Parts
from finectl.models.unet import condition
from finectl.models.vae import load_vae
from finectl.search.base import Ask, Measured
from finectl.search.final import FRESH, winner
from finectl.search.journal import Journal
from finectl.search.work import work
from finectl.stages.merge.config import Config
from finectl.stages.merge.setup import strategy
from finectl.training.device import resolve_device
from finectl.training.settings import data_options
from finectl.training.texts import Captions, Prompts, conditioned

JOURNAL = "search.jsonl"
NOT_MEASURED = {
    *("weights", "block_weights", "density", "output_dtype", "fold", "ranges"),
    *("grid_step", "grid_min", "grid_max", "max_candidates", "search", "search_samples", "rescored", "journal"),
    *("data", "base", "vae", "reference", "features_weights", "inception", "dino", "text_encoder"),
}
"""Options that do not change what a candidate's measurement gives: what is asked and written, and where files lie."""


def search(job: Job[Config], parts: Parts) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Find the weights.

    Returns:
        The weights, and what the manifest keeps: the winner's value, how many candidates were measured, the controls.

    Raises:
        ComputationError: no candidate has a finite objective.
        Interrupted: a signal came; every candidate that was measured is kept.
    """
    run = Run(job, parts)
    history = run.search()
    run.publish(history)
    chosen = winner(history, job.config.rescored)
    controls = settled(run.controls(chosen), run.sign)
    run.show(controls)
    asked = {entry.candidate for entry in history if entry.noise == 0}
    merged = controls[0]
    return tuple(merged["weights"]), {
        "objective": run.objective.metric,
        "value": merged["value"],
        "candidates_measured": len(asked),
        "samples_measured": sum(entry.samples for entry in history),
        "controls": controls,
        "task_vector_norms": run.candidates.norms(),
        "task_vector_cosines": run.candidates.cosines(),
    }


def settled(rows: Sequence[dict[str, Any]], sign: float) -> list[dict[str, Any]]:
    """Let a control be the merged model where it is better than what the search found: it costs nothing more.

    Args:
        rows: The winner of the search, `merged`, and then the controls, all measured on the same noise.
        sign: 1 where less is better, -1 where more is.

    Returns:
        The same with the best weights in front, under the name `merged`; what the search found then comes second.
    """
    found = rows[0]
    weighed = [row for row in rows if row["weights"] is not None and math.isfinite(row["value"])]
    best = min(weighed, key=lambda row: sign * row["value"], default=found)
    if best["weights"] == found["weights"]:
        return list(rows)
    return [{**best, "name": found["name"]}, {**found, "name": "best of the search"}, *rows[1:]]


class Run:
    """One search on its device."""

    def __init__(self, job: Job[Config], parts: Parts) -> None:
        config = job.config
        self.job, self.parts = job, parts
        self.device = resolve_device(job.execution.device, job.world.local_rank)
        source = job.parents[0]
        model = read_config(source)
        options = data_options(config, job)
        train, heldout = (load(config.data or "", part, config.image_size, options) for part in ("train", "heldout"))
        features, still = FeatureOptions.of(config), replace(options, captions=NONE)
        self.objective = Objective.of(config.objective, model, train.info, features, config.reference, still)
        self.sign = self.objective.sign
        self.candidates = self._load()
        prompts = self._prompts(heldout)
        (heldout,) = conditioned(job, [self.candidates.model], heldout)
        self.measuring = Measuring(
            self.objective,
            {"scheduler": config.scheduler, "sampling_steps": config.sampling_steps, "guidance": config.guidance},
            heldout,
            train,
            load_vae(config.vae, self.device) if config.vae else None,
            features,
            config.seed,
            self.device,
            job.execution.dtype,
            job.execution.workers,
            self.stop_if_requested,
            prompts,
        )
        self.strategy = strategy(config, parts.count)
        job.state.mkdir(parents=True, exist_ok=True)

    def _load(self) -> Candidates:
        base = load_tensors(self.parts.base) if self.parts.base else {}
        if self.parts.config.places:
            from finectl.adapters.projection import identity_state

            base = {**identity_state(self.parts.config), **base}
        others = [load_tensors(path) for path in self.parts.files]
        return Candidates(build_model(self.parts.config), base, others, self.device)

    def _prompts(self, heldout: ImageSet) -> Prompts | None:
        """Return the held-out captions for models of text, None for others."""
        data = self.job.data
        if not isinstance(data, DataInfo) or data.text is None:
            return None
        return Prompts.of_captions(Captions.opened(self.job, heldout, data, self.device), heldout)

    def stop_if_requested(self) -> None:
        """Leave when a signal asked for it; what was measured is in the journal."""
        self.job.stop_if_requested(lambda: None)

    def search(self) -> list[Measured]:
        """Measure what the strategy asks, and what others that share the journal do not."""
        _, most = self.strategy.candidates()
        path = Path(self.job.config.journal) if self.job.config.journal else self.job.state / JOURNAL
        journal = Journal(path, protocol=self.protocol())
        rescored = self.job.config.rescored
        total, done = most + rescored, len(journal.history())
        with self.job.console.progress("candidates", total, unit="candidate", done=done) as progress:

            def measure(ask: Ask) -> Measured:
                self.stop_if_requested()
                value = self.measuring(self.candidates.at(ask.candidate), ask.samples, ask.noise)
                progress.advance(samples=ask.samples)
                return self._signed(ask, value)

            return work(self.strategy, journal, measure, rescored=rescored)

    def protocol(self) -> str:
        """Return a digest of what decides a measurement, whatever strategy asks for it on whatever grid."""
        job = self.job
        config = {name: value for name, value in asdict(job.config).items() if name not in NOT_MEASURED}
        data = job.data.fingerprint if job.data else None
        return sha256_json([config, [parent.manifest.digest for parent in job.parents], data])

    def publish(self, history: Sequence[Measured]) -> None:
        """Write what was measured into the artifact, without who measured it and when."""
        lines = [json.dumps(asdict(entry)) for entry in history]
        (self.job.directory / JOURNAL).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _signed(self, ask: Ask, value: Value) -> Measured:
        """Return a measurement as searches take it, less being better."""
        ends = sorted((self.sign * value.low, self.sign * value.high))
        return Measured(ask.candidate, ask.samples, self.sign * value.value, (ends[0], ends[1]), ask.noise)

    def controls(self, chosen: Measured) -> list[dict[str, Any]]:
        """Measure the controls on the noise that chose the winner."""
        count = self.parts.count
        weights: dict[str, tuple[float, ...]] = {
            "merged": chosen.candidate,
            "theta_0": (0.0,) * count,
            "equal shares": (1 / count,) * count,
            "sum": (1.0,) * count,
        }
        for index, name in enumerate(self.parts.names):
            weights[f"expert {name}"] = tuple(float(place == index) for place in range(count))
        rows = [
            {"name": name, "weights": list(w), **self._record(self.candidates.at(w))} for name, w in weights.items()
        ]
        if self.parts.borders is not None:
            rows.append({"name": "ensemble", "weights": None, **self._record(self._ensemble())})
        return rows

    def _record(self, model: Any) -> dict[str, Any]:
        return self.measuring(model, self.job.config.search_samples, FRESH).record()

    def _ensemble(self) -> Any:
        from finectl.models.ensemble import load_ensemble

        ensemble = load_ensemble(self.job.parents[0])
        if self.measuring.prompts is not None:
            condition(ensemble, self.measuring.prompts.table, 0.0)
        return ensemble.to(self.device).eval()

    def show(self, controls: Sequence[dict[str, Any]]) -> None:
        """Print the table."""
        name = self.objective.metric
        cells = [
            (
                row["name"],
                ", ".join(f"{weight:.3g}" for weight in row["weights"]) if row["weights"] else "-",
                f"{row['value']:.4g}",
                " to ".join(f"{end:.4g}" for end in row["interval"]),
            )
            for row in controls
        ]
        self.job.console.table(f"Merged and controls, {name} on fresh noise", ["", "weights", name, "95 %"], cells)
