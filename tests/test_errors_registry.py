"""Errors with their documented exit codes, and the tables that name code without importing it."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from support import child_environment

from finectl import errors
from finectl.artifacts.kinds import KINDS
from finectl.cli.commands import COMMANDS
from finectl.cli.gen_weights import STEPS
from finectl.data.sources import SOURCES
from finectl.diffusion.schedulers import SCHEDULERS
from finectl.initializers import METHODS
from finectl.metrics import METRICS
from finectl.metrics.features import EXTRACTORS
from finectl.registry import Entry, Registry, nearest

REGISTRIES = {
    "commands": COMMANDS,
    "gen-weights steps": STEPS,
    "methods": METHODS,
    "metrics": METRICS,
    "schedulers": SCHEDULERS,
    "sources": SOURCES,
    "extractors": EXTRACTORS,
}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.FinectlError, 1),
        (errors.UsageError, 2),
        (errors.InputError, 3),
        (errors.OutputError, 4),
        (errors.ComputationError, 5),
        (errors.ResourceError, 6),
    ],
)
def test_exit_codes(error: type[errors.FinectlError], code: int) -> None:
    made = error("what", expected="this", fix="do that")
    assert made.exit_code == code
    assert (made.what, made.expected, made.fix, str(made)) == ("what", "this", "do that", "what")


def test_an_interruption_exits_by_whether_state_was_saved() -> None:
    assert errors.Interrupted("x", saved=True).exit_code == 75
    assert errors.Interrupted("x", saved=False).exit_code == 130


@pytest.mark.parametrize("name", REGISTRIES)
def test_every_entry_of_every_table_is_there(name: str) -> None:
    registry = REGISTRIES[name]
    assert len(registry) > 0
    for entry in registry:
        assert registry.load(entry) is not None
        text = registry[entry].help
        assert text and "\n" not in text
    with pytest.raises(errors.UsageError, match="unknown") as caught:
        registry["no such thing"]
    assert all(entry in caught.value.expected for entry in registry)


def test_listing_the_tables_imports_nothing_heavy() -> None:
    code = (
        "import sys, finectl.cli.commands, finectl.data.sources, finectl.diffusion.schedulers, finectl.initializers,"
        "finectl.metrics, finectl.metrics.features, finectl.artifacts.kinds, finectl.models.presets, finectl.runner,"
        "finectl.training.settings, finectl.stages.condense, finectl.stages.extract, finectl.stages.init,"
        "finectl.stages.train, finectl.stages.sample, finectl.stages.evaluate;"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'rich', 'PIL', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert done.stdout == "[]\n"


def test_every_stage_makes_and_reads_known_kinds() -> None:
    # `convert --to` makes exports instead of models, `evaluate` statistics beside its evaluation, `finetune-ranges`
    # experts out of one artifact each, `gen-weights collect --shard` a part of its weights.
    made = {"export", "statistics", "experts", "weight-shard"}
    names = ("encode", "convert", "condense", "extract", "init", "train", "sample", "evaluate")
    for name in (*names, "bank", "finetune", "finetune_control", "finetune_ranges", "merge", "analyse"):
        stage = importlib.import_module(f"finectl.stages.{name}").STAGE
        made.add(stage.makes)
    for name in STEPS:
        made.add(importlib.import_module(f"finectl.stages.gen_weights.{name}").STAGE.makes)
    assert made == set(KINDS)
    assert {kind for method in METHODS.values() for kind in method.sources} <= set(KINDS)


def test_the_command_that_makes_a_kind_is_a_command() -> None:
    for kind in KINDS.values():
        program, command = kind.made_by.split()[:2]
        assert program == "finectl" and command in COMMANDS


def test_a_registry_loads_on_use_and_names_the_nearest() -> None:
    registry = Registry("thing", {"join": Entry("os.path:join", "x"), "module": Entry("json", "y")})
    import json
    import os.path

    assert registry.load("join") is os.path.join and registry.load("module") is json
    assert list(registry) == ["join", "module"] and "join" in registry and "x" not in registry
    with pytest.raises(errors.UsageError, match=r"unknown thing 'joint' \(did you mean 'join'\?\)"):
        registry["joint"]


def test_nearest_is_silent_about_what_is_far() -> None:
    assert nearest("condens", ["condense", "train"]) == " (did you mean 'condense'?)"
    assert nearest("xyz", ["condense", "train"]) == ""
    assert nearest("", []) == ""
