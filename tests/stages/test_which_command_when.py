"""The commands of the README's page "Which command when" do their work, here on small networks and few updates."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from small_pairs import make_pairs
from support import ROOT, run_cli, whole

TRAINED = ("--steps", "2", "--batch-size", "8", "--eval-every", "0")
SMALL: dict[str, tuple[str, ...]] = {
    "condense": TRAINED,
    "init": ("--tune-steps", "1"),
    "train": TRAINED,
    "finetune": (*TRAINED, "--bank-samples", "8"),
    "finetune-ranges": TRAINED,
    "merge": ("--search-samples", "150", "--sampling-steps", "2", "--search", "grid", "--grid-max", "0.1"),
    "evaluate": ("--metrics", "loss"),
    "predict": (),
    "tune": ("--steps", "2", "--batch-size", "4"),
}
MADE = {
    "condense": "condensed", "extract": "learngene", "init": "model", "train": "model", "finetune": "model",
    "finetune-ranges": "experts", "merge": "model", "evaluate": "evaluation", "predict": "lora", "tune": "tuned-gan",
}  # fmt: skip
"""What each of them leaves in the workspace."""


def workflows() -> list[str]:
    """Return the command lines of the page."""
    page = (ROOT / "README.md").read_text(encoding="utf-8").split("## Which command when", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^ {4}(finectl .+)$", page, re.M)


def run_line(line: str, places: dict[str, str]) -> list[Path]:
    """Run the commands of a pipe, each with few updates and what stands for its placeholders."""
    path, made = "", []
    for call in line.split("|"):
        words = [places.get(word, word) for word in shlex.split(call)[1:]]
        stage = words[1] if words[0] == "gen-weights" else words[0]
        made.append(run_cli(*words, *SMALL.get(stage, ()), stdin=f"{path}\n").path)
        assert whole(made[-1]).kind == MADE[stage]
        path = str(made[-1])
    return made


@pytest.fixture
def generator(workspace: Path) -> Path:
    pairs = make_pairs(workspace)
    base = run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 2).path
    short = ("--steps", 10, "--checkpoints", 2, "--eval-every", 0)
    collected = run_cli("gen-weights", "collect", base, "--batch-size", 4, "--workers", 1, *short).path
    return run_cli("gen-weights", "train", collected, "--steps", 2, "--batch-size", 4).path


def test_the_page_names_every_system() -> None:
    page = " ".join(workflows())
    assert all(
        word in page for word in ("condense", "finetune ", "finetune-ranges", "merge", "gen-weights", "evaluate")
    )


def test_its_workflows_run(generator: Path, workspace: Path) -> None:
    places = {
        "dit-b": "dit-nano",
        "folder:./images": "digits#5,6",
        "soft blur in warm orange light": "red",
        "GENERATOR": str(generator),
    }
    for line in workflows():
        made = run_line(line, places)
        for path in made:
            places |= {"condensed": {"CONDENSED": str(path)}, "model": {"MODEL": str(path)}}.get(whole(path).kind, {})
        if "finetune -" in line or "finetune MODEL" in line:
            places["FINETUNED"] = str(made[-1])
