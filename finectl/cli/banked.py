"""The bank of a command that retains images and names none: found or made first, by all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.cli.bank import bank_for
from finectl.cli.command import Call
from finectl.errors import UsageError

if TYPE_CHECKING:
    from finectl.artifacts.store import Artifact


def with_bank(call: Call, prepare: Callable[[Call], Call], wants: Callable[[Call], bool]) -> Call | None:
    """Name the bank and the model of a command that wants a bank; all processes of a run call this.

    Args:
        call: The command.
        prepare: What is done with it first; a fault that the process that leads finds there ends all of them.
        wants: Whether a prepared command wants a bank, by its options alone.

    Returns:
        The command; None in processes that do not lead, where the one that leads found a fault, which it says itself.

    Raises:
        UsageError: `--bank-samples` is given, and no bank would be made.
        InputError: there is no such model.
        Interrupted: a signal came while the bank was made; the same command goes on.
    """
    world = call.options.world
    if not world.leads:
        return _follow(prepare(call), wants) if world.hear("model") else None
    ready, made = False, False
    try:
        call = prepare(call)
        model = _model_of(call) if wants(call) else None
        if model is None:
            _require_no_samples(call)
        ready = True
    finally:
        world.tell("model", ready)
    if model is None:
        return call
    path: str | None = None
    try:
        bank = bank_for(call, model)
        path, made = None if bank is None else str(bank), True
    finally:
        world.tell("bank", {"made": made, "path": path})
    return replace(_named(call, path), inputs=(str(model.path),))


def _follow(call: Call, wants: Callable[[Call], bool]) -> Call | None:
    """Share the work on the bank, and name the one that the process that leads took."""
    if not wants(call):
        return call
    bank_for(call, None)
    answer = call.options.world.hear("bank")
    return _named(call, answer["path"]) if answer["made"] else None


def _named(call: Call, bank: str | None) -> Call:
    return replace(call, config={**call.config, "bank": bank}, values={**call.values, "bank": bank})


def _model_of(call: Call) -> Artifact:
    """Return the model that is fine-tuned."""
    from finectl.artifacts.store import Workspace
    from finectl.runner import find_parents

    reads = call.stage.reads(call.stage.config(**call.config))
    return find_parents(Workspace(call.options.workspace), reads, call.inputs, call.console)[0]


def _require_no_samples(call: Call) -> None:
    if (samples := call.values["bank_samples"]) is not None:
        raise UsageError(
            f"--bank-samples {samples}: no bank is made with these options",
            expected="images that are retained, and no --bank",
            fix="leave --bank-samples out",
        )
