"""Every stage from its command line to its artifact, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import run_cli, weights, whole

from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors, tensor_shapes
from finectl.models.dit import DiT
from finectl.models.io import load_model, read_config
from finectl.models.presets import LAYER_TYPES, count_parameters
from finectl.training.log import read_log


def files(artifact: Path) -> set[str]:
    return {file.path for file in read_manifest(artifact).files}


def test_condense(chain: Any) -> None:
    artifact = whole(chain.condensed)
    assert artifact.kind == "condensed" and artifact.name.startswith("dit-nano-l2-r64-")
    assert files(chain.condensed) == {"config.json", "ema.safetensors", "log.jsonl", "model.safetensors"}
    config = read_config(artifact)
    assert config.depth == 2 and config.factorized is not None
    assert (config.factorized.rank, set(config.factorized.types)) == (64, set(LAYER_TYPES))
    manifest = artifact.manifest
    assert manifest.parents == [] and manifest.data == {
        **manifest.data,
        "name": "digits",
        "count": 1797,
        "bundled": True,
    }
    assert manifest.metrics["parameters"] == sum(p.numel() for p in DiT(config).parameters())
    assert manifest.cost.items() >= {"steps": 3, "samples": 24}.items()
    assert manifest.command[:2] == ["finectl", "condense"]
    entries = read_log(chain.condensed / "log.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3]
    heldout = [entry["heldout_loss"] for entry in entries if "heldout_loss" in entry]
    assert len(heldout) == 4 and heldout[0] == pytest.approx(1.0, abs=0.05), "a model of zeros predicts no noise"
    raw, ema = (load_tensors(chain.condensed / f"{name}.safetensors") for name in ("model", "ema"))
    assert set(raw) == set(ema) and any(not torch.equal(raw[name], ema[name]) for name in raw)


def test_condense_with_options_of_the_architecture(workspace: Path) -> None:
    options = ("--factorize", "qkv,out", "--rank", 8, "--sigma-sharing", 3, "--learn-sigma", "--frequency-divisor", 127)
    path = run_cli("condense", "--depth", 1, "--steps", 2, "--batch-size", 4, "--eval-every", 0, *options).path
    config = read_config(open_artifact(path))
    assert config.learn_sigma and config.frequency_divisor == 127
    shapes = tensor_shapes(path / "model.safetensors")
    assert shapes["factors.qkv.U"] == (192, 8) and shapes["blocks.0.attn.qkv.sigma"] == (3,)
    assert shapes["blocks.0.mlp.fc1.weight"] == (256, 64) and "blocks.0.mlp.fc1.sigma" not in shapes
    assert shapes["final_layer.linear.weight"] == (8, 64)
    learngene = run_cli("extract", path).path
    made = run_cli("init", learngene, "--depth", 3, "--tune-steps", 2, "--batch-size", 4).path
    config = read_config(open_artifact(made))
    assert config.learn_sigma and config.frequency_divisor == 127 and config.depth == 3 and config.factorized is None
    assert run_cli("sample", made, "--samples", 2, "--sampling-steps", 2, "--scheduler", "ddpm").code == 0


def test_extract(chain: Any) -> None:
    artifact = whole(chain.learngene)
    assert files(chain.learngene) == {
        "config.json", "curves.safetensors", "learngene.safetensors", "rest.safetensors",
    }  # fmt: skip
    ema = load_tensors(chain.condensed / "ema.safetensors")
    factors = load_tensors(chain.learngene / "learngene.safetensors")
    assert set(factors) == {f"{kind}.{side}" for kind in LAYER_TYPES for side in "UV"}
    assert all(torch.equal(value, ema[f"factors.{name}"]) for name, value in factors.items())
    curves = load_tensors(chain.learngene / "curves.safetensors")
    assert torch.equal(curves["sigma.o"][1], ema["blocks.1.attn.proj.sigma"])
    metrics = artifact.manifest.metrics
    for name, file in (("learngene", "learngene"), ("rest", "rest"), ("curves", "curves")):
        counted = sum(math.prod(shape) for shape in tensor_shapes(chain.learngene / f"{file}.safetensors").values())
        assert metrics[f"parameters_{name}"] == counted
    config = read_config(artifact)
    dense = sum(count_parameters(_dense(config, depth))["total"] for depth in (4, 6, 8, 10, 12))
    assert metrics["parameters_dense"] == dense and metrics["depths"] == [4, 6, 8, 10, 12]
    kept = metrics["parameters_learngene"] + metrics["parameters_rest"] + metrics["parameters_curves"]
    assert metrics["storage_ratio"] == pytest.approx(dense / kept, abs=1e-3) and metrics["bytes"] == 4 * kept


def _dense(config: Any, depth: int) -> Any:
    from dataclasses import replace

    return replace(config, depth=depth, factorized=None)


def test_extract_prints_the_storage_of_the_depths_asked_for(chain: Any) -> None:
    ran = run_cli("extract", chain.condensed, "--depths", "1, 2")
    assert "dense models of depth 1, 2" in ran.err and "times less than the 2 dense models" in ran.err
    assert read_manifest(ran.path).metrics["depths"] == [1, 2]


def test_init(chain: Any) -> None:
    artifact = whole(chain.init)
    assert files(chain.init) == {"config.json", "log.jsonl", "model.safetensors"}
    assert artifact.name.startswith("dit-nano-fine-l3-") and artifact.manifest.metrics["method"] == "fine"
    assert read_config(artifact).factorized is None and load_model(artifact).config.depth == 3
    assert artifact.manifest.cost["steps"] == 2


def test_train(chain: Any) -> None:
    artifact = whole(chain.model)
    assert artifact.name.startswith("dit-nano-fine-l3-t3-")
    assert files(chain.model) == {"config.json", "ema.safetensors", "log.jsonl", "model.safetensors"}
    assert (chain.model / "config.json").read_bytes() == (chain.init / "config.json").read_bytes()
    before, after = (load_tensors(path / "model.safetensors") for path in (chain.init, chain.model))
    assert {name: value.shape for name, value in before.items()} == {n: v.shape for n, v in after.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_training_goes_on_from_the_weights_asked_for(chain: Any) -> None:
    options = ("--steps", 1, "--batch-size", 4, "--lr", 0.0, "--eval-every", 0)
    for name, file in (("ema", "ema"), ("raw", "model")):
        made = run_cli("train", chain.model, "--weights", name, *options).path
        # With a rate of 0 and no decay nothing moves, so what comes out is what went in.
        assert (made / "model.safetensors").read_bytes() == (chain.model / f"{file}.safetensors").read_bytes()


def test_a_condensed_model_is_trained_in_bfloat16_too(workspace: Path) -> None:
    options = ("--depth", 1, "--steps", 2, "--batch-size", 4, "--dtype", "bfloat16")
    made = whole(run_cli("condense", *options).path)
    assert made.manifest.execution["dtype"] == "bfloat16"
    assert {value.dtype for value in load_tensors(made.path / "model.safetensors").values()} == {torch.float32}


def test_sample(chain: Any) -> None:
    ran = run_cli("sample", chain.model, "--samples", 5, "--sampling-steps", 2, "--batch-size", 2, "--labels", "7,1,3")
    artifact = whole(ran.path)
    pictures = {f"samples/{number:06d}.png" for number in range(5)}
    assert files(ran.path) == {"grid.png", "samples.safetensors", *pictures}
    tensors = load_tensors(ran.path / "samples.safetensors")
    assert tensors["images"].shape == (5, 1, 8, 8) and tensors["images"].dtype == torch.uint8
    assert tensors["labels"].tolist() == [7, 1, 3, 7, 1]
    for number, levels in enumerate(tensors["images"]):
        with Image.open(ran.path / "samples" / f"{number:06d}.png") as picture:
            assert list(picture.getdata()) == levels.flatten().tolist()
    with Image.open(ran.path / "grid.png") as grid:
        assert grid.size[0] > grid.size[1]
    assert artifact.manifest.data["name"] == "digits"
    again = run_cli(
        "sample", chain.model, "--samples", 5, "--sampling-steps", 2, "--batch-size", 5, "--labels", "7,1,3"
    )
    others = load_tensors(again.path / "samples.safetensors")["images"]
    assert int((others.int() - tensors["images"].int()).abs().max()) <= 1, "the batch size changes rounding only"


def test_sampling_keeps_finished_batches(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.diffusion import sampling

    arguments = ("sample", chain.model, "--samples", 6, "--sampling-steps", 2, "--batch-size", 2)
    calls: list[int] = []
    real = sampling.sample_images

    def fail_in_the_third(*given: Any, **options: Any) -> Any:
        calls.append(options["first"])
        if len(calls) == 3:
            raise MemoryError("of the test")
        return real(*given, **options)

    monkeypatch.setattr(sampling, "sample_images", fail_in_the_third)
    ran = run_cli(*arguments)
    assert ran.code == 6 and ran.out == "" and "smaller --batch-size" in ran.err
    resumed = run_cli(*arguments).path
    assert calls == [0, 2, 4, 4], "finished batches were made again"
    monkeypatch.undo()
    other = run_cli(*arguments, "--workspace", chain.root.with_name("other")).path
    assert weights(resumed) == weights(other)
    assert sorted(p.name for p in resumed.rglob("*")) == sorted(p.name for p in other.rglob("*"))


def test_evaluate(chain: Any) -> None:
    options = ("--samples", 12, "--sampling-steps", 2, "--draws", 1, "--allow-few")
    ran = run_cli("evaluate", chain.init, chain.model, chain.condensed, *options)
    assert "Comparison\n| model" in ran.err
    assert files(ran.path) >= {"metrics.json", "table.md", "samples.png"}
    rows = json.loads((ran.path / "metrics.json").read_text())
    assert [row["name"] for row in rows] == ["dit-nano-fine-l3", "dit-nano-fine-l3-t3", "dit-nano-l2-r64"]
    table = (ran.path / "table.md").read_text().splitlines()
    assert all(row["name"] in line for row, line in zip(rows, table[2:5], strict=True)) and table[5] == ""
    init, trained, condensed = rows
    assert (init["steps"], trained["steps"], condensed["steps"]) == (2, 5, 3), "tuning is counted"
    assert trained["method"] == init["method"] == "fine" and condensed["method"] == "condensed"
    assert trained["transferred"] == init["transferred"] == read_manifest(chain.init).metrics["parameters_transferred"]
    for row in rows:
        for name in ("loss", "frechet", "accuracy"):
            low, high = row[name]["interval"]
            assert low <= row[name]["value"] <= high
        protocol = row["frechet"]["protocol"]
        assert row["frechet"]["n"] == protocol["n"] == 12 and protocol["extractor"] == "digits"
        assert len(protocol["extractor_digest"]) == 64 and protocol["reference_n"] == 1438
        assert row["loss"]["images"] == 359 and sum(part["terms"] for part in row["loss"]["ranges"]) == 359
    assert len({json.dumps(row["loss"]["protocol"]) for row in rows}) == 1


def test_evaluating_a_model_twice_gives_the_same_values(chain: Any) -> None:
    options = ("--metrics", "loss,accuracy", "--samples", 8, "--sampling-steps", 2, "--draws", 2)
    alone = read_manifest(run_cli("evaluate", chain.model, *options).path).metrics["models"][0]
    beside = read_manifest(run_cli("evaluate", chain.init, chain.model, *options).path).metrics["models"][1]
    for name in ("loss", "accuracy"):
        assert alone[name] == beside[name]
    other = read_manifest(run_cli("evaluate", chain.model, *options, "--seed", 1).path).metrics["models"][0]
    assert other["loss"]["value"] != alone["loss"]["value"]


def test_evaluate_leaves_out_what_the_features_are_not_made_for(workspace: Path, tmp_path: Path) -> None:
    for index in range(10):
        Image.new("RGB", (8, 8), (index * 20, 9, 200)).save(tmp_path / f"{index}.png")
    options = ("--data", f"folder:{tmp_path}", "--depth", 1, "--steps", 1, "--batch-size", 4, "--eval-every", 0)
    condensed = run_cli("condense", *options).path
    ran = run_cli("evaluate", condensed, "--draws", 1)
    row = read_manifest(ran.path).metrics["models"][0]
    assert "loss" in row and "frechet" not in row and "frechet and accuracy left out" in ran.err


def test_a_class_asked_for_is_the_class_that_is_generated(chain: Any) -> None:
    """Labels reach the model: two classes from the same noise differ, one class twice does not."""
    model = load_model(open_artifact(chain.model)).eval()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([300])
    with torch.no_grad():
        zero, one, null = (model(x, t, torch.tensor([label])) for label in (0, 1, 10))
    assert not torch.equal(zero, one) and not torch.equal(zero, null)
