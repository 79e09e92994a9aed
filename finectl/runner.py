"""The one runner of all stages: inputs, plan, recipe, cache, lock, signals, publication.

A stage's file holds its method; everything that makes a run repeatable, resumable and safe is here, once.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from finectl.artifacts.cache import remembered_sha256
from finectl.artifacts.files import sha256_json
from finectl.artifacts.job import Execution, InterruptFlag, Job, Plan, Reads, Stage
from finectl.artifacts.manifest import NAME, Manifest, ParentRecord, digest_of, read_manifest
from finectl.artifacts.provenance import cost_of, data_record, environment, machine
from finectl.artifacts.resources import resources_as_errors
from finectl.artifacts.staging import STATE, Staging, check_records, point_latest
from finectl.artifacts.store import Artifact, Workspace, open_artifact, require_no_number, verify_artifacts
from finectl.console import Console
from finectl.errors import FinectlError, InputError, OutputError, UsageError
from finectl.world import World

C = TypeVar("C")
STDIN = "-"
SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class RunOptions:
    """The options that every stage has; none of them is part of the recipe."""

    workspace: Path | None = None
    out: Path | None = None
    force: bool = False
    resume: bool = True
    dry_run: bool = False
    execution: Execution = field(default_factory=Execution)
    command: tuple[str, ...] = ()
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Args:
        artifact: The artifact, None for a dry run.
        cached: Whether it was there already.
        plan: What `--dry-run` prints.
        text: What stdout gets instead of the path; None for the path.
        failure: What `--fail-if` found, to be raised once the path is printed.
        interrupted: Whether a signal came too late to stop the run, so that whoever has more to do stops.
    """

    artifact: Artifact | None
    cached: bool
    plan: dict[str, Any]
    text: str | None = None
    failure: FinectlError | None = None
    interrupted: bool = False

    @classmethod
    def of(cls, stage: Stage[C], plan: Plan[C], artifact: Artifact, cached: bool, described: dict[str, Any]) -> Result:
        """Return the result of a run that made an artifact, or found it."""
        failure = stage.verdict(plan.config, artifact.manifest)
        return cls(artifact, cached, described, stage.prints(plan.config, artifact), failure)


def run_stage(
    stage: Stage[C], config: C, inputs: Sequence[str], options: RunOptions, console: Console | None = None
) -> Result:
    """Make the artifact of a stage, or find it, or go on with it.

    Args:
        stage: The declaration in the stage's file.
        config: Its options, unresolved.
        inputs: INPUT arguments: paths, `kind/name`, `latest` or `-`; empty for the newest of the kind.
        options: What every stage understands.
        console: Where to write for people.

    Raises:
        FinectlError: with the exit code that says what failed.
    """
    console = console or Console()
    if not stage.shares_work:
        if not options.world.leads:
            return Result(None, True, {})
        options = replace(options, world=World())  # the others have left: nothing may wait for them
    if not options.world.leads:
        return _follow(stage, config, options)
    with _Announcement(options.world) as announce:
        return _lead(stage, config, inputs, options, console, announce)


