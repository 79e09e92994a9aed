"""Recipes: the files of this repository, the user's own, and manifests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, Ran, run_cli

from finectl.cli.commands import COMMANDS
from finectl.cli.gen_weights import STEPS
from finectl.cli.main import build_command
from finectl.cli.recipe import load_recipe
from finectl.errors import EXIT_INPUT, EXIT_USAGE

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STAGES = ("encode", "convert", "condense", "extract", "init", "train", "bank", "finetune")
STAGES += ("finetune-ranges", "sample", "evaluate")
STAGES += tuple(f"gen-weights-{step}" for step in STEPS)


def parameters(stage: str) -> list[str]:
    step = stage.removeprefix("gen-weights-")
    if step != stage:
        return [parameter.name for parameter in build_command(step, STEPS).params]
    return [parameter.name for parameter in build_command(stage).params]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_recipe_of_this_repository_parses(path: Path, workspace: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict) and content
    variants = {name: part for name, part in content.items() if name not in STAGES}
    content = {name: part for name, part in content.items() if name in STAGES}
    for variant, sections in {"": content, **variants}.items():
        chosen = path.with_name(f"{path.name}:{variant}") if variant else path
        for stage, section in sections.items():
            assert stage in STAGES, f"{path.name} has a section {stage!r}, which is no stage"
            values = load_recipe(chosen, stage, parameters(stage))
            assert len(values) == len(section) > 0
            for key, value in values.items():
                written = section.get(key.replace("_", "-"))
                if isinstance(written, int | float) and not isinstance(written, bool):
                    assert float(value) == written


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def planned(*arguments: object) -> dict[str, Any]:
    ran = run_cli(*arguments, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    config: dict[str, Any] = json.loads(ran.out)["config"]
    return config


def test_a_recipe_gives_defaults_and_the_command_line_wins(workspace: Path, tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        "condense:\n  depth: 3\n  batch-size: 7\n  learn_sigma: true\n  lr: 2e-4\n  factorize: [qkv, o]\n  seed:\n"
        "train:\n  steps: 5\n",
    )
    config = planned("condense", "--recipe", path)
    assert (config["depth"], config["batch_size"], config["learn_sigma"], config["lr"]) == (3, 7, True, 2e-4)
    assert config["factorize"] == "qkv,o" and config["seed"] == 0
    config = planned("condense", "--depth", 4, "--recipe", path, "--no-learn-sigma", "--factorize", "in")
    assert (config["depth"], config["batch_size"], config["learn_sigma"], config["factorize"]) == (4, 7, False, "in")


def test_a_recipe_may_name_inputs(chain: Any, tmp_path: Path) -> None:
    path = recipe(tmp_path, f"evaluate:\n  inputs: [{chain.init}, {chain.model}]\n  metrics: [loss]\n")
    ran = run_cli("evaluate", "--recipe", path, "--dry-run", "--json")
    assert json.loads(ran.out)["inputs"] == [str(chain.init), str(chain.model)]
    path = recipe(tmp_path, f"train:\n  input: {chain.init}\n")
    ran = run_cli("train", "--recipe", path, "--dry-run", "--json")
    assert json.loads(ran.out)["inputs"] == [str(chain.init)]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("condense:\n  dept: 3\n", EXIT_USAGE, "did you mean 'depth'"),
        ("condense:\n  out: x\n", EXIT_USAGE, "'out'"),
        ("condens:\n  depth: 3\n", EXIT_USAGE, "condens"),
        ("condense: 3\n", EXIT_USAGE, "not a table"),
        ("- 1\n", EXIT_USAGE, "not a table"),
        ("", EXIT_USAGE, "not a table"),
        ("condense:\n  depth: 0\n", EXIT_USAGE, "x>=1"),
        ("condense:\n  depth: deep\n", EXIT_USAGE, "deep"),
        ("condense:\n  depth: {a: 1}\n", EXIT_USAGE, "depth"),
        ("condense:\n  depth: [{a: 1}]\n", EXIT_USAGE, "depth"),
        ("condense:\n  depth: 2.5\n", EXIT_USAGE, "2.5"),
        ("condense:\n  depth: true\n", EXIT_USAGE, "True"),
        ("condense:\n  depth: 2024-01-01\n", EXIT_USAGE, "depth"),
        ("condense:\n  lr: .nan\n", EXIT_USAGE, "nan"),
        ("condense:\n  depth: !!python/name:os.system\n", EXIT_INPUT, "plain YAML"),
        ("condense: [\n", EXIT_INPUT, "plain YAML"),
    ],
)
def test_a_wrong_recipe(text: str, code: int, says: str, workspace: Path, tmp_path: Path) -> None:
    ran = run_cli("condense", "--recipe", recipe(tmp_path, text))
    assert ran.code == code and says in ran.err and ran.out == "", ran.err
    assert "Traceback" not in ran.err and "bug" not in ran.err
    assert not workspace.exists()


def test_a_recipe_that_is_not_there(workspace: Path, tmp_path: Path) -> None:
    ran = run_cli("condense", "--recipe", tmp_path / "none.yaml")
    assert ran.code == EXIT_INPUT and "none.yaml" in ran.err


def stage_of(artifact: Path) -> str:
    return str(yaml.safe_load((artifact / "manifest.yaml").read_text())["stage"])


def test_a_manifest_is_a_recipe_of_its_own_artifact(chain: Any) -> None:
    sampled = run_cli("sample", chain.model, "--samples", 2, "--sampling-steps", 1, "--labels", "3,1").path
    measured = run_cli("evaluate", chain.init, chain.model, "--metrics", "loss", "--draws", 1).path
    control = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1).path
    for artifact in (chain.condensed, chain.learngene, chain.init, chain.model, sampled, measured, control):
        for recipe_path in (artifact / "manifest.yaml", artifact):
            ran = run_cli(stage_of(artifact), "--recipe", recipe_path)
            assert "already there" in ran.err, f"{stage_of(artifact)}: {ran.err}"
            assert ran.path.resolve() == artifact.resolve()


def test_a_manifest_is_no_recipe_of_another_stage(chain: Any) -> None:
    ran: Ran = run_cli("train", "--recipe", chain.condensed)
    assert ran.code == EXIT_USAGE and "finectl condense --recipe" in ran.err


def test_every_stage_has_an_option_for_every_field_of_its_config() -> None:
    """What a manifest records must be what the command line takes, or no artifact could be made again."""
    import dataclasses
    import importlib

    for stage in STAGES:
        step = stage.removeprefix("gen-weights-")
        module = stage.replace("-", "_") if step == stage else f"gen_weights.{step}"
        declared = importlib.import_module(f"finectl.stages.{module}").STAGE
        assert declared.name == stage
        assert stage in COMMANDS or step in STEPS
        fields = {field.name for field in dataclasses.fields(declared.config)}
        known = set(parameters(stage))
        assert {name for name in fields - known if not name.endswith("_digest")} == set()
