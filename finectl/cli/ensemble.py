"""`--ensemble`: experts of timestep ranges as one model, each timestep its own expert."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from finectl.cli.command import Call, run_one
from finectl.errors import UsageError

if TYPE_CHECKING:
    from finectl.runner import Result


def with_ensemble(call: Call) -> Call:
    """Make the experts of `--ensemble` the last input; without the option, return the command as it is.

    The artifact is that of the same experts as INPUT.

    Raises:
        UsageError: a stage that takes one INPUT is given both.
        InputError: there are no such experts.
    """
    from finectl.artifacts.job import Reads
    from finectl.artifacts.store import Workspace
    from finectl.models.experts import KIND
    from finectl.runner import find_parents

    named = call.values["ensemble"]
    if named is None:
        return call
    if "input" in call.values and call.inputs:
        raise UsageError(f"INPUT {call.inputs[0]} and --ensemble {named}", expected="one of them")
    if not call.options.world.leads:
        return call  # the process that leads says what is read
    (experts,) = find_parents(Workspace(call.options.workspace), Reads("model", (KIND,)), [named], call.console)
    return replace(call, inputs=(*call.inputs, str(experts.path)))


def run(call: Call) -> Result | None:
    """Run a stage that takes `--ensemble`."""
    return run_one(with_ensemble(call))
