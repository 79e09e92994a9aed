"""fine-cp: FINE from the learngene of a dense ancestor, and from no other."""

from __future__ import annotations

from pathlib import Path

from support import run_cli, weights

from finectl.artifacts.manifest import read_manifest
from finectl.errors import EXIT_INPUT

TUNING = ("--depth", 2, "--tune-steps", 2, "--batch-size", 8)


def test_it_is_fine_on_a_learngene_of_a_dense_ancestor(workspace: Path) -> None:
    dense = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 3).path
    fitted = run_cli("condense", "--from", dense, "--cp-iterations", 2).path
    learngene = run_cli("extract", fitted).path
    made = run_cli("init", learngene, "--method", "fine-cp", *TUNING).path
    usual = run_cli("init", learngene, "--method", "fine", *TUNING).path
    assert made != usual and weights(made) == weights(usual)
    assert read_manifest(made).config["sigma"] == "nearest" and read_manifest(made).metrics["method"] == "fine-cp"


def test_a_learngene_that_was_pre_trained_is_refused(workspace: Path) -> None:
    condensed = run_cli("condense", "--depth", 2, "--steps", 2, "--batch-size", 8).path
    learngene = run_cli("extract", condensed).path
    ran = run_cli("init", learngene, "--method", "fine-cp", *TUNING)
    assert ran.code == EXIT_INPUT and "finectl condense --from MODEL | finectl extract -" in ran.err
    assert "expected:" in ran.err and "--method fine" in ran.err
