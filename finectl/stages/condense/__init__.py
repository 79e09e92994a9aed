"""Condense: a model whose matrices of a type all share U and V, W^(l) = U diag(sigma^(l)) V^T.

It is pre-trained that way (`pretraining.py`: FINE, phase 1), or, with `--from`, fitted to the layers of a dense model
(`decomposition.py`).

Reference: FINE, arXiv 2409.19289, section 3.2, Eq. 3.
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
    """Return the dense model that `--from` names, if it does."""
    return Reads("ancestor", ("model",), named=(config.from_model,)) if config.from_model else None


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Resolve the options against the dense model, or against the preset and the data set.

    Raises:
        UsageError: the preset, a type, the rank or the patch does not fit, or an option contradicts the dense model.
        InputError: the data set is missing, empty or does not fit, or the model is not dense.
    """
    return plan_from(config, parents[0]) if parents else plan_pretraining(config)


def run(job: Job[Config]) -> Outcome:
    """Make the factorised model and write its raw and EMA weights."""
    return run_from(job, job.parents[0]) if job.parents else run_pretraining(job)


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Time a step, for `--dry-run`."""
    if parents:
        steps = plan.config.distill_steps + cast(int, plan.config.steps)
        model, settings = architecture_from(plan.config, parents[0]), replace(settings_of(plan.config), steps=steps)
        return measure_training(model, settings, execution) if steps else {}
    model = architecture(plan.config, cast(DataInfo, plan.data))
    return measure_training(model, settings_of(plan.config), execution)


STAGE = Stage(
    name="condense",
    version=1,
    makes="condensed",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "from_model"),
    shares_work=True,
    measure=measure,
)