class _Announcement:
    """The word of the process that leads: where the work is, or, if none came up, that there is none."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._given = False

    def __call__(self, **work: Any) -> None:
        self._world.tell("work", work)
        self._given = True

    def __enter__(self) -> _Announcement:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._given:
            self._world.tell("work", None)


def _follow(stage: Stage[C], config: C, options: RunOptions) -> Result:
    """Share the work of a run that another process leads; nothing is written and nothing is printed."""
    world = options.world
    work = world.hear("work")
    if work is None:
        return Result(None, True, {})
    parents = tuple(open_artifact(Path(path)) for path in work["parents"])
    plan = stage.plan(config, parents)
    recipe = recipe_of(stage, plan, parents, stage.reads(config))
    if recipe != work["recipe"]:
        raise UsageError(
            f"process {world.rank} has the recipe {recipe[:8]}, process 0 has {work['recipe'][:8]}",
            expected="the same command, the same finectl and the same data in all processes",
        )
    directory, console = Path(work["directory"]), Console(quiet=True)
    with resources_as_errors(directory), InterruptFlag(console) as interrupt:
        stage.run(
            Job(
                config=plan.config,
                execution=options.execution,
                parents=parents,
                directory=directory,
                state=directory / STATE,
                console=console,
                interrupt=interrupt,
                workspace=Workspace(options.workspace),
                data=plan.data,
                world=world,
            )
        )
    return Result(None, False, {})


def _lead(
    stage: Stage[C],
    config: C,
    inputs: Sequence[str],
    options: RunOptions,
    console: Console,
    announce: Callable[..., None],
) -> Result:
    """Find the artifact, or make it."""
    workspace = Workspace(options.workspace)
    reads = stage.reads(config)
    parents = find_parents(workspace, reads, inputs or (reads.named if reads else ()), console)
    plan = stage.plan(config, parents)
    recipe = recipe_of(stage, plan, parents, reads)
    kind = plan.makes or stage.makes
    final = named(options.out) if options.out else workspace.directory(kind, f"{plan.slug}-{recipe[:8]}")
    described = describe_plan(stage, plan, parents, recipe, final)
    if options.dry_run:
        measured = stage.measure(plan, parents, options.execution) if stage.measure else {}
        return Result(None, False, {**described, **measured})
    for note in plan.notes:
        console.note(note)
    if not options.force and (done := finished(final, recipe)) is not None:
        if options.out is None:
            _freshen_latest(workspace, done)
        return Result.of(stage, plan, done, True, described)
    if options.force:
        require_replaceable(final)
    verify_artifacts(parents, remembered_sha256)
    interrupted = False
    with resources_as_errors(final):
        staging = Staging(final, recipe, fresh=options.force or not options.resume)
        try:
            if not options.force and (done := finished(final, recipe)) is not None:
                # Another process published it between the look and the lock.
                return Result.of(stage, plan, done, True, described)
            if not _is_publishable(staging, recipe):
                announce(recipe=recipe, directory=str(staging.path), parents=[str(p.path.absolute()) for p in parents])
                interrupted = _work(stage, plan, parents, reads, recipe, staging, options, workspace, console)
            path = staging.publish(replace=options.force)
            if options.out is None:
                point_latest(path)
        finally:
            staging.discard_if_empty()
            staging.close()
    made = Result.of(stage, plan, open_artifact(path), False, described)
    return replace(made, interrupted=interrupted)


def named(out: Path) -> Path:
    """Return `--out` under its own name, which `.` and `..` are not."""
    return out.resolve() if out.name in ("", "..") else out


def find_parents(
    workspace: Workspace, reads: Reads | None, inputs: Sequence[str], console: Console
) -> tuple[Artifact, ...]:
    """Open the input artifacts; with none named, take the newest of the kind and say which one.

    Raises:
        InputError: nothing is there, or stdin was empty, or an artifact is damaged or of another kind.
    """
    if reads is None:
        if inputs:
            raise InputError(
                f"INPUT {inputs[0]!r} is not read with these options", expected="no INPUT", fix="leave INPUT out"
            )
        return ()
    further = [artifact for other in reads.also for artifact in find_parents(workspace, other, other.named, console)]
    if not inputs:
        artifact = workspace.newest(reads.kinds)
        console.note(f"no INPUT given: taking the newest {artifact.kind}, {artifact.path}")
        return (artifact, *further)
    names = [name for text in inputs for name in (read_stdin() if text == STDIN else [text])]
    for name in names:
        require_no_number(name)
    if len(names) > 1 and not reads.many:
        raise InputError(f"{len(names)} inputs were given: {', '.join(names)}", expected="one", fix=reads.several)
    return (*(workspace.find(name, reads.kinds) for name in names), *further)


def read_stdin() -> list[str]:
    """Read artifact paths from stdin: one a line, plain or as the JSON objects that `--json` prints.

    Raises:
        InputError: nothing arrived, which is what the failure of the stage before looks like.
    """
    lines = [line.strip() for line in sys.stdin or () if line.strip()]
    if not lines:
        raise InputError(
            "nothing arrived on standard input",
            expected="the path of an artifact from the command before the pipe, which seems to have failed",
        )
    try:
        return [str(json.loads(line)["path"]) if line.startswith("{") else line for line in lines]
    except (ValueError, KeyError) as error:
        raise InputError(
            f"standard input holds {lines[0][:SHOWN_CHARACTERS]!r}",
            expected="the path of an artifact, or the JSON object that --json prints",
        ) from error


def recipe_of(stage: Stage[C], plan: Plan[C], parents: Sequence[Artifact], reads: Reads | None) -> str:
    """Return the hash of all that decides the result: stage, version, configuration, parents and data.

    What lies somewhere counts by its fingerprint, so the same images under another path give the same recipe.
    """
    config = asdict(plan.config)  # type: ignore[call-overload]
    for name in (*stage.locations, *stage.presentation):
        config.pop(name, None)
    for name, value in stage.unchanged_at.items():
        if config[name] == value:
            del config[name]
    return sha256_json(
        {
            "stage": stage.name,
            "version": stage.version,
            "config": config,
            "parents": [[role, parent.manifest.digest] for role, parent in _with_roles(reads, parents)],
            "data": plan.data.fingerprint if plan.data else None,
        }
    )


def _with_roles(reads: Reads | None, parents: Sequence[Artifact]) -> list[tuple[str, Artifact]]:
    return list(zip(reads.roles(len(parents)), parents, strict=True)) if reads else []


def finished(final: Path, recipe: str) -> Artifact | None:
    """Return the artifact under `final` when it is whole and of this recipe; None when nothing is there.

    Raises:
        OutputError: something else is there.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return None
    require_replaceable(final)
    artifact = open_artifact(final)
    if artifact.manifest.recipe != recipe:
        raise OutputError(
            f"{final} holds an artifact of another recipe ({artifact.manifest.recipe[:8]}, not {recipe[:8]})",
            expected="an empty or new directory",
            fix="choose another --out, or replace the artifact with --force",
        )
    return artifact


