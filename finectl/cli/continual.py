"""`finectl finetune --data A --then B --then C`: one data set after another, and what is left of the earlier ones."""

from __future__ import annotations

import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.cli.command import Call, answer, print_result
from finectl.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from finectl.artifacts.job import Plan
    from finectl.artifacts.store import Artifact
    from finectl.data.sources import DataInfo
    from finectl.runner import Result, RunOptions
    from finectl.stages.finetune.continual import Cell

Tune = Callable[[Call], "Result | None"]
GO_ON = "run the same command again: it goes on from there"
ONLY_WITH = {"metrics": None, "samples": None, "allow_few": False}
SAMPLES = 1000
MEASURED = ("step_s", "training_s", "steps_per_s", "measured")
TUNE, EVALUATE = "finetune", "evaluate"


def run(call: Call, tune: Tune) -> Result | None:
    """Fine-tune on one data set after another, each from the model before, and measure all sets so far after each.

    Args:
        call: The command.
        tune: What fine-tunes once, its bank found or made.

    Returns:
        None: it prints the last model itself; in a dry run the steps.

    Raises:
        UsageError: options contradict each other.
        InputError: a data set is missing or does not fit the model.
        Interrupted: a signal came, or `--max-time` is over; the same command goes on with what is missing.
    """
    if call.values["control"] is not None:
        raise UsageError("--then does not go with --control", expected="one of them", fix="leave --control out")
    if not call.options.world.leads:
        _follow(call, tune)
        return None
    said = count()
    try:
        _lead(Sequel.of(call), tune, lambda: f"then/{next(said)}")
    finally:
        call.options.world.part(f"then/{next(said)}").tell("sequel", None)
    return None


def require_unused(call: Call) -> None:
    """Check that no option is given that only `--then` reads.

    Raises:
        UsageError: one is.
    """
    for name, usual in ONLY_WITH.items():
        if call.values[name] != usual:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} goes with --then, after which models are measured", fix=f"leave {option} out")


@dataclass(frozen=True)
class Sequel:
    """The data sets of one command, in order.

    Args:
        call: The command.
        base: The model that the first one starts from.
        infos: The data sets.
        plans: What fine-tuning on each comes to, as far as that is known before the model before it is there.
    """

    call: Call
    base: Artifact
    infos: tuple[DataInfo, ...]
    plans: tuple[Plan[Any], ...]

    @classmethod
    def of(cls, call: Call) -> Sequel:
        """Find the model and plan every step, so that what is wrong with any is said before work starts.

        Raises:
            UsageError: options contradict each other.
            InputError: there is no such model or data set, or one does not fit the model.
        """
        from finectl.artifacts.store import Workspace
        from finectl.runner import find_parents

        reads = call.stage.reads(call.stage.config(**{**call.config, "bank": None}))
        (base,) = find_parents(Workspace(call.options.workspace), reads, call.inputs, call.console)
        if call.values["data"] is None:
            raise UsageError("--then names what comes after --data", expected="--data DATA --then DATA")
        sets = [call.values["data"], *call.values["then"]]
        plans = [
            call.stage.plan(call.stage.config(**{**call.config, "data": one, "bank": None}), (base,)) for one in sets
        ]
        infos = tuple(plan.data for plan in plans)
        _require_chain(call, base, plans)
        return cls(call, base, infos, tuple(plans))  # type: ignore[arg-type]

    @property
    def sets(self) -> list[str]:
        """Their names."""
        return [info.name for info in self.infos]

    def measured_after(self, place: int) -> list[DataInfo]:
        """Return the sets on which the model after one is measured: all so far whose classes it has."""
        so_far = {info.name: info for info in self.infos[: place + 1]}
        return [info for info in so_far.values() if self._has_classes_of(place, info)]

    def known_before(self, place: int) -> str | None:
        """Return the labels of all that the model before a data set has seen; None for what its own data says.

        Of parts of one set (`digits#0,1`, then `digits#2`) it knows the classes of all of them.
        """
        from finectl.data.classes import chosen_labels, drawn_labels, have_same_labels
        from finectl.models.io import read_config

        before, data = self.infos[:place], self.base.manifest.data
        whole = {info.whole for info in before}
        if not before or whole == {""} or len(whole) > 1:
            return None
        labels = {label for info in before for label in chosen_labels(info)}
        if have_same_labels(data, before[0]):
            labels |= set(drawn_labels(None, self.base.manifest, read_config(self.base).num_classes)[0])
        return ",".join(map(str, sorted(labels)))

    @property
    def mixes_classes(self) -> bool:
        """Whether classes that were learned before could be retained as such, and are not."""
        from finectl.training.chain_settings import BANK

        config = self.plans[-1].config
        return self.known_before(1) is not None and config.retention == BANK and config.bank_labels is None

    def left_out(self, place: int) -> list[str]:
        """Return the earlier sets that cannot be asked of the model after one."""
        there = {info.name for info in self.measured_after(place)}
        return [name for name in dict.fromkeys(self.sets[: place + 1]) if name not in there]

    def _has_classes_of(self, place: int, other: DataInfo) -> bool:
        from finectl.data.classes import have_same_labels

        mine = self.infos[place]
        return (
            self.plans[place].config.label_rows is None
            or have_same_labels({"whole": other.whole, "fingerprint": other.fingerprint}, mine)
            or mine.class_names == other.class_names
        )


