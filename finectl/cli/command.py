"""How a subcommand is made of its own options and those that every stage has, and how its result is printed."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

from finectl.cli import groups as common
from finectl.console import Console
from finectl.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from finectl.artifacts.job import Stage
    from finectl.runner import Result, RunOptions

INPUT_PARAMETERS = ("input", "inputs")


@dataclass(frozen=True)
class Call:
    """One command line, ready to run.

    Args:
        stage: The stage's declaration.
        config: Its options, by the names of its `Config`.
        inputs: INPUT arguments.
        options: What every stage understands.
        console: Where to write for people.
        values: All options by the names of their parameters.
        typed: Those of them that stand on the command line, not in a recipe.
    """

    stage: Stage[Any]
    config: Mapping[str, Any]
    inputs: tuple[str, ...]
    options: RunOptions
    console: Console
    values: Mapping[str, Any]
    typed: frozenset[str]


def run_one(call: Call) -> Result | None:
    """Run a stage once."""
    from finectl.runner import run_stage

    return run_stage(call.stage, call.stage.config(**call.config), call.inputs, call.options, call.console)


def stage_command(
    module: str,
    *groups: Callable[..., None],
    run: Callable[[Call], Result | None] = run_one,
    parser: type[Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a signature of options into the subcommand of a stage.

    The decorated function has no body: its parameters are fields of the stage's `Config` (and `input` or `inputs`), its
    docstring is the help. The options of `groups` and those of every stage are added to it.

    Args:
        module: The stage's module; it is imported when the command runs.
        groups: Signatures of `finectl.cli.groups`.
        run: What the command does: run the stage once, or something that prints on its own and returns None.
        parser: The class that parses the command line and shows help; None for the usual one.
    """

    def decorate(declared: Callable[..., None]) -> Callable[..., None]:
        signatures = (declared, *groups, common.run)
        own: dict[str, inspect.Parameter] = {}
        for signature in signatures:  # a stage's own form of an option comes before the common one
            for parameter in inspect.signature(signature).parameters.values():
                own.setdefault(parameter.name, parameter)

        @functools.wraps(declared)
        def command(ctx: typer.Context, **values: Any) -> None:
            sources = {name: ctx.get_parameter_source(name) for name in values}
            typed = frozenset(name for name, source in sources.items() if source and source.name == "COMMANDLINE")
            _run(module, values, typed, run)

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        hints: dict[str, Any] = {"ctx": typer.Context}
        for signature in reversed(signatures):
            hints.update(get_type_hints(signature, include_extras=True))
        parameters = [p.replace(annotation=hints[p.name]) for p in (context, *own.values())]
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined, unused-ignore]
        command.parser = parser  # type: ignore[attr-defined, unused-ignore]
        del command.__wrapped__  # or the parser would look through to `declared`
        return command

    return decorate


def _run(
    module: str, values: dict[str, Any], typed: frozenset[str], run: Callable[[Call], Result | None] = run_one
) -> None:
    """Run a stage and print its artifact's path on stdout, or one JSON object with `--json`."""
    _require_finite(values)
    if values["offline"] or not values["download"]:
        os.environ["HF_HUB_OFFLINE"] = "1"  # what huggingface_hub, diffusers and datasets all obey
    else:
        os.environ.pop("HF_HUB_OFFLINE", None)
    stage = importlib.import_module(module).STAGE
    options = _run_options(values)
    world = options.world
    call = Call(
        stage=stage,
        config={key: values[key] for key in stage.config.__dataclass_fields__ if key in values},
        inputs=tuple(text for name in INPUT_PARAMETERS for text in _as_list(values.get(name))),
        options=options,
        console=Console(quiet=values["quiet"]),
        values=values,
        typed=typed,
    )
    try:
        with world:
            result = run(call)
    except Interrupted as error:
        if world.leads:
            raise
        raise typer.Exit(error.exit_code) from error  # the process that leads says it
    if world.leads and result is not None:
        print_result(result, values["json_output"], call.console)


def _run_options(values: dict[str, Any]) -> RunOptions:
    """Return what every stage understands.

    Raises:
        UsageError: an option is no length of time, or the launcher's variables do not fit together.
    """
    from finectl.artifacts.job import Execution
    from finectl.runner import RunOptions
    from finectl.world import World

    execution = {key: values[key] for key in Execution.__dataclass_fields__ if key in values}
    if "max_time" in values:
        save_every = values["save_every"]
        by_steps = save_every.isdecimal() and int(save_every) > 0
        execution["save_every"] = int(save_every) if by_steps else 0
        execution["save_minutes"] = 0.0 if by_steps else minutes("--save-every", save_every)
        execution["max_minutes"] = minutes("--max-time", values["max_time"]) if values["max_time"] is not None else 0.0
    return RunOptions(
        workspace=values["workspace"],
        out=values["out"],
        force=values["force"],
        resume=values["resume"],
        dry_run=values["dry_run"],
        execution=Execution(**execution),
        command=("finectl", *sys.argv[1:]),
        world=World.from_environment(),
    )


def print_result(result: Result, as_json: bool, console: Console) -> None:
    """Print the plan of a dry run, or where the artifact is; then say what `--fail-if` found."""
    if result.artifact is None:
        _print_plan(result.plan, as_json, console)
    elif as_json:
        sys.stdout.write(json.dumps(answer(result)) + "\n")
    else:
        if result.cached:
            console.note("already there; --force makes it anew")
        if result.text is not None:
            console.note(f"the artifact: {result.artifact.path}")
        sys.stdout.write(result.text if result.text is not None else f"{result.artifact.path}\n")
    if result.failure is not None:
        raise result.failure


def answer(result: Result) -> dict[str, Any]:
    """Return what `--json` says of an artifact."""
    if result.artifact is None:
        return {}
    manifest = result.artifact.manifest
    return {
        "path": str(result.artifact.path),
        "kind": manifest.kind,
        "recipe": manifest.recipe,
        "digest": manifest.digest,
        "cached": result.cached,
        "metrics": manifest.metrics,
        "cost": manifest.cost,
    }


def minutes(option: str, text: str) -> float:
    """Return a length of time such as `90s`, `55m`, `3h30m` or `1d`, in minutes.

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    days, hours, mins, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0, 0)
    length = days * 1440 + hours * 60 + mins + seconds / 60
    if not length:
        raise UsageError(f"{option} {text!r} is no length of time", expected="such as 90s, 55m or 3h30m")
    return length


def _require_finite(options: dict[str, Any]) -> None:
    """Refuse `nan` and `inf`, which a range of numbers lets through.

    Raises:
        UsageError: an option is not a finite number.
    """
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{name.replace('_', '-')} {value} is not a finite number")


def _print_plan(plan: dict[str, Any], as_json: bool, console: Console) -> None:
    if as_json:
        sys.stdout.write(json.dumps(plan) + "\n")
        return
    import yaml

    console.line(yaml.safe_dump(plan, sort_keys=False, width=120).rstrip())


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