def require_replaceable(final: Path) -> None:
    """Check that nothing but an artifact is under `final`; what else a user keeps there, not even `--force` removes.

    Raises:
        OutputError: something else is there.
    """
    if final.exists() and not (final.is_dir() and not any(final.iterdir())) and not (final / NAME).is_file():
        raise OutputError(
            f"{final} is not empty and is no artifact", expected="an empty or new directory", fix="choose another --out"
        )


def describe_plan(
    stage: Stage[C], plan: Plan[C], parents: Sequence[Artifact], recipe: str, final: Path
) -> dict[str, Any]:
    """Return what `--dry-run` prints."""
    return {
        "stage": stage.name,
        "path": str(final),
        "exists": (final / NAME).is_file(),
        "recipe": recipe,
        "inputs": [str(parent.path) for parent in parents],
        "data": data_record(plan.data),
        "config": asdict(plan.config),  # type: ignore[call-overload]
        **plan.summary,
    }


def _freshen_latest(workspace: Workspace, artifact: Artifact) -> None:
    """Move `latest` to an artifact that a crash published without it."""
    try:
        newest = workspace.newest([artifact.kind])
    except InputError:  # the newest is damaged, which is no fault of this one
        return
    if newest.manifest.created < artifact.manifest.created:
        point_latest(artifact.path)


def _is_publishable(staging: Staging, recipe: str) -> bool:
    """Tell whether an earlier run finished the work and only failed to publish it."""
    if not staging.finished:
        return False
    manifest = read_manifest(staging.path)
    if manifest.recipe == recipe and check_records(staging.path, manifest.files):
        return True
    staging.clear()
    return False


def _work(
    stage: Stage[C],
    plan: Plan[C],
    parents: Sequence[Artifact],
    reads: Reads | None,
    recipe: str,
    staging: Staging,
    options: RunOptions,
    workspace: Workspace,
    console: Console,
) -> bool:
    """Run the stage in its staging directory, write the manifest last, and tell whether a signal came meanwhile."""
    start_s = time.monotonic()
    with InterruptFlag(console) as interrupt:
        job = Job(
            config=plan.config,
            execution=options.execution,
            parents=parents,
            directory=staging.path,
            state=staging.state,
            console=console,
            interrupt=interrupt,
            workspace=workspace,
            data=plan.data,
            world=options.world,
        )
        outcome = stage.run(job)
        files = staging.records(outcome.sha256)
        Manifest(
            kind=plan.makes or stage.makes,
            stage=stage.name,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
            command=list(options.command),
            config=asdict(plan.config),  # type: ignore[call-overload]
            execution={**asdict(options.execution), **machine(options.world)},
            recipe=recipe,
            parents=[
                ParentRecord(role, os.path.relpath(parent.path, staging.final), parent.manifest.digest)
                for role, parent in _with_roles(reads, parents)
            ],
            files=files,
            digest=digest_of(files),
            data=data_record(plan.data),
            metrics=outcome.metrics,
            cost=cost_of(outcome, start_s),
            environment=environment(),
        ).write(staging.path / NAME)
        return interrupt.requested
