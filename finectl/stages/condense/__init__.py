"""Condense: a model whose layers share their parameters, so that models of other depths can be read off it.

`--method fine` shares U and V of W^(l) = U diag(sigma^(l)) V^T; `share`, `tleg` and `wave` are what it is compared with
(`finectl.models.tying`). Such a model is pre-trained that way (`pretraining.py`: FINE, phase 1), by `--distill` towards
a teacher's predictions; or, with `--from`, factors are fitted to the layers of a dense model (`decomposition.py`).

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3; arXiv 2312.05614 (tleg); arXiv 2406.17503 (wave).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from finectl.artifacts.job import Execution, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo
from finectl.stages.condense.config import Config
from finectl.stages.condense.decomposition import architecture_from, plan_from, run_from
from finectl.stages.condense.pretraining import architecture, plan_pretraining, run_pretraining
from finectl.training.estimate import measure_training
from finectl.training.settings import settings_of


def reads(config: Config) -> Reads | None:
    """Return the dense model that `--from` names, or the teacher that `--distill` does."""
    if config.from_model:
        return Reads("ancestor", ("model",), named=(config.from_model,))
    return Reads("teacher", ("model",), named=(config.distill,)) if config.distill else None


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the dense model, or against the preset and the data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit, or an option contradicts the dense model.
        InputError: the data set is missing, empty or does not fit, or the model is not dense.
    """
    return plan_from(config, parents[0]) if config.from_model else plan_pretraining(config, parents)


def run(job: Job[Config]) -> Outcome:
    """Make the condensed model and write its raw and EMA weights."""
    return run_from(job, job.parents[0]) if job.config.from_model else run_pretraining(job)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`."""
    if plan.config.from_model:
        steps = cast(int, plan.config.distill_steps) + cast(int, plan.config.steps)
        model, settings = architecture_from(plan.config, parents[0]), replace(settings_of(plan.config), steps=steps)
        return measure_training(model, settings, execution) if steps else {}
    model = architecture(plan.config, cast(DataInfo, plan.data), parents)
    return measure_training(model, settings_of(plan.config), execution)


STAGE = Stage(
    name="condense",
    version=1,
    makes="condensed",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "from_model", "distill"),
    shares_work=True,
    measure=measure,
)
