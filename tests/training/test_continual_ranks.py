"""`finetune --then` by two processes: the bank, the model and the measurements of every step are shared."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import Pair
from support import run_cli

from finectl.artifacts.manifest import read_manifest
from finectl.errors import EXIT_INPUT

SETS = ("--data", "digits#3,4", "--then", "digits#5,6")
FEW = ("--steps", 2, "--batch-size", 8, "--eval-every", 0, "--bank-samples", 8, "--metrics", "loss", "--device", "cpu")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two processes that run one command after another."""
    both = Pair()
    yield both
    both.close()


@pytest.fixture
def model(workspace: Path) -> Path:
    return run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", "digits#0,1").path


@pytest.mark.slow
def test_two_processes_share_every_step(pair: Pair, model: Path, workspace: Path, tmp_path: Path) -> None:
    lead, follow = pair("finetune", model, *SETS, *FEW, workspace=workspace)
    assert (follow.code, follow.out, follow.err) == (0, "", ""), "one process writes and prints"
    alone = run_cli("finetune", model, *SETS, *FEW, "--workspace", tmp_path / "alone").path
    for mine, theirs in zip(_line(lead.path), _line(alone), strict=True):
        one, other = (dict(read_manifest(path).config, bank=None) for path in (mine, theirs))
        assert one == other
    assert read_manifest(lead.path).execution["world_size"] == 2
    (table,) = (path for path in (workspace / "evaluation").glob("*-then-2-*"))
    assert len(read_manifest(table).metrics["continual"]) == 2


def test_the_other_process_leaves_where_a_set_is_wrong(pair: Pair, model: Path, workspace: Path) -> None:
    lead, follow = pair("finetune", model, "--data", "digits#3", "--then", "photos", *FEW, workspace=workspace)
    assert lead.code == EXIT_INPUT and "photos" in lead.err
    assert (follow.code, follow.out, follow.err) == (0, "", "")


def _line(last: Path) -> list[Path]:
    """Return the last model and the one before it."""
    return [last, (last / read_manifest(last).parents[0].path).resolve()]
