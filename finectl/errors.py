"""Every error that a user can cause, with its documented exit code.

A raised `FinectlError` says what is wrong, what was expected and which command mends it; `finectl.cli.main` prints it
as one block. Anything else that escapes is a bug in finectl (exit code 1).
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_INPUT = 3
EXIT_OUTPUT = 4
EXIT_COMPUTATION = 5
EXIT_RESOURCES = 6
EXIT_SAVED = 75
EXIT_INTERRUPTED = 130


class FinectlError(Exception):
    """What is wrong, what was expected, and the command that mends it.

    Args:
        what: The fault, with both values and their units.
        expected: What would have been right; empty when `what` says it.
        fix: A command or an action that mends it; empty when there is none.
    """

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.fix = fix


class UsageError(FinectlError):
    """An option, a recipe or a configuration is wrong (exit code 2)."""

    exit_code = EXIT_USAGE


class InputError(FinectlError):
    """An input artifact, checkpoint or data set is missing, corrupt or does not fit (exit code 3)."""

    exit_code = EXIT_INPUT


class OutputError(FinectlError):
    """The output is locked by another process or something is in its way (exit code 4)."""

    exit_code = EXIT_OUTPUT


class ComputationError(FinectlError):
    """The computation failed: a loss is not finite, or a `--fail-if` condition is met (exit code 5)."""

    exit_code = EXIT_COMPUTATION


class PeerLostError(ComputationError):
    """Another process of this run is gone (exit code 5).

    What it shared with this one cannot be taken down in order: that may wait for the lost one. So this process leaves
    without it.
    """


class ResourceError(FinectlError):
    """Memory or disk ran out (exit code 6)."""

    exit_code = EXIT_RESOURCES


class Interrupted(FinectlError):
    """A signal stopped the work; `saved` says whether the same command goes on from saved state (75) or not (130)."""

    def __init__(self, what: str, *, saved: bool, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.exit_code = EXIT_SAVED if saved else EXIT_INTERRUPTED
