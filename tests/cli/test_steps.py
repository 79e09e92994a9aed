"""Commands with steps of their own: listed, completed, parsed and refused like every other."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli.test_bad_input import refused
from cli.test_completion import complete
from cli.test_startup import modules_after
from support import run_cli

from finectl.cli.commands import section_of, typed
from finectl.cli.gen_weights import STEPS
from finectl.errors import EXIT_USAGE


def test_help_lists_the_steps_without_importing_them() -> None:
    ran = run_cli("gen-weights", "--help")
    assert ran.code == 0
    for name, entry in STEPS.items():
        assert f"  {name} " in ran.out and entry.help.split()[0] in ran.out
    code = "from finectl.cli.main import main; main(['gen-weights', '--help'])"
    unwanted = "; assert not [m for m in sys.modules if m.startswith('finectl.cli.gen_weights.')]"
    assert modules_after(code + unwanted) == []


@pytest.mark.parametrize("step", STEPS)
def test_help_of_a_step_imports_nothing_heavy(step: str) -> None:
    assert modules_after(f"from finectl.cli.main import main; main(['gen-weights', '{step}', '--help'])") == []
    assert f"Usage: finectl gen-weights {step} " in run_cli("gen-weights", step, "--help").out


def test_a_typo_names_the_nearest_step() -> None:
    ran = run_cli("gen-weights", "promts")
    refused(ran, EXIT_USAGE, "no gen-weights step 'promts' (did you mean 'prompts'?)", "finectl gen-weights --help")
    refused(run_cli("gen-weights", "prompts", "--combination", "1"), EXIT_USAGE, "finectl gen-weights prompts --help")


def test_no_step_shows_the_help() -> None:
    ran = run_cli("gen-weights")
    assert ran.code == EXIT_USAGE and ran.out == "" and "prompts" in ran.err


def test_bash_completes_steps_and_their_options() -> None:
    assert set(complete("gen-weights", "")) == set(STEPS)
    assert complete("gen-weights", "prom") == ["prompts"]
    assert complete("gen-weights", "prompts", "--comb") == ["--combinations"]
    assert "--rank" not in complete("gen-weights", "train", "--") if "train" in STEPS else True
    assert complete("gen-weights", "pairs", "--layout", "ha") == ["halves"]


def test_a_recipe_has_a_section_a_step(workspace: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("gen-weights-prompts:\n  combinations: 7\n  set: art,facial\n")
    ran = run_cli("gen-weights", "prompts", "--recipe", recipe, "--dry-run", "--json")
    assert ran.code == 0 and '"combinations": 7' in ran.out, ran.err
    recipe.write_text("gen-weights-prompts:\n  combination: 7\n")
    ran = run_cli("gen-weights", "prompts", "--recipe", recipe)
    refused(ran, EXIT_USAGE, "'finectl gen-weights prompts' (did you mean 'combinations'?)")


def test_a_manifest_is_a_recipe_of_its_step(workspace: Path) -> None:
    made = run_cli("gen-weights", "prompts", "--set", "facial").path
    again = run_cli("gen-weights", "prompts", "--recipe", made)
    assert "already there" in again.err and again.path.resolve() == made.resolve()
    refused(run_cli("train", "--recipe", made), EXIT_USAGE, "finectl gen-weights prompts --recipe")


def test_names_of_steps_in_recipes() -> None:
    assert section_of("finectl gen-weights prompts") == "gen-weights-prompts"
    assert section_of("finectl train") == section_of("train") == "train"
    assert typed("gen-weights-prompts") == "finectl gen-weights prompts"
    assert typed("finetune-ranges") == "finectl finetune-ranges"
