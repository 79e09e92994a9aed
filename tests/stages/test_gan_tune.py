"""`finectl gen-weights tune`: from a collection's starts and from predicted weights; what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_pairs import make_pairs
from support import run_cli, whole

from finectl.adapters.lora import attach_lora, load_lora, lora_layers
from finectl.adapters.weight_dataset import open_weights
from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.job import Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact, open_artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.console import Console
from finectl.models.gan.io import load_generator
from finectl.runner import RunOptions, run_stage

QUICK = ("--batch-size", 4, "--workers", 1)


@dataclass(frozen=True)
class Changes:
    """What tells artifacts of the test apart."""

    text: str


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A workspace, its base and its collection; tests only add to it."""
    root = tmp_path_factory.mktemp("tune")
    place = ("--workspace", root)
    pairs = make_pairs(root)
    base = run_cli("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 3, *place).path
    options = ("--steps", 20, "--checkpoints", 2, "--roles", "train,val,test", "--eval-every", 0)
    return root, base, run_cli("gen-weights", "collect", *QUICK, *options, *place).path


@pytest.fixture
def made(_made: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    monkeypatch.setenv("FINECTL_WORKSPACE", str(_made[0]))
    return _made


def predicted(root: Path, collection: Path, concept: str, **changes: object) -> Path:
    """Publish a `lora` artifact as predict makes it, holding the trained weights of a concept."""
    dataset = open_weights(open_artifact(collection))

    def run(job: Job[Changes]) -> Outcome:
        save_tensors(job.directory / "lora.safetensors", dataset.last(concept))
        described = {"base": dataset.base, "layers": dataset.config["layers"], "prompt": concept, "text": dataset.text}
        write_json(job.directory / "config.json", {**described, **changes})
        return Outcome()

    stage = Stage(
        "gen-weights-predict", 1, "lora", Changes, lambda c: Reads("x", ("weight-dataset",)),
        lambda c, p: Plan(c, concept), run,
    )  # fmt: skip
    config = Changes(str(changes))
    result = run_stage(stage, config, [str(collection)], RunOptions(workspace=root), Console(quiet=True))
    assert result.artifact is not None
    return result.artifact.path


def tune(*more: object) -> Artifact:
    return whole(run_cli("gen-weights", "tune", "--batch-size", 4, "--steps", 6, *more).path)


def test_from_a_prediction_it_starts_where_that_is(made: tuple[Path, Path, Path]) -> None:
    root, base, collection = made
    lora = predicted(root, collection, "inverted")
    found = tune(lora)
    assert found.kind == "tuned-gan" and found.manifest.metrics["concept"] == "inverted"
    start = tune(collection, "--start", "lora", "--concept", "inverted").manifest.metrics
    metrics = found.manifest.metrics
    assert metrics["test_l1_at_start"] < start["test_l1_at_start"] and start["test_l1"] < start["test_l1_at_start"]
    assert [parent.role for parent in found.manifest.parents] == ["start", "base", "pairs"]
    # The whole generator and the base with the adapters answer the same.
    adapted = attach_lora(load_generator(open_artifact(base)), lora_layers(load_generator(found).config, 2))
    load_lora(adapted, lora_layers(load_generator(found).config, 2), load_tensors(found.file("lora.safetensors")))
    buffers = {name for name, _ in adapted.named_buffers()}
    statistics = {name: value for name, value in load_generator(found).state_dict().items() if name in buffers}
    adapted.load_state_dict(statistics, strict=False)
    images, tokens = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 64)
    with torch.no_grad():
        assert torch.allclose(load_generator(found).eval()(images, tokens), adapted.eval()(images, tokens), atol=1e-5)


@pytest.mark.parametrize("start", ["mean", "nearest", "ridge", "oracle"])
def test_other_starts(made: tuple[Path, Path, Path], start: str) -> None:
    _, _, collection = made
    metrics = tune(collection, "--start", start, "--concept", "inverted", "--seed", 1).manifest.metrics
    base = tune(collection, "--start", "lora", "--concept", "inverted", "--seed", 1).manifest.metrics
    assert metrics["test_l1_at_start"] != base["test_l1_at_start"]
    if start == "oracle":
        assert metrics["test_l1_at_start"] < base["test_l1_at_start"]


def test_e2gan_leaves_the_residual_blocks_alone(made: tuple[Path, Path, Path]) -> None:
    _, base, collection = made
    found = tune(collection, "--start", "e2gan", "--concept", "inverted")
    before, after = (dict(load_generator(artifact).named_parameters()) for artifact in (open_artifact(base), found))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any(name.startswith("res") or "norm" in name for name in changed)


def test_what_it_refuses(made: tuple[Path, Path, Path]) -> None:
    root, _, collection = made
    unknown = predicted(root, collection, "red", prompt="a submarine")
    assert "is called 'a submarine'" in run_cli("gen-weights", "tune", unknown).err
    other = predicted(root, collection, "red", base="0" * 64)
    refused = run_cli("gen-weights", "tune", other)
    assert refused.code == 3 and "000000000000" in refused.err and "--base" in refused.err
    encoder = {**read_json_object(collection / "config.json")["text"], "digest": "1" * 64}
    assert "this encoder is" in run_cli("gen-weights", "tune", predicted(root, collection, "red", text=encoder)).err
    assert "does not say which" in run_cli("gen-weights", "tune", collection, "--start", "mean").err
    assert "of kind 'weight-dataset'" in run_cli("gen-weights", "tune", collection).err
