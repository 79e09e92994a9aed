"""The packages that only some strategies need."""

from __future__ import annotations

from typing import Any

from finectl.errors import UsageError

COMMAND = "pip install 'finectl[search]'"


def import_optuna() -> Any:
    """Import optuna and silence its notes of every trial.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError("--search bayes and cma-es need optuna", expected="it installed", fix=COMMAND) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def require_cmaes() -> None:
    """Check that the package is there with which optuna runs CMA-ES.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import cmaes  # noqa: F401
    except ImportError as error:
        raise UsageError("--search cma-es needs the package cmaes", expected="it installed", fix=COMMAND) from error