def _require_chain(call: Call, base: Artifact, plans: list[Plan[Any]]) -> None:
    """Check what a step needs of the model before it: rows for its classes, and room for `--peft`.

    Raises:
        InputError: there are too few rows.
        UsageError: there is no room.
    """
    from finectl.adapters.peft.table import require_peft, result_config
    from finectl.models.io import read_config
    from finectl.models.label_rows import REUSE, require_rows
    from finectl.stages.finetune.config import peft_of
    from finectl.stages.finetune.plan import student_config

    model = read_config(base)
    for plan in plans:
        require_peft(model, peft_of(plan.config))
        if call.values["label_rows"] == REUSE:
            require_rows(model, plan.data.num_classes, plan.data.name)  # type: ignore[union-attr]
        student = student_config(plan.config, model, plan.data.num_classes)  # type: ignore[union-attr]
        model = result_config(student, peft_of(plan.config))


def _lead(sequel: Sequel, tune: Tune, part: Callable[[], str]) -> None:
    """Fine-tune, measure, and so on; then put all together."""
    call, start_s = sequel.call, time.monotonic()
    if call.options.dry_run:
        _print_plans(sequel, tune)
        return
    if call.values["bank_labels"] is None and sequel.mixes_classes:
        call.console.note("what was learned before is retained under no class; --bank-labels own keeps classes apart")
    models: list[Result] = []
    cells: list[Cell] = []
    for place, name in enumerate(sequel.sets):
        done = f"{place} of {len(sequel.sets)} models are made"
        call.console.note(f"{place + 1} of {len(sequel.sets)}: fine-tuning on {name}")
        known = sequel.known_before(place)
        before = str(models[-1].artifact.path) if models else str(sequel.base.path)  # type: ignore[union-attr]
        options = _left(call, start_s, done)
        options = replace(options, out=options.out if place == len(sequel.sets) - 1 else None)
        models.append(_tuned(step_call(call, place, name, before, known), options, tune, part()))
        _go_on(models[-1], f"{place + 1} of {len(sequel.sets)} models are made")
        for other in sequel.left_out(place):
            call.console.note(f"not measured on {other}: its classes are others than those of {name}")
        for info in sequel.measured_after(place):
            cells.append(_evaluated(sequel, place, info, models[-1], _left(call, start_s, done), part()))
        if call.values["json_output"] and place < len(sequel.sets) - 1:
            print_result(models[-1], True, call.console)
            sys.stdout.flush()
    _collect(sequel, models, cells)


def _follow(call: Call, tune: Tune) -> None:
    """Share the work on each step that the process that leads names."""
    from finectl.runner import run_stage
    from finectl.stages.evaluate import STAGE

    for place in count():
        part = call.options.world.part(f"then/{place}")
        work = part.hear("sequel")
        if work is None:
            return
        options = replace(call.options, world=part, out=None)
        if work["stage"] == TUNE:
            values = {**call.values, **work["values"]}
            tune(replace(call, config={**call.config, **work["values"]}, values=values, inputs=(), options=options))
        else:
            run_stage(STAGE, STAGE.config(**work["config"]), (), options, call.console)


def step_call(call: Call, place: int, name: str, before: str, known: str | None) -> Call:
    """Return the command that fine-tunes on one of the data sets.

    `--bank` is one of INPUT, and goes with the first; what each later model knows is in a bank of its own.

    Args:
        call: The whole command.
        place: Which data set, counted from 0.
        name: The data set.
        before: The model that it starts from.
        known: The classes of a bank of that, where it has seen more than those of its data.
    """
    changed = {"data": name, "labels": known, "then": None, "bank": call.values["bank"] if place == 0 else None}
    config = {**call.config, **{key: value for key, value in changed.items() if key in call.config}}
    return replace(call, config=config, values={**call.values, **changed}, inputs=(before,))


def _tuned(call: Call, options: RunOptions, tune: Tune, part: str) -> Result:
    """Fine-tune once."""
    options = replace(options, world=options.world.part(part))
    changed = {name: call.values[name] for name in ("data", "bank")}
    options.world.tell("sequel", {"stage": TUNE, "values": changed})
    made = tune(replace(call, options=options))
    if made is None or made.artifact is None:
        raise UsageError("fine-tuning made no model", expected="one for each data set")
    return made


