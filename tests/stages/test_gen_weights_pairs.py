"""`gen-weights prompts` and `gen-weights pairs` end to end: resumed, chosen by CLIP, imported, refused."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import Ran, run_cli, weights, whole

from finectl.data.concepts import read_concepts
from finectl.data.edits import apply
from finectl.data.pairs import SPLITS, open_pairs
from finectl.errors import EXIT_INPUT, EXIT_USAGE

SMALL = ("--images", 6, "--image-size", 16, "--batch-size", 4)


def prompts(*arguments: object) -> Path:
    return run_cli("gen-weights", "prompts", *arguments).path


def refused(ran: Ran, code: int, *words: str) -> None:
    assert ran.code == code and ran.out == "", ran.err
    for word in words:
        assert word in ran.err, ran.err


def concept_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def two(workspace: Path, tmp_path: Path) -> Path:
    """Prompts of two builtin edits."""
    return prompts(
        "--set",
        concept_file(
            tmp_path / "two.jsonl",
            {"prompt": "old print", "edit": "sepia:blur"},
            {"prompt": "sharp lines", "edit": "grey:edges:0.5", "role": "test"},
        ),
    )


def test_prompts_are_listed_combined_and_reworded(workspace: Path, tmp_path: Path) -> None:
    more = concept_file(tmp_path / "p.jsonl", {"name": "facial-a-broad-smile", "paraphrase": "laughing"})
    made = whole(prompts("--set", "art,facial", "--combinations", 30, "--paraphrases", more))
    concepts = read_concepts(made)
    assert len(concepts) == 60 + 26 + 30 == made.manifest.metrics["concepts"]
    assert made.manifest.metrics["combinations"] == 30
    (smile,) = (concept for concept in concepts if concept.name == "facial-a-broad-smile")
    assert smile.paraphrases[-1] == "laughing"
    again = run_cli("gen-weights", "prompts", "--set", "art,facial", "--combinations", 30, "--paraphrases", more)
    assert "already there" in again.err and again.path == made.path
    concept_file(more, {"name": "facial-a-broad-smile", "paraphrase": "grinning"})
    other = prompts("--set", "art,facial", "--combinations", 30, "--paraphrases", more)
    assert other != made.path and prompts("--set", "art,facial", "--combinations", 30, "--seed", 1) != made.path


def test_a_users_leak_is_refused(workspace: Path, tmp_path: Path) -> None:
    leak = concept_file(tmp_path / "l.jsonl", {"prompt": "a person turned into a viking raider, made of glass"})
    ran = run_cli("gen-weights", "prompts", "--set", f"character,{leak}")
    refused(ran, EXIT_INPUT, "leak into training", "character-a-viking-raider", "change the role")
    refused(run_cli("gen-weights", "prompts", "--combinations", 1), EXIT_USAGE, "0 can be made")
    refused(run_cli("gen-weights", "prompts", "--set", "demos"), EXIT_USAGE, "did you mean 'demo'")


def test_a_language_model_adds_paraphrases_and_goes_on(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.stages.gen_weights import prompts as stage

    calls: list[str] = []

    class Writer:
        def __init__(self, folder: Path, device: torch.device) -> None:
            self.left = 10

        def write(self, prompt: str, count: int, seed: int) -> tuple[str, ...]:
            self.left -= 1
            if not self.left and len(calls) < 12:
                signal.raise_signal(signal.SIGTERM)
            calls.append(prompt)
            return (*(f"{prompt} number {seed} {draw}" for draw in range(count)), "a person turned into a fox")

    monkeypatch.setattr(stage, "Paraphraser", Writer)
    monkeypatch.setattr(stage, "find_paraphraser", Path)
    monkeypatch.setattr(stage, "paraphraser_digest", lambda folder: "0" * 64)
    command = ("gen-weights", "prompts", "--set", "character", "--paraphraser", "/lm", "--paraphrase-count", 1)
    stopped = run_cli(*command)
    assert stopped.code == 75, stopped.err
    concepts = read_concepts(whole(run_cli(*command).path))
    assert len(calls) == 60 == len(set(calls))
    (fox,) = (concept for concept in concepts if concept.name == "character-a-fox")
    for number, concept in enumerate(concepts):
        assert concept.paraphrases[2] == f"{concept.prompt} number {number} 0"
        assert ("a person turned into a fox" in concept.paraphrases) == (concept.reserved and concept is not fox)


def test_builtin_pairs(two: Path) -> None:
    ran = run_cli("gen-weights", "pairs", two, *SMALL)
    assert "2 concepts x at most 6 images by builtin: 12 edits" in ran.err
    made = whole(ran.path)
    pairs = open_pairs(made)
    assert pairs.image_size == 16 and [concept.name for concept in pairs.concepts] == ["old-print", "sharp-lines"]
    assert pairs.concepts == read_concepts(whole(two))
    assert sum(pairs.count(split) for split in SPLITS) == 6 and all(pairs.count(split) for split in SPLITS)
    assert {source.picture for source in pairs.index if source.split == "test"} == {"cat"}
    for concept in pairs.concepts:
        for split in SPLITS:
            for before, after in zip(pairs.sources(split), pairs.targets(concept, split), strict=True):
                expected = apply(concept.edit, before.permute(1, 2, 0).contiguous().numpy())
                assert np.array_equal(after.permute(1, 2, 0).numpy(), expected)
    with Image.open(made.path / "contact_sheet.png") as sheet:
        assert sheet.height > 3 * 16
    assert made.manifest.data["bundled"] is True
    other = run_cli("gen-weights", "pairs", two, "--images", 6, "--image-size", 16, "--batch-size", 1)
    assert "already there" in other.err and other.path == made.path


def test_a_killed_run_goes_on_with_the_missing_concepts(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.data.editors.builtin import Builtin

    unbroken = weights(run_cli("gen-weights", "pairs", two, *SMALL, "--out", two.parent / "unbroken").path)
    edited: list[str] = []
    edit = Builtin.edit

    def counted(self: Builtin, images: Any, concept: Any, rows: Any, draw: int) -> Any:
        edited.append(concept.name)
        if len(edited) == 3:
            signal.raise_signal(signal.SIGTERM)
        return edit(self, images, concept, rows, draw)

    monkeypatch.setattr(Builtin, "edit", counted)
    stopped = run_cli("gen-weights", "pairs", two, *SMALL)
    assert stopped.code == 75, stopped.err
    resumed = run_cli("gen-weights", "pairs", two, *SMALL).path
    assert edited == ["old-print"] * 2 + ["sharp-lines"] * 3
    assert weights(resumed) == unbroken


def test_the_best_of_several_edits_by_clip_stays(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.data import editors
    from finectl.metrics.choosing import ClipChooser
    from finectl.stages.gen_weights import pairs as stage

    class Grey:
        """Makes images of one level: 10 times the draw, plus 100 from the second editor on."""

        def __init__(self, offset: int) -> None:
            self.offset = offset

        def edit(self, images: Any, concept: Any, rows: Any, draw: int) -> Any:
            return torch.full_like(images, self.offset + 10 * draw)

    class Features:
        """Embeds an image as its distance from level 110, but every third one as that from 0."""

        def encode_text(self, texts: Any) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]])

        def prepare(self, image: Any) -> torch.Tensor:
            return torch.tensor(float(image.mean()))

        def forward(self, batch: torch.Tensor, wanted: Any) -> dict[str, torch.Tensor]:
            far = (batch - 110).abs()
            far[::3] = batch[::3]
            return {"features": torch.stack([torch.ones_like(far), far], dim=1)}

    found = editors.EditorSpec("sd-img2img", "/x", "d")
    monkeypatch.setattr(stage, "parse_editor", lambda text: found)
    monkeypatch.setattr(stage, "clip_digest", lambda config, editors: "c")
    numbers = iter((0, 100))
    monkeypatch.setattr(stage, "load_editor", lambda *given: Grey(next(numbers)))
    monkeypatch.setattr(ClipChooser, "of", classmethod(lambda cls, clip, device: cls(Features())))
    command = ("gen-weights", "pairs", two, "--editor", "sd-img2img:/x,sd-img2img:/x", "--best-of", 2)
    ran = run_cli(*command, *SMALL)
    assert "48 edits, " in ran.err and " evaluations of diffusion networks" in ran.err
    pairs = open_pairs(whole(ran.path))
    levels = pairs.target_rows("old-print", torch.arange(6)).float().mean(dim=(1, 2, 3)).tolist()
    assert levels == [0, 110, 110, 0, 0, 110]  # of batches of four


def test_pairs_of_a_folder(workspace: Path, tmp_path: Path) -> None:
    for index in range(5):
        for side, level in (("A", 10 * index), ("B", 255 - 10 * index)):
            (tmp_path / "f" / side).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (level, 0, level)).save(tmp_path / "f" / side / f"{index}.png")
    command = ("gen-weights", "pairs", "--editor", f"folder:{tmp_path / 'f'}", "--prompt", "Inverted: red")
    made = whole(run_cli(*command).path)
    pairs = open_pairs(made)
    assert pairs.image_size == 10 and [concept.name for concept in pairs.concepts] == ["inverted-red"]
    sources, targets = pairs.source_rows(torch.arange(5)), pairs.target_rows("inverted-red", torch.arange(5))
    assert torch.equal(sources[:, 0], 255 - targets[:, 0]) and made.manifest.data["count"] == 5
    assert run_cli(*command, "--image-size", 8).path != made.path
    (tmp_path / "f" / "B" / "4.png").unlink()
    refused(run_cli(*command), EXIT_INPUT, "5 images A and 4 images B", "4 (A)")
    refused(run_cli(*command, "--best-of", 2), EXIT_USAGE, "as they are")
    refused(run_cli("gen-weights", "pairs", "--prompt", "x"), EXIT_USAGE, "--prompt names the concept")


def test_own_images_are_split_by_image(two: Path, tmp_path: Path) -> None:
    for index in range(10):
        (tmp_path / "own").mkdir(exist_ok=True)
        Image.new("L", (20, 16), 20 * index).save(tmp_path / "own" / f"{index}.png")
    command = ("gen-weights", "pairs", two, "--data", f"folder:{tmp_path / 'own'}", "--image-size", 16)
    pairs = open_pairs(whole(run_cli(*command).path))
    assert [pairs.count(split) for split in SPLITS] == [8, 1, 1]
    assert pairs.sources("train").shape == (8, 3, 16, 16)


def test_what_cannot_be_made_is_refused(two: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.data.editors import finding

    art = prompts("--set", "art")
    ran = run_cli("gen-weights", "pairs", art)
    refused(ran, EXIT_INPUT, "does not know 60 of 60 concepts", "--editor ip2p:PATH")
    refused(run_cli("gen-weights", "pairs", two, "--best-of", 2), EXIT_USAGE, "the same image each time")
    refused(run_cli("gen-weights", "pairs", two, "--clip", "x"), EXIT_USAGE, "nothing to choose")
    refused(run_cli("gen-weights", "pairs", two, "--editor", "builtins"), EXIT_USAGE, "did you mean 'builtin'")
    weak = ("--editor", "sd-img2img:/none", "--strength", 0.01)
    monkeypatch.setattr(finding, "find_pipeline", lambda editor, path: (Path(path), "d"))
    refused(run_cli("gen-weights", "pairs", two, *weak), EXIT_USAGE, "--strength 0.01 of 50 steps is no step")
    monkeypatch.undo()
    monkeypatch.setenv("FINECTL_WORKSPACE", str(workspace))
    refused(run_cli("gen-weights", "pairs", two, "--data", "folder:/none"), EXIT_INPUT, "/none")
    refused(run_cli("gen-weights", "pairs", two, "--editor", "ip2p:/none"), EXIT_INPUT, "the pipeline of ip2p")


def test_a_dry_run_says_what_it_costs(two: Path) -> None:
    ran = run_cli("gen-weights", "pairs", two, *SMALL, "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert (plan["edits"], plan["network_calls"], plan["disk_bytes"]) == (12, 0, 3 * 6 * 3 * 16**2)
    assert plan["seconds"] > 0 and not (two.parent.parent / "pairs").exists()
