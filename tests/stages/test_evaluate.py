"""`evaluate` end to end: what it reuses, what changes nothing, what it refuses, and what it prints."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support import Ran, run_cli, weights

from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.manifest import read_manifest
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.errors import EXIT_COMPUTATION, EXIT_INPUT, EXIT_USAGE
from finectl.runner import RunOptions, run_stage

COUNT = 70
SAMPLING = ("--samples", COUNT, "--sampling-steps", 2)
ON_DIGITS = ("--metrics", "frechet,accuracy")


def refused(ran: Ran, code: int, *says: str) -> None:
    assert ran.code == code, ran.err
    assert ran.out == "" and "Traceback" not in ran.err and ran.err.count("error:") == 1
    for text in says:
        assert text in ran.err


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((path / "metrics.json").read_text())
    return rows


def row_of(*arguments: object) -> dict[str, Any]:
    (row,) = rows_of(run_cli("evaluate", *arguments).path)
    return row


def values(row: dict[str, Any], *names: str) -> dict[str, float]:
    return {name: row[name]["value"] for name in names}


def agree(one: dict[str, Any], other: dict[str, Any], *names: str) -> None:
    assert values(one, *names) == pytest.approx(values(other, *names), rel=1e-9)


@pytest.fixture
def digits(chain: Any, tmp_path: Path) -> Path:
    """A folder of real 8x8 digits as PNG files, one subfolder a class."""
    from finectl.data.dataset import load
    from finectl.data.images import to_picture, to_uint8

    images = load("digits", "heldout")
    folder = tmp_path / "digits"
    for index, (levels, label) in enumerate(
        zip(to_uint8(images.images[:COUNT]), images.labels[:COUNT].tolist(), strict=True)
    ):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        to_picture(levels).save(folder / str(label) / f"{index:03d}.png")
    return folder


def no_sampling(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("images were generated although they are there")


def test_samples_that_are_there_are_used(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.diffusion import sampling

    arguments = (chain.model, *ON_DIGITS, *SAMPLING)
    fresh = row_of(*arguments)
    made = run_cli("sample", chain.model, "--samples", COUNT + 5, "--sampling-steps", 2, "--batch-size", 250).path
    monkeypatch.setattr(sampling, "sample_images", no_sampling)
    again = row_of(*arguments, "--force")
    agree(fresh, again, "frechet", "accuracy")
    assert again["frechet"]["n"] == COUNT
    alone = row_of(made, *ON_DIGITS, "--samples", COUNT)
    agree(fresh, alone, "frechet", "accuracy")
    assert alone["depth"] == fresh["depth"] and alone["steps"] == fresh["steps"], "those of the model that made them"
    other = run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING, "--seed", 1)
    assert other.code == 1 and "although they are there" in other.err, "another seed is another set of images"


def test_values_of_another_n_are_in_a_column_of_their_own(chain: Any) -> None:
    few, more = (run_cli("sample", chain.model, "--samples", n, "--sampling-steps", 1).path for n in (64, 66))
    ran = run_cli("evaluate", few, more, *ON_DIGITS)
    table = (ran.path / "table.md").read_text()
    assert "frechet (2)" in table and "n 66 instead of 64" in table


def test_the_order_and_the_names_of_files_and_the_threads_change_nothing(digits: Path, tmp_path: Path) -> None:
    names = ("frechet", "accuracy")
    arguments = (
        "--images",
        f"folder:{digits}",
        "--features",
        "digits",
        "--metrics",
        ",".join(names),
        "--data",
        "digits",
    )
    first = row_of(*arguments)
    turned = tmp_path / "turned"
    for file in digits.rglob("*.png"):
        (turned / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, turned / file.parent.name / f"{999 - int(file.stem)}.png")
    agree(first, row_of(*arguments[2:], "--images", f"folder:{turned}"), *names)
    agree(first, row_of(*arguments, "--workers", 0, "--force"), *names)
    assert first["accuracy"]["value"] > 0.9, "they are real digits"


def test_batches_of_one_set_of_samples_change_nothing(chain: Any) -> None:
    made = run_cli("sample", chain.model, *SAMPLING).path
    one, other = (row_of(made, *ON_DIGITS, "--batch-size", size) for size in (3, 250))
    agree(one, other, "frechet", "accuracy")


def test_interrupted_work_goes_on_with_the_next_chunk(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.diffusion import sampling

    arguments = ("evaluate", chain.model, *ON_DIGITS, *SAMPLING, "--batch-size", 20)
    real, calls = sampling.sample_images, []

    def fail_in_the_third(*given: Any, **options: Any) -> Any:
        calls.append(options["first"])
        if len(calls) == 3:
            raise MemoryError("of the test")
        return real(*given, **options)

    monkeypatch.setattr(sampling, "sample_images", fail_in_the_third)
    assert run_cli(*arguments).code == 6
    resumed = run_cli(*arguments).path
    assert calls == [0, 20, 40, 40, 60], "finished chunks were made again"
    monkeypatch.setattr(sampling, "sample_images", real)
    digest = read_manifest(resumed).digest
    again = run_cli(*arguments, "--force").path
    assert again == resumed and read_manifest(again).digest == digest and len(calls) == 5


def test_statistics_are_kept_and_used_again(chain: Any) -> None:
    first = run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING)
    (kept,) = (path for path in (chain.root / "statistics").iterdir() if not path.is_symlink())
    assert str(kept) in first.err and read_manifest(kept).metrics == {"images": 1438}
    second = run_cli("evaluate", chain.init, *ON_DIGITS, *SAMPLING)
    assert str(kept) not in second.err, "they were computed again"
    expected = values(rows_of(first.path)[0], "frechet")
    for name in (kept, f"statistics/{kept.name}", kept / "statistics.safetensors"):
        row = row_of(chain.model, *ON_DIGITS, *SAMPLING, "--reference", name)
        assert values(row, "frechet") == expected and row["frechet"]["protocol"]["reference"] == "digits/train"
    (kept / "statistics.safetensors").write_bytes(b"torn")
    third = run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING, "--seed", 1)
    assert third.code == 0 and str(kept) in third.err, "damaged ones are made anew"
    assert weights(kept)


def test_moments_of_another_tool_are_a_reference(chain: Any, tmp_path: Path) -> None:
    run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING)
    kept = chain.root / "statistics" / "latest" / "statistics.safetensors"
    tensors = load_tensors(kept)
    mine, other = tmp_path / "mine.npz", tmp_path / "other.npz"
    np.savez(mine, mu=tensors["features.mean"].numpy(), sigma=tensors["features.cov"].numpy())
    np.savez(other, mu=np.zeros(2048), sigma=np.eye(2048))
    row = row_of(chain.model, *ON_DIGITS, *SAMPLING, "--reference", mine)
    assert row["frechet"]["protocol"]["reference"] == "mine.npz"
    agree(row, row_of(chain.model, *ON_DIGITS, *SAMPLING), "frechet")
    refused(
        run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING, "--reference", other), EXIT_INPUT, "2048 features", "64"
    )


def test_pairs_of_images(tmp_path: Path, workspace: Path) -> None:
    for name, shift in (("made", 0), ("wanted", 10)):
        (tmp_path / name).mkdir()
        for index in range(3):
            levels = np.full((16, 16, 3), 20 * index + shift, dtype=np.uint8)
            levels[4:9] += 90
            Image.fromarray(levels).save(tmp_path / name / f"{index}.png")
    arguments = ("--images", f"folder:{tmp_path / 'made'}", "--metrics", "l1,psnr,ssim")
    row = row_of(*arguments, "--reference", f"folder:{tmp_path / 'wanted'}")
    assert row["l1"]["value"] == pytest.approx(10 / 255) and row["l1"]["n"] == 3
    assert row["psnr"]["value"] == pytest.approx(20 * np.log10(255 / 10)) and 0.8 < row["ssim"]["value"] < 1
    (tmp_path / "wanted" / "2.png").rename(tmp_path / "wanted" / "3.png")
    refused(
        run_cli("evaluate", *arguments, "--reference", f"folder:{tmp_path / 'wanted'}"), EXIT_INPUT, "2.png", "3.png"
    )
    (tmp_path / "wanted" / "3.png").unlink()
    refused(
        run_cli("evaluate", *arguments, "--reference", f"folder:{tmp_path / 'wanted'}"), EXIT_INPUT, "3 images", "2"
    )


def test_checkpoints_give_curves_and_the_updates_to_a_score(chain: Any) -> None:
    trained = run_cli("train", chain.init, "--steps", 6, "--batch-size", 8, "--keep-every", 2).path
    arguments = ("evaluate", trained, "--metrics", "loss", "--draws", 1, "--steps-every", 2)
    ran = run_cli(*arguments, "--reach", "loss<100")
    rows = rows_of(ran.path)
    assert [row["checkpoint"] for row in rows] == [4, 6, 8], "the two updates of tuning are counted"
    assert len({row["loss"]["value"] for row in rows}) == 3 and "Updates until loss of 100" in ran.err
    assert json.loads((ran.path / "table.json").read_text())["reach"][0]["rows"][0]["updates"] == 4
    plain = row_of(trained, "--metrics", "loss", "--draws", 1)
    assert plain["loss"] == rows[-1]["loss"]
    for wrong, says in (("loss>1", "lower is better"), ("accuracy>1", "one of: loss"), ("nobody", "no condition")):
        refused(run_cli(*arguments, "--reach", wrong), EXIT_USAGE, says)
    for reach in ("loss<1", rows[0]["name"]):
        refused(run_cli("evaluate", trained, "--metrics", "loss", "--reach", reach), EXIT_USAGE, "--steps-every")
    refused(run_cli("evaluate", chain.model, "--metrics", "loss", "--steps-every", 5), EXIT_INPUT, "--keep-every")


def test_named_checkpoints_and_the_start_are_points_of_one_comparison(chain: Any) -> None:
    trained = run_cli("train", chain.init, "--steps", 6, "--batch-size", 8, "--keep-at", "1,5").path
    arguments = ("evaluate", chain.init, trained, "--metrics", "loss", "--draws", 1, "--steps-every")
    assert [row["checkpoint"] for row in rows_of(run_cli(*arguments, 1).path)] == [2, 3, 7, 8]
    assert [row["checkpoint"] for row in rows_of(run_cli(*arguments, 5).path)] == [2, 7, 8]
    refused(run_cli(*arguments, 4), EXIT_INPUT, "1, 5", "--keep-at")


def test_the_table_on_stdout(chain: Any) -> None:
    arguments = ("evaluate", chain.init, chain.model, "--metrics", "loss", "--draws", 1)
    ran = run_cli(*arguments, "--format", "csv")
    lines = list(csv.DictReader(io.StringIO(ran.out)))
    assert ran.code == 0 and len(lines) == 2 and "the artifact: " in ran.err
    rows = rows_of(Path(ran.err.split("the artifact: ")[1].splitlines()[0]))
    assert [float(line["loss"]) for line in lines] == [row["loss"]["value"] for row in rows]
    assert json.loads(run_cli(*arguments, "--format", "json").out)["rows"][0]["name"] == rows[0]["name"]
    assert run_cli(*arguments, "--format", "md").out.startswith("| model")
    assert run_cli(*arguments).path.is_dir(), "how it is printed is no part of the recipe"


def test_a_condition_by_the_metrics_other_name(chain: Any) -> None:
    arguments = ("evaluate", chain.model, "--metrics", "val_loss", "--draws", 1)
    made = run_cli(*arguments, "--fail-if", "val_loss>1000").path
    ran = run_cli(*arguments, "--fail-if", "val_loss>0.0001")
    assert ran.code == EXIT_COMPUTATION and Path(ran.out.strip()) == made


def test_what_stands_in_for_no_file_of_weights(chain: Any) -> None:
    ran = run_cli("evaluate", chain.model, "--metrics", "fid")
    refused(ran, EXIT_INPUT, "inception-2015-12-05.pt", "https://", "--inception", "--download", "loss")
    refused(run_cli("evaluate", chain.model, "--metrics", "fdd"), EXIT_INPUT, "dinov2_vitl14_pretrain.pth", "--dino")
    refused(run_cli("evaluate", chain.model, "--metrics", "fd-clip"), EXIT_INPUT, "--clip", "--download")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--samples", 20), EXIT_USAGE, "at least 64 images"),
        (("--metrics", "l1"), EXIT_USAGE, "samples artifact"),
        (("--metrics", "loss", "--reference", "digits"), EXIT_USAGE, "none of the metrics loss"),
        (("--features", "resnet18"), EXIT_USAGE, "torchvision:NAME"),
        (("--features", "torchvision:resnet18"), EXIT_USAGE, "--features-weights"),
        (("--reference", "nowhere.safetensors"), EXIT_INPUT, "missing"),
        (("--reference", "nowhere"), EXIT_USAGE, "neither a data set nor a file"),
        (("--images", "digits"), EXIT_USAGE, "folder:PATH"),
        (("--images", "folder:.", "--image-size", 8), EXIT_USAGE, "their own sizes"),
    ],
)
def test_wrong_options(arguments: tuple[object, ...], code: int, says: str, chain: Any) -> None:
    inputs = () if "--images" in arguments else (chain.model,)
    refused(run_cli("evaluate", *inputs, *arguments), code, says)


def test_hostile_folders(tmp_path: Path, workspace: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments = ("--features", "digits", "--data", "digits", "--metrics", "frechet")
    refused(run_cli("evaluate", "--images", f"folder:{tmp_path / 'empty'}", *arguments), EXIT_INPUT, "no images")
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8), 3).save(tmp_path / "one" / "0.png")
    one = ("evaluate", "--images", f"folder:{tmp_path / 'one'}", *arguments)
    refused(run_cli(*one), EXIT_USAGE, "1 images", "64")
    refused(run_cli(*one, "--allow-few"), EXIT_USAGE, "at least 2 images")
    (tmp_path / "colours").mkdir()
    for index in range(2):
        Image.new("RGB", (20, 20), (index, 100, 200)).save(tmp_path / "colours" / f"{index}.png")
    wrong = ("evaluate", "--images", f"folder:{tmp_path / 'colours'}", *arguments, "--allow-few")
    refused(run_cli(*wrong), EXIT_INPUT, "8x8")
    refused(run_cli("evaluate", "--images", f"folder:{tmp_path / 'colours'}"), EXIT_USAGE, "unless it is named")


def test_constant_images_have_a_distance(tmp_path: Path, workspace: Path) -> None:
    (tmp_path / "same").mkdir()
    for index in range(65):
        Image.new("L", (8, 8), 128).save(tmp_path / "same" / f"{index}.png")
    options = ("--features", "digits", "--data", "digits", "--metrics", "frechet")
    row = row_of("--images", f"folder:{tmp_path / 'same'}", *options)
    assert np.isfinite(row["frechet"]["value"]) and row["frechet"]["value"] > 1


def test_weights_that_are_not_numbers(chain: Any) -> None:
    for name in ("model", "ema"):
        file = chain.model / f"{name}.safetensors"
        if file.exists():
            save_tensors(file, {key: torch.full_like(value, torch.nan) for key, value in load_tensors(file).items()})
    broken = run_cli("evaluate", chain.model, *ON_DIGITS, *SAMPLING)
    refused(broken, EXIT_INPUT, "corrupt")  # verified before any work


@pytest.mark.parametrize(("metric", "says"), [("loss", "held-out loss"), ("frechet", "images are not finite")])
def test_weights_that_were_not_numbers_when_they_were_saved(
    metric: str, says: str, chain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finectl.training import generate

    real = generate.load_model

    def broken(*arguments: Any) -> Any:
        model = real(*arguments)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        return model

    monkeypatch.setattr(generate, "load_model", broken)
    ran = run_cli("evaluate", chain.model, "--metrics", metric, *SAMPLING)
    refused(ran, EXIT_COMPUTATION, says)


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP model of random weights as open_clip does."""
    import open_clip

    network = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": network, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    state = open_clip.CLIP(**network).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def test_clip_scores_of_images_with_prompts(tmp_path: Path, workspace: Path) -> None:
    tiny = tiny_clip(tmp_path / "clip")
    (tmp_path / "made").mkdir()
    lines = []
    for index in range(3):
        Image.new("RGB", (32, 32), (60 * index, 9, 200)).save(tmp_path / "made" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a picture of the number {index}"}))
    arguments = ("--images", f"folder:{tmp_path / 'made'}", "--metrics", "clip-score", "--clip", tiny)
    refused(run_cli("evaluate", *arguments), EXIT_INPUT, "no prompts", "metadata.jsonl")
    (tmp_path / "made" / "metadata.jsonl").write_text("\n".join(lines))
    row = row_of(*arguments)
    assert row["clip-score"]["n"] == 3 and 0 <= row["clip-score"]["value"] <= 100


@dataclass(frozen=True)
class NoOptions:
    """A stage without options."""


def test_clip_scores_of_samples_that_came_with_prompts(tmp_path: Path, workspace: Path) -> None:
    def make(job: Job[NoOptions]) -> Outcome:
        images = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        save_tensors(job.directory / "samples.safetensors", {"images": images, "labels": torch.zeros(3).long()})
        write_json(job.directory / "prompts.json", ["a cat", "a dog", "a cat"])
        return Outcome()

    stage = Stage(
        "sample", 1, "samples", NoOptions, lambda config: None, lambda config, parents: Plan(config, slug="text"), make
    )
    made = run_stage(stage, NoOptions(), [], RunOptions(workspace=workspace)).artifact
    assert made is not None
    row = row_of(
        made.path, "--metrics", "clip-score,fd-clip", "--clip", tiny_clip(tmp_path / "clip"), *few_against_self(made)
    )
    assert row["clip-score"]["n"] == 3 and len(row["clip-score"]["protocol"]["prompts_digest"]) == 64
    assert row["fd-clip"]["value"] < 1e-6, "the same pictures, from files and from the artifact"


def few_against_self(made: Artifact) -> tuple[object, ...]:
    """Return the options that compare samples with pictures of their own."""
    folder = made.path.parent / "pictures"
    folder.mkdir()
    for index, levels in enumerate(load_tensors(made.file("samples.safetensors"))["images"]):
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return "--reference", f"folder:{folder}", "--allow-few"


def test_a_classifier_of_the_users(tmp_path: Path, workspace: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(weights=None, num_classes=2)
    weights_file = tmp_path / "mine.pth"
    torch.save(network.state_dict(), weights_file)
    for index in range(4):
        folder = tmp_path / "made" / ("cat", "dog", "emu")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 40), (60 * index, 90, 10)).save(folder / f"{index}.png")
    mine = ("--features", "torchvision:mobilenet_v3_small", "--features-weights", weights_file)
    made = f"folder:{tmp_path / 'made'}"
    arguments = ("--images", made, "--reference", made, "--metrics", "frechet,accuracy", *mine)
    refused(run_cli("evaluate", *arguments), EXIT_USAGE, "1,024 features", "--allow-few")
    row = row_of(*arguments, "--allow-few")
    assert row["frechet"]["value"] < 1e-6 and row["accuracy"]["value"] == 0.5
    assert row["frechet"]["protocol"]["extractor"] == "torchvision:mobilenet_v3_small"
    (tmp_path / "made" / "emu").mkdir()
    Image.new("RGB", (30, 40), (1, 2, 3)).save(tmp_path / "made" / "emu" / "9.png")
    refused(run_cli("evaluate", *arguments, "--allow-few"), EXIT_INPUT, "class 2")
