"""How a subcommand is made of its own options and those that every stage has, and how its result is printed."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import math
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from finectl.cli import options as opt
from finectl.console import Console
from finectl.errors import UsageError

INPUT_PARAMETERS = ("input", "inputs")


def _run_options(
    recipe: opt.Recipe = None,
    workspace: opt.Workspace = None,
    out: opt.Out = None,
    force: opt.Force = False,
    resume: opt.Resume = True,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    save_every: opt.SaveEvery = 0,
) -> None:
    """The options of every stage; the signature is all that is read of this function."""


def stage_command(module: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a signature of options into the subcommand of a stage.

    The decorated function has no body: its parameters are the fields of the stage's `Config` (and `input` or `inputs`),
    its docstring is the help. The options of `_run_options` are added to it.

    Args:
        module: The stage's module; it is imported when the command runs.
    """

    def decorate(declared: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(_run_options).parameters
        own = inspect.signature(declared).parameters

        @functools.wraps(declared)
        def command(ctx: typer.Context, **values: Any) -> None:
            _run(module, {k: v for k, v in values.items() if k in own}, {k: values[k] for k in shared})

        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        hints = {
            **get_type_hints(declared, include_extras=True),
            **get_type_hints(_run_options, include_extras=True),
            "ctx": typer.Context,
        }
        parameters = [p.replace(annotation=hints[p.name]) for p in (context, *own.values(), *shared.values())]
        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined, unused-ignore]
        del command.__wrapped__  # or the parser would look through to `declared`
        return command

    return decorate


def _run(module: str, own: dict[str, Any], shared: dict[str, Any]) -> None:
    """Run a stage and print its artifact's path on stdout, or one JSON object with `--json`."""
    from finectl.artifacts.job import Execution
    from finectl.runner import RunOptions, run_stage

    _require_finite(own)
    inputs = [text for name in INPUT_PARAMETERS for text in _as_list(own.pop(name, None))]
    stage = importlib.import_module(module).STAGE
    console = Console(quiet=shared["quiet"])
    result = run_stage(
        stage,
        stage.config(**own),
        inputs,
        RunOptions(
            workspace=shared["workspace"],
            out=shared["out"],
            force=shared["force"],
            resume=shared["resume"],
            dry_run=shared["dry_run"],
            execution=Execution(shared["device"], shared["dtype"], shared["save_every"]),
            command=("finectl", *sys.argv[1:]),
        ),
        console,
    )
    if result.artifact is None:
        _print_plan(result.plan, shared["json_output"], console)
    elif shared["json_output"]:
        manifest = result.artifact.manifest
        answer = {
            "path": str(result.artifact.path),
            "kind": manifest.kind,
            "recipe": manifest.recipe,
            "digest": manifest.digest,
            "cached": result.cached,
            "metrics": manifest.metrics,
            "cost": manifest.cost,
        }
        sys.stdout.write(json.dumps(answer) + "\n")
    else:
        if result.cached:
            console.note("already there; --force makes it anew")
        sys.stdout.write(f"{result.artifact.path}\n")
    if result.failure is not None:
        raise result.failure


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
