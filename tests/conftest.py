"""Isolation of every test, and artifacts that are made once and copied."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before torch is imported by anything: the suite runs on as many processes as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Decoded images and hub downloads of the tests go here, and nothing of the user's is found.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="finectl-test-cache-")

from support import TINY_DATA, run_cli  # after the environment is set

LEAST_FREE_BYTES = 2**30
USER_VARIABLES = ("FINECTL_WORKSPACE", "FINECTL_DEBUG", "NO_COLOR", "FORCE_COLOR", "COLUMNS")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests that sync thousands of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < LEAST_FREE_BYTES:
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="finectl-test-", dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def workspace(fast_disk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace of the test's own, named by `$FINECTL_WORKSPACE`."""
    root = fast_disk / "artifacts"
    monkeypatch.setenv("FINECTL_WORKSPACE", str(root))
    return root


@dataclass(frozen=True)
class Chain:
    """One artifact of each kind, made from one another."""

    root: Path
    condensed: Path
    learngene: Path
    init: Path
    model: Path


@pytest.fixture(scope="session")
def _chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    root = tmp_path_factory.mktemp("chain")
    place = ("--workspace", root)
    condensed = run_cli("condense", "--depth", 2, *TINY_DATA, *place).path
    learngene = run_cli("extract", condensed, *place).path
    init = run_cli("init", learngene, "--depth", 3, "--tune-steps", 2, "--batch-size", 8, *place).path
    model = run_cli("train", init, *TINY_DATA, *place).path
    yield Chain(root, condensed, learngene, init, model)


@pytest.fixture
def chain(_chain: Chain, workspace: Path) -> Chain:
    """A workspace of the test's own: condensed -> learngene -> init -> trained model, to be harmed at will."""
    shutil.copytree(_chain.root, workspace, symlinks=True)

    def moved(path: Path) -> Path:
        return workspace / path.relative_to(_chain.root)

    return Chain(workspace, *map(moved, (_chain.condensed, _chain.learngene, _chain.init, _chain.model)))
