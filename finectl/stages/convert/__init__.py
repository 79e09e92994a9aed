"""Convert: other people's checkpoints into models, and models into other tools' layouts.

Import (`importing.py`): the source is found by its content, its configuration becomes finectl's, and every tensor of
the model is made of tensors of the source, one at a time. Export (`exporting.py`): the same, the other way. What each
tensor is made of is in `finectl.models.foreign`, one file a format.
"""

from __future__ import annotations

from collections.abc import Sequence

from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.errors import UsageError
from finectl.models.foreign import components
from finectl.models.foreign.exporting import TARGETS
from finectl.registry import nearest
from finectl.stages.convert.config import Config
from finectl.stages.convert.exporting import plan_export, run_export
from finectl.stages.convert.importing import plan_import, run_import


def reads(config: Config) -> Reads | None:
    """Return what is exported; an import reads no artifact.

    Raises:
        UsageError: there is no such target, or nothing was named to import.
    """
    if config.to is None:
        if config.source is None:
            raise UsageError(
                "neither SOURCE nor --to was given",
                expected="a foreign checkpoint to import, or --to with a model to export",
                fix="finectl convert --help",
            )
        return None
    if config.to not in TARGETS:
        raise UsageError(
            f"unknown target {config.to!r}{nearest(config.to, list(TARGETS))}", expected=f"one of: {', '.join(TARGETS)}"
        )
    return Reads("model", ("model", "condensed"), named=(config.source,) if config.source else ())


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Look at the source, or at the model and the parts that go with it.

    Raises:
        InputError: it is missing, damaged, or not supported.
        UsageError: an option does not go with it.
    """
    if config.components is not None and config.components not in components.WAYS:
        raise UsageError(f"--components {config.components}", expected=f"one of: {', '.join(components.WAYS)}")
    return plan_export(config, parents[0]) if config.to is not None else plan_import(config)


def run(job: Job[Config]) -> Outcome:
    """Write the model, or the export."""
    return run_export(job) if job.config.to is not None else run_import(job)


STAGE = Stage(
    name="convert",
    version=1,
    makes="model",
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("source", "vae"),
    unchanged_at={"process": None},
)
