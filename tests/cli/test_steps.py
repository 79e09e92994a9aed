"""Commands with steps of their own: listed, completed, parsed and refused like every other."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cli.test_bad_input import refused
from cli.test_completion import complete
from cli.test_startup import modules_after
from support import run_cli

from finectl.cli.commands import section_of, typed
from finectl.cli.completion import script
from finectl.cli.gen_weights import STEPS
from finectl.errors import EXIT_INPUT, EXIT_USAGE


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


def test_a_command_that_runs_without_a_step_has_steps_too(workspace: Path) -> None:
    shown = run_cli("analyse", "--help").out
    assert "Usage: finectl analyse " in shown and "--plane" in shown and "\nSteps:\n  forgetting " in shown
    assert "Usage: finectl analyse forgetting " in run_cli("analyse", "forgetting", "--help").out
    assert "--plane" not in run_cli("analyse", "forgetting", "--help").out
    assert modules_after("from finectl.cli.main import main; main(['analyse', 'forgetting', '--help'])") == []
    refused(run_cli("analyse"), EXIT_INPUT, "finectl finetune-ranges")
    refused(run_cli("analyse", "latest"), EXIT_INPUT)
    refused(run_cli("analyse", "experts/forgetting"), EXIT_INPUT)
    refused(run_cli("analyse", "forgeting"), EXIT_USAGE, "no analyse step 'forgeting' (did you mean 'forgetting'?)")
    refused(run_cli("analyse", "forgetting", "--plane", "0,1"), EXIT_USAGE, "finectl analyse forgetting --help")


def test_an_artifact_named_as_a_path_is_no_step(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "forgettings").mkdir()
    refused(run_cli("analyse", "forgettings"), EXIT_INPUT, "forgettings")


def test_bash_completes_a_command_with_and_without_its_step(tmp_path: Path) -> None:
    """With the script that the generator writes, whatever is committed."""

    def offered(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("finectl", *words))
        (tmp_path / "script").write_text(script("bash"))
        code = f"source {tmp_path}/script; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _finectl; "
        done = subprocess.run(
            ["bash", "-u", "-c", code + "printf '%s\\n' \"${COMPREPLY[@]}\""],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    assert "forgetting" in offered("analyse", "forg") and "latest" in offered("analyse", "")
    assert offered("analyse", "--pla") == ["--plane"] and offered("analyse", "latest", "--pla") == ["--plane"]
    assert offered("analyse", "forgetting", "--fisher-d") == ["--fisher-draws"]
    assert offered("analyse", "forgetting", "--plane")[:1] != ["--plane"]
    assert offered("analyse", "forgetting", "--scheduler", "dd") == ["ddpm", "ddim"]
    assert "latest" in offered("analyse", "forgetting", "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_take_the_script_of_such_a_command(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script(shell))
    done = subprocess.run([program, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    if shell == "fish":
        code = f"source {tmp_path}/script; complete -C 'finectl analyse forgetting --fisher-d'; "
        code += "complete -C 'finectl analyse --pla'; complete -C 'finectl analyse forg'"
        found = subprocess.run([program, "-c", code], capture_output=True, text=True, check=True).stdout
        assert [line.split("\t")[0] for line in found.splitlines()] == ["--fisher-draws", "--plane", "forgetting"]


def test_names_of_steps_in_recipes() -> None:
    assert typed("analyse-forgetting") == "finectl analyse forgetting"
    assert section_of("finectl analyse forgetting") == "analyse-forgetting"
    assert section_of("finectl analyse") == typed("analyse").removeprefix("finectl ") == "analyse"
    assert section_of("finectl gen-weights prompts") == "gen-weights-prompts"
    assert section_of("finectl train") == section_of("train") == "train"
    assert typed("gen-weights-prompts") == "finectl gen-weights prompts"
    assert typed("finetune-ranges") == "finectl finetune-ranges"
