"""The method that the README writes as an example is a whole one: it registers, explains itself and runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, run_cli

import finectl.initializers
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.initializers import METHODS, Method
from finectl.models.io import load_weights

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Add a method")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)
MODULE = "finectl.initializers.stack"
LONGEST = 15


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """The README's file in the package, and its entry in the table."""
    module, entry = BLOCKS
    (tmp_path / "stack.py").write_text(module)
    monkeypatch.setattr(finectl.initializers, "__path__", [*finectl.initializers.__path__, str(tmp_path)])
    entries: dict[str, Method] = eval(f"{{{entry}}}", {"Method": Method})
    for name, method in entries.items():
        monkeypatch.setitem(METHODS._entries, name, method)
    yield entries["stack"]
    sys.modules.pop(MODULE, None)


def test_the_readme_says_all_that_is_to_be_done(stack: Method) -> None:
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= LONGEST
    assert stack.target == f"{MODULE}:initialize"
    contract = (ROOT / "pyproject.toml").read_text()
    assert f'`"{MODULE}",`' in SECTION and '"finectl.initializers.he",' in contract, "the form of the contract's lines"
    assert "pytest tests/initializers/test_methods.py -k stack" in SECTION
    assert (ROOT / "tests/initializers/test_methods.py").is_file()


def test_the_readmes_method_runs(stack: Method, chain: Any) -> None:
    made = run_cli("init", chain.model, "--method", "stack", "--depth", 5).path
    source, target = (load_weights(open_artifact(path), "ema") for path in (chain.model, made))
    depth = read_manifest(chain.init).config["depth"]
    for name, value in target.items():
        before = re.sub(r"(?<=^blocks\.)\d+", lambda match: str(int(match.group()) % depth), name)
        assert torch.equal(value, source[before]), name
    metrics = read_manifest(made).metrics
    assert metrics["method"] == "stack" and metrics["parameters_transferred"] > 0


def test_the_readmes_method_is_listed_and_explained(stack: Method, chain: Any) -> None:
    assert f"| {stack.help} |" in re.sub(" +", " ", run_cli("ls", "methods").out)
    assert f"stack: {stack.help}." in " ".join(run_cli("init", "--method", "stack", "--help").out.split())
    family = run_cli("init", chain.model, "--method", "he,stack", "--depths", "2,3")
    assert [Path(line).name.split("-l")[0] for line in family.out.splitlines()] == ["dit-nano-he"] * 2 + [
        "dit-nano-stack"
    ] * 2
