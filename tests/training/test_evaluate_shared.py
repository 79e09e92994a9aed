"""Two processes evaluate what one does, to the last digit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Pair
from support import run_cli


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    both = Pair()
    yield both
    both.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((path / "metrics.json").read_text())
    return rows


def test_two_processes_and_one_give_the_same_values(pair: Pair, chain: Any, workspace: Path) -> None:
    options = ("--samples", 70, "--sampling-steps", 2, "--draws", 3, "--batch-size", 20)
    arguments = ("evaluate", chain.init, chain.model, *options)
    lead, follow = pair(*arguments, workspace=workspace)
    assert (follow.code, follow.out, follow.err) == (0, "", "")
    alone = run_cli(*arguments, "--force").path
    assert alone.name == lead.path.name
    together = pair(*arguments, "--force", workspace=workspace)[0].path
    for one, other in zip(rows_of(alone), rows_of(together), strict=True):
        for name in ("loss", "frechet", "accuracy"):
            assert one[name]["value"] == pytest.approx(other[name]["value"], rel=1e-9)
            assert one[name]["protocol"] == other[name]["protocol"]


def test_an_error_of_the_work_ends_both(pair: Pair, chain: Any, workspace: Path) -> None:
    lead, follow = pair("evaluate", chain.model, "--samples", 3, workspace=workspace)
    assert (lead.code, follow.code) == (2, 2) and "at least 64 images" in lead.err