def _evaluated(sequel: Sequel, place: int, info: DataInfo, model: Result, options: RunOptions, part: str) -> Cell:
    """Measure the model after one data set on another, quietly: the table comes at the end."""
    from finectl.console import Console
    from finectl.runner import run_stage
    from finectl.stages.evaluate import STAGE
    from finectl.stages.finetune.continual import Cell

    call, path = sequel.call, model.artifact.path  # type: ignore[union-attr]
    call.console.note(f"measuring on {info.name}: {path}")
    config = evaluation_config(call, info)
    asked: tuple[str, ...] = (
        "finectl",
        "evaluate",
        str(path),
        "--data",
        info.name,
        "--samples",
        str(config["samples"]),
    )
    asked += ("--metrics", config["metrics"]) if config["metrics"] else ()
    asked += ("--allow-few",) if config["allow_few"] else ()
    options = replace(options, world=options.world.part(part), out=None, command=asked)
    options.world.tell("sequel", {"stage": EVALUATE, "config": config})
    made = run_stage(STAGE, STAGE.config(**config), [str(path)], options, Console(quiet=True))
    _go_on(made, f"the model after {place + 1} data sets is measured on {info.name}")
    return Cell(place, info.name, made.artifact.path)  # type: ignore[union-attr]


def evaluation_config(call: Call, info: DataInfo) -> dict[str, Any]:
    """Return the options of `finectl evaluate --data SET`, the same as typed by hand."""
    from finectl.cli.evaluate import evaluate
    from finectl.stages.evaluate.config import Config

    parameters = inspect.signature(evaluate).parameters
    config = {name: parameters[name].default for name in Config.__dataclass_fields__ if name in parameters}
    same = ("image_size", "resize_filter", "skip_bad", "text_encoder", "metrics", "allow_few")
    samples = call.values["samples"] or SAMPLES
    return {**config, **{name: call.values[name] for name in same}, "data": info.name, "samples": samples}


def _go_on(made: Result, done: str) -> None:
    """Stop where a signal came too late to stop what was just made.

    Raises:
        Interrupted: it did.
    """
    if made.interrupted:
        raise Interrupted(f"interrupted; {done}", saved=True, fix=GO_ON)


def _left(call: Call, start_s: float, done: str) -> RunOptions:
    """Return the options of one step: `--max-time` is for all of them.

    Raises:
        Interrupted: it is over.
    """
    execution = call.options.execution
    if execution.max_minutes:
        left = execution.max_minutes - (time.monotonic() - start_s) / 60
        if left <= 0:
            raise Interrupted(f"--max-time is over; {done}", saved=True, fix=GO_ON)
        execution = replace(execution, max_minutes=left)
    return replace(call.options, execution=execution)


def _collect(sequel: Sequel, models: list[Result], cells: list[Cell]) -> None:
    """Put the evaluations together, show the table and print the last model."""
    from finectl.runner import run_stage
    from finectl.stages.finetune.continual import Config, collecting, settled
    from finectl.world import World

    call, last = sequel.call, models[-1]
    fields = {name: call.values[name] for name in Config.__dataclass_fields__ if name in call.values}
    config = settled(Config(**{**call.config, **fields, "samples": call.values["samples"] or SAMPLES}), sequel.sets)
    paths = [model.artifact.path for model in models if model.artifact is not None]
    options = replace(call.options, out=None, world=World())
    made = run_stage(collecting(paths, sequel.sets, cells), config, [str(sequel.base.path)], options, call.console)
    if made.cached and made.artifact is not None:
        _show(call, made.artifact)
    call.console.note(f"the table: {made.artifact.path}" if made.artifact else "")
    if call.values["json_output"] and made.artifact is not None:
        more = {"evaluation": str(made.artifact.path), "continual": made.artifact.manifest.metrics["continual"]}
        sys.stdout.write(json.dumps({**answer(last), **more}) + "\n")
    else:
        print_result(last, call.values["json_output"], call.console)


def _show(call: Call, artifact: Artifact) -> None:
    """Show the table of an artifact that was there already."""
    from finectl.stages.finetune.continual import TABLE

    call.console.line(artifact.file(TABLE).read_text().rstrip())


def _print_plans(sequel: Sequel, tune: Tune) -> None:
    """Print the steps; the first is planned with its bank and timed, the others as far as they are known."""
    call, measured = sequel.call, dict[str, Any]()
    before: Path | None = sequel.base.path
    for place, name in enumerate(sequel.sets):
        plan = sequel.plans[place]
        described: dict[str, Any] = {"stage": call.stage.name, "config": asdict(plan.config), **plan.summary}
        if before is not None:
            found = tune(step_call(call, place, name, str(before), sequel.known_before(place)))
            described = found.plan if found is not None else described
            measured = measured or {key: described[key] for key in MEASURED if key in described}
        there = before is not None and described.get("exists")
        before = Path(described["path"]) if there else None
        steps = {
            "step": f"{place + 1} of {len(sequel.sets)}",
            "on": name,
            "from": described.get("inputs", [None])[0] or f"the model of step {place}",
            "then_measured_on": [info.name for info in sequel.measured_after(place)],
            "not_measured_on": sequel.left_out(place),
        }
        from finectl.runner import Result

        print_result(Result(None, False, {**steps, **described, **measured}), call.values["json_output"], call.console)
        sys.stdout.flush()
