"""`finectl finetune-ranges`: its options, and how one command makes an expert of each range and puts them together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.cli import groups
from finectl.cli import options as opt
from finectl.cli.banked import with_bank
from finectl.cli.command import Call, print_result, stage_command
from finectl.errors import InputError, Interrupted, OutputError, UsageError

if TYPE_CHECKING:
    from finectl.artifacts.job import Stage
    from finectl.runner import Result, RunOptions

GO_ON = "run the same command again: it goes on from there"
MEASURED = ("step_s", "training_s", "measured")


def run(call: Call) -> Result | None:
    """Make the experts of all ranges, or that of `--only`, and put them together when all are there.

    Returns:
        The experts; the expert of `--only` while others are missing; None for a dry run, which prints its plans, and in
        processes that do not lead.

    Raises:
        UsageError: options contradict each other.
        InputError: the model does not go with the options; with `--collect`, an expert is missing.
        Interrupted: a signal came, or `--max-time` is over; the same command goes on with what is missing.
    """
    ready = with_bank(call, with_one_division, _wants_bank)
    if ready is None:
        return None
    call = ready
    if not call.options.world.leads:
        _follow(call)
        return None
    said = count()
    try:
        return _lead(Ranges.of(call), lambda: f"range/{next(said)}")
    finally:
        call.options.world.part(f"range/{next(said)}").tell("config", None)


def with_one_division(call: Call) -> Call:
    """Drop `--ranges` or `--borders` where the other one is typed and this one comes from a recipe."""
    typed = [name for name in ("ranges", "borders") if call.values[name] is not None and name in call.typed]
    if len(typed) != 1:
        return call
    dropped = {"borders" if typed == ["ranges"] else "ranges": None}
    return replace(call, config={**call.config, **dropped}, values={**call.values, **dropped})


def _wants_bank(call: Call) -> bool:
    """Tell whether a bank is to be found or made."""
    return bool(call.values["method"] == "diff-tuning" and call.values["bank"] is None)


@dataclass(frozen=True)
class Ranges:
    """The ranges of one command.

    Args:
        call: The command.
        base: The path of the model.
        indices: The ranges to make now.
        paths: Where the expert of each range lies, or would lie.
    """

    call: Call
    base: str
    indices: tuple[int, ...]
    paths: tuple[Path, ...]

    @classmethod
    def of(cls, call: Call) -> Ranges:
        """Find the model and plan every expert, so that what is wrong with any is said before work starts.

        Raises:
            UsageError: there is no such range, or options contradict each other.
            InputError: there is no such model, or it does not go with the options.
        """
        from finectl.artifacts.store import Workspace
        from finectl.runner import find_parents, recipe_of
        from finectl.stages.finetune_ranges.config import plan_all
        from finectl.stages.finetune_ranges.expert import plan_of_range

        only, options, stage = call.values["only"], call.options, call.stage
        if only is not None and options.out is not None:
            raise UsageError("--out does not go with --only", expected="--out for all experts together")
        if only is not None and call.values["collect"]:
            raise UsageError("--collect does not go with --only", expected="one of them")
        workspace, config = Workspace(options.workspace), stage.config(**call.config)
        reads = stage.reads(config)
        parents = find_parents(workspace, reads, call.inputs, call.console)
        common = plan_all(config, parents[0])
        plans = [plan_of_range(common, index) for index in range(common.config.ranges or 0)]
        indices = tuple(range(len(plans)) if only is None else [plan_of_range(common, only).config.only or 0])
        names = [f"{plan.slug}-{recipe_of(stage, plan, parents, reads)[:8]}" for plan in plans]
        paths = tuple(workspace.directory(stage.makes, name) for name in names)
        return cls(call, str(parents[0].path), indices, paths)

    def run(self, index: int, options: RunOptions, stage: Stage[Any] | None = None) -> Result:
        """Run the stage for one range."""
        from finectl.runner import run_stage

        config = self.call.stage.config(**{**self.call.config, "only": index})
        return run_stage(stage or self.call.stage, config, [self.base], options, self.call.console)

    @property
    def missing(self) -> list[int]:
        """The ranges whose experts are not there."""
        from finectl.artifacts.manifest import NAME

        return [index for index, path in enumerate(self.paths) if not (path / NAME).is_file()]

    def command(self, index: int) -> tuple[str, ...]:
        """Return the command that makes the expert of one range."""
        given = [word for word in self.call.options.command if word != "--collect"]
        return (*given, *(() if self.call.values["only"] is not None else ("--only", str(index))))

    def collect(self) -> Result:
        """Put the experts together."""
        from finectl.runner import run_stage
        from finectl.stages.finetune_ranges.collection import collecting

        config = self.call.stage.config(**{**self.call.config, "only": None})
        return run_stage(collecting(self.paths), config, [self.base], self.call.options, self.call.console)


def _lead(ranges: Ranges, part: Callable[[], str]) -> Result | None:
    """Make one expert after another, then put them together."""
    call = ranges.call
    if call.options.dry_run:
        _print_plans(ranges)
        return None
    start_s, made = time.monotonic(), None
    if call.values["collect"]:
        _require_all(ranges)
    for index in () if call.values["collect"] else ranges.indices:
        options = _options_of(ranges, index, start_s)
        options = replace(options, world=options.world.part(part()))
        options.world.tell("config", {**call.config, "only": index})
        if len(ranges.indices) > 1:
            call.console.note(f"range {index} of 0 to {len(ranges.paths) - 1}")
        made = ranges.run(index, options)
        if made.interrupted:
            raise Interrupted(f"interrupted; the expert of range {index} is made", saved=True, fix=GO_ON)
    if missing := ranges.missing:
        listed = ", ".join(map(str, missing))
        call.console.note(f"experts are put together when all are there; missing: {listed} (--only {missing[0]})")
        return made
    try:
        return ranges.collect()
    except OutputError:
        if call.values["only"] is None:
            raise
        call.console.note("another process is putting the experts together")
        return made


def _follow(call: Call) -> None:
    """Share the work on each expert that the process that leads names."""
    from finectl.runner import run_stage

    for place in count():
        part = call.options.world.part(f"range/{place}")
        config = part.hear("config")
        if config is None:
            return
        options = replace(call.options, world=part, out=None)
        run_stage(call.stage, call.stage.config(**config), (), options, call.console)


def _options_of(ranges: Ranges, index: int, start_s: float) -> RunOptions:
    """Return the options of one expert: `--max-time` is for all of them, `--out` for what they come together in.

    Raises:
        Interrupted: `--max-time` is over.
    """
    options = ranges.call.options
    execution = options.execution
    if execution.max_minutes:
        left = execution.max_minutes - (time.monotonic() - start_s) / 60
        if left <= 0:
            raise Interrupted(f"--max-time is over before range {index}", saved=True, fix=GO_ON)
        execution = replace(execution, max_minutes=left)
    return replace(options, execution=execution, out=None, command=ranges.command(index))


def _require_all(ranges: Ranges) -> None:
    """Check that no expert is missing.

    Raises:
        InputError: one is.
    """
    if not ranges.missing:
        return
    index = ranges.missing[0]
    raise InputError(
        f"the expert of range {index} is missing: there is none at {ranges.paths[index]}",
        expected=f"the experts of all {len(ranges.paths)} ranges",
        fix=" ".join(ranges.command(index)),
    )


def _print_plans(ranges: Ranges) -> None:
    """Print the plan of every range; one step is timed, that of the first, as all ranges have the same."""
    call = ranges.call
    options = replace(call.options, out=None)
    measured: dict[str, Any] = {}
    for index in ranges.indices:
        result = ranges.run(index, options, replace(call.stage, measure=None) if measured else None)
        measured = measured or {name: result.plan[name] for name in MEASURED}
        print_result(replace(result, plan={**result.plan, **measured}), call.values["json_output"], call.console)
        sys.stdout.flush()


@stage_command(
    "finectl.stages.finetune_ranges",
    groups.data,
    groups.training,
    groups.optimiser,
    groups.captions,
    groups.training_run,
    run=run,
)
def finetune_ranges(
    input: opt.Input = None,
    weights: opt.Weights = "ema",
    ranges: opt.RangeCount = None,
    borders: opt.Borders = None,
    p: opt.GlobalP = 0.4,
    coin: opt.Coin = "batch",
    antithetic: opt.Antithetic = False,
    method: opt.RangeMethod = "deme",
    consistency: opt.ConsistencyWeight = None,
    teacher: opt.RangeTeacher = "frozen",
    retention_power: opt.RetentionPower = None,
    retention_weight: opt.RetentionWeight = None,
    retention_share: opt.RetentionShare = None,
    bank: opt.Bank = None,
    bank_samples: opt.BankSamples = None,
    projection: opt.Projection = "blocks",
    only: opt.OnlyRange = None,
    collect: opt.Collect = False,
    steps: opt.RangeSteps = None,
    batch_size: opt.RangeBatchSize = None,
    lr: opt.RangeLr = None,
    warmup_steps: opt.RangeWarmup = None,
    weight_decay: opt.WeightDecay = 1e-6,
    clip_grad: opt.ClipGrad = 1.0,
    ema: opt.RangeEma = None,
    ema_power: opt.EmaPower = 0.75,
) -> None:
    """Fine-tune a model into one expert for each range of timesteps (DeMe).

    Ranges are independent: --only makes one, in an array job, say; whichever is last puts them together. With --method
    diff-tuning experts retain images of the model (finectl bank) instead of being held to its predictions.
    """
