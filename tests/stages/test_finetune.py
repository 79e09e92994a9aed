"""Fine-tuning on other data: Diff-Tuning with a bank or a teacher, plain, and with few parameters, end to end."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import diffusers_unet, diffusers_vae, published_state
from support import ROOT, CountConfig, Ran, run_cli, tiny_safetensors, weights, whole

from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.job import Execution, Job, Outcome, Plan, Stage
from finectl.artifacts.tensors import load_tensors
from finectl.console import Console
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.io import CONFIG, load_any_model, read_config
from finectl.models.presets import preset
from finectl.runner import RunOptions, run_stage
from finectl.stages import finetune as stage
from finectl.training import run as training_run

FEW = ("--batch-size", 8, "--eval-every", 0)
ONE = ("--steps", 1, *FEW)
OTHERS = ("--data", "digits#5,6,7,8,9")
LESS = ("--samples", 6, "--sampling-steps", 2, "--shard-size", 4)
TABLE = "y_embedder.embedding_table.weight"
UNET_TABLE = "unet.class_embedding.weight"


def finetune(*options: object, code: int = 0) -> Ran:
    ran = run_cli("finetune", *options)
    assert ran.code == code, ran.err
    assert "Traceback" not in ran.err
    return ran


def planned(*options: object) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(finetune(*options, "--dry-run", "--json").out)
    return plan


def images_of(folder: Path, classes: int, side: int = 8, each: int = 2, mode: str = "L") -> Path:
    """Write a folder of so many classes of small pictures."""
    from PIL import Image

    for label in range(classes):
        (folder / f"c{label:02}").mkdir(parents=True)
        for index in range(each):
            Image.new(mode, (side, side), 10 * label + index).save(folder / f"c{label:02}" / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("finetune") / "artifacts"
    place = ("--workspace", root)
    start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, *place).path
    model = run_cli("train", start, "--steps", 2, "--lr", 1e-2, *FEW, *place).path
    return root, model, run_cli("bank", model, *LESS, *place).path


@pytest.fixture
def made(_made: tuple[Path, Path, Path], workspace: Path) -> Iterator[tuple[Path, Path]]:
    """A workspace of the test's own with a model of the digits and its bank."""
    root, *paths = _made
    shutil.copytree(root, workspace, symlinks=True)
    model, bank = (workspace / path.relative_to(root) for path in paths)
    yield model, bank


def test_diff_tuning_with_a_bank(made: tuple[Path, Path]) -> None:
    model, bank = made
    command = (model, *OTHERS, "--bank", bank, "--steps", 4, *FEW)
    ran = finetune(*command)
    tuned = whole(ran.path)
    manifest = tuned.manifest
    assert tuned.kind == "model" and manifest.stage == "finetune"
    assert [parent.role for parent in manifest.parents] == ["model", "bank"]
    metrics = manifest.metrics
    wanted = {
        "method": "diff-tuning", "retention": "bank", "coefficients": "sampling",
        "batch": {"retained": 1, "target": 7}, "mean_timestep": {"target": 666.0, "retained": 333.0},
        "label_rows": {"rows": "reuse", "classes": 10, "null": "kept"},
    }  # fmt: skip
    assert metrics.items() >= wanted.items()
    assert metrics["trainable_parameters"] == metrics["parameters"] and metrics["bank"]["count"] == 6
    assert manifest.config["retention_weight"] == 0.1 and manifest.config["bank"] == str(bank)
    assert read_config(tuned) == read_config(whole(model))
    assert manifest.cost["steps"] == 4 and manifest.cost["samples"] == 32 and manifest.cost["flops"] > 0
    assert weights(ran.path)["model.safetensors"] != weights(ran.path)["ema.safetensors"]
    for said in ("1 retained images (bank) at mean timestep 333", "7 new ones at mean timestep 666", "first ones"):
        assert said in ran.err, ran.err
    again = finetune(*command)
    assert "already there" in again.err and again.path == ran.path
    assert finetune("--recipe", ran.path).path.resolve() == ran.path.resolve()
    assert run_cli("sample", ran.path, "--samples", 2, "--sampling-steps", 1).code == 0


def test_the_newest_bank_is_taken_and_one_is_made_when_there_is_none(made: tuple[Path, Path]) -> None:
    model, bank = made
    named = finetune(model, *OTHERS, "--bank", bank, *ONE)
    taken = finetune(model, *OTHERS, *ONE)
    assert taken.path == named.path and f"taking {bank}" in taken.err
    dry = planned(model, *OTHERS, *ONE, "--bank-samples", 5)
    assert dry["config"]["bank"] is None and not list(bank.parent.glob("*-n5-*"))
    made_now = finetune(model, *OTHERS, *ONE, "--bank-samples", 5)
    assert "5 images are sampled first" in made_now.err and made_now.path != named.path
    other = whole(whole(made_now.path).path / whole(made_now.path).manifest.parents[1].path)
    assert other.kind == "bank" and other.manifest.metrics["images"] == 5
    refused = finetune(model, *OTHERS, "--bank", bank, "--bank-samples", 5, *ONE, code=EXIT_USAGE)
    assert "no bank is made" in refused.err


def test_every_way_gives_another_model(made: tuple[Path, Path]) -> None:
    model, bank = made
    ways: dict[str, tuple[object, ...]] = {
        "bank": (),
        "weights": ("--coefficients", "weights"),
        "power": ("--power", 0.5),
        "unlike": ("--retention-power", 2),
        "lambda": ("--retention-weight", 1),
        "share": ("--retention-share", 0.5),
        "shots": ("--shots", 1),
        "none": ("--retention", "none"),
        "kd": ("--retention", "kd"),
        "kd of bank": ("--retention", "kd", "--bank", bank),
        "full": ("--method", "full"),
    }
    # Two steps: a student that is its teacher has nothing to learn from it.
    found = {name: whole(finetune(model, *OTHERS, "--steps", 2, *FEW, *way).path) for name, way in ways.items()}
    made_by: dict[bytes, list[str]] = {}
    for name, artifact in found.items():
        made_by.setdefault(weights(artifact.path)["model.safetensors"], []).append(name)
    assert all(len(names) == 1 for names in made_by.values()), str([n for n in made_by.values() if len(n) > 1])
    roles = {name: [parent.role for parent in artifact.manifest.parents] for name, artifact in found.items()}
    assert roles["kd"] == roles["none"] == roles["full"] == ["model"]
    assert roles["kd of bank"] == roles["bank"] == ["model", "bank"]
    metrics = {name: artifact.manifest.metrics for name, artifact in found.items()}
    assert metrics["share"]["batch"] == {"retained": 4, "target": 4}
    assert metrics["none"]["batch"] == {"retained": 0, "target": 8} and metrics["full"]["batch"] == {"target": 8}
    assert "coefficients" not in metrics["full"]
    assert metrics["shots"]["shots"] == 1 and metrics["bank"]["shots"] is None
    settings = {name: artifact.manifest.config for name, artifact in found.items()}
    assert settings["weights"]["retention_weight"] == 1.0 and settings["power"]["retention_power"] == 0.5
    flops = {name: artifact.manifest.cost["flops"] for name, artifact in found.items()}
    assert flops["bank"] == flops["full"] < flops["kd"] == flops["kd of bank"], "the teacher sees 1 image of 8"
    assert flops["kd"] - flops["full"] == flops["full"] // (3 * 8)


def test_without_coefficients_it_is_plain_tuning_at_uniform_timesteps(made: tuple[Path, Path]) -> None:
    """Weights of power 0 and nothing retained leave the loss and the timesteps as they are."""
    model, _ = made
    plain = finetune(model, *OTHERS, *ONE, "--method", "full").path
    same = finetune(model, *OTHERS, *ONE, "--retention", "none", "--power", 0, "--coefficients", "weights").path
    assert weights(plain) == weights(same)


def test_new_rows_are_drawn_and_the_null_row_is_kept(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    still = (*ONE, "--lr", 0, "--method", "full", "--data", f"folder:{images_of(tmp_path / 'three', 3)}")
    before = load_tensors(model / "ema.safetensors")[TABLE]
    drawn = load_tensors(finetune(model, *still).path / "model.safetensors")
    assert drawn[TABLE].shape == (4, 64) and torch.equal(drawn[TABLE][3], before[10])
    rows = drawn[TABLE][:3]
    assert float(rows.std()) == pytest.approx(0.02, rel=0.2) and abs(float(rows.mean())) < 0.005
    reused = load_tensors(finetune(model, *still, "--label-rows", "reuse").path / "model.safetensors")
    assert torch.equal(reused[TABLE], before[[0, 1, 2, 10]])
    other = load_tensors(finetune(model, *still, "--seed", 1).path / "model.safetensors")
    assert not torch.equal(other[TABLE][:3], rows) and torch.equal(other[TABLE][3], before[10])
    rest = load_tensors(model / "ema.safetensors")
    assert all(torch.equal(value, rest[name]) for name, value in drawn.items() if name != TABLE)
    plan = planned(model, *still)
    assert plan["label_rows"] == {"rows": "new", "classes": 3, "null": "kept"}


def test_more_classes_than_rows(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    data = ("--data", f"folder:{images_of(tmp_path / 'many', 12)}")
    ran = finetune(model, *data, *ONE, "--label-rows", "reuse", code=EXIT_INPUT)
    assert "12 classes" in ran.err and "rows for 10" in ran.err and "--label-rows new" in ran.err
    assert read_config(whole(finetune(model, *data, *ONE, "--label-rows", "new").path)).num_classes == 12


def test_a_bank_of_another_model_is_refused(made: tuple[Path, Path]) -> None:
    model, bank = made
    other = run_cli("train", model, "--steps", 1, *FEW).path
    ran = finetune(other, *OTHERS, "--bank", bank, *ONE, code=EXIT_INPUT)
    assert "another model" in ran.err and f"finectl bank {other}" in ran.err
    assert "another model" not in finetune(other, *OTHERS, *ONE, "--bank-samples", 4).err


def test_data_of_another_shape(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    colours = finetune(model, "--data", f"folder:{images_of(tmp_path / 'rgb', 2, mode='RGB')}", *ONE, code=EXIT_INPUT)
    assert "3x8x8 images" in colours.err and "1x8x8, as" in colours.err and "a data set of 1 channels" in colours.err
    larger = ("--data", f"folder:{images_of(tmp_path / 'grey', 2, side=16)}")
    refused = finetune(model, *larger, "--image-size", 16, *ONE, code=EXIT_INPUT)
    assert "1x16x16 images" in refused.err and "leave --image-size out" in refused.err
    assert planned(model, *larger, *ONE, "--method", "full")["config"]["image_size"] == 8, "the model's size by default"
    wide = run_cli(
        "init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", "photos", "--image-size", 16
    )
    fixed = finetune(wide.path, "--data", "digits", *ONE, "--method", "full", code=EXIT_INPUT)
    assert "1x8x8 images" in fixed.err and "3x16x16, as" in fixed.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "full", "--power", 2), "--power 2.0 with --method full"),
        (("--method", "full", "--retention", "kd"), "--retention kd with --method full"),
        (("--retention", "none", "--retention-weight", 1), "leave --retention-weight out"),
        (("--retention", "none", "--bank", "x"), "leave --bank out"),
        (("--batch-size", 4), "--retention-share 0.2 of a batch of 4"),
        (("--peft-set", "rank=4"), "no setting 'rank'"),
        (("--peft", "lora", "--peft-set", "rang=4"), "did you mean 'rank'"),
    ],
)
def test_options_that_contradict_each_other(options: tuple[object, ...], says: str, made: tuple[Path, Path]) -> None:
    ran = run_cli("finetune", made[0], *OTHERS, "--steps", 1, "--eval-every", 0, *options)
    assert ran.code in (EXIT_USAGE, EXIT_INPUT) and ran.out == "", ran.err
    assert says in ran.err or (says == "leave --bank out" and "there is no" in ran.err), ran.err


@pytest.mark.parametrize("own", [False, True])
def test_the_bank_is_retained_under_no_class_or_under_its_own(
    own: bool, made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, bank = made
    made_of = load_tensors(bank / "images-00000.safetensors")["labels"].tolist()
    seen: list[list[int]] = []
    step_of = training_run.train_step

    def watch(run: Any, step: int) -> Any:
        (part,) = run.batches.get(step)
        seen.append(part.labels.tolist())
        return step_of(run, step)

    monkeypatch.setattr("finectl.training.loop.train_step", watch)
    command = (model, *OTHERS, "--bank", bank, "--steps", 6, "--batch-size", 10, "--eval-every", 0)
    ran = finetune(*command, *(("--bank-labels", "own") if own else ()))
    retained, new = (
        {label for labels in seen for label in labels[:2]},
        {label for labels in seen for label in labels[2:]},
    )
    assert new <= {5, 6, 7, 8, 9}
    assert retained <= {0, 1, 2, 3, 4, 5} and retained & set(made_of) if own else retained == {10}
    assert ("in their classes" in ran.err) is own
    manifest = whole(ran.path).manifest
    assert manifest.metrics["bank"]["labels"] == manifest.config["bank_labels"] == ("own" if own else None)
    if own:
        assert finetune("--recipe", ran.path).path.resolve() == ran.path.resolve()
    else:
        again = finetune(*command, "--bank-labels", "null")
        assert again.path == ran.path and "already there" in again.err


def test_classes_of_a_bank_that_are_not_those_that_are_learned(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, bank = made
    own = ("--bank-labels", "own", *ONE)
    data = ("--data", f"folder:{images_of(tmp_path / 'three', 3)}")
    for options, says in (
        ((*data, "--bank", bank), "others than those"),
        ((*OTHERS, "--bank", bank, "--label-rows", "new"), "others than those"),
        ((*OTHERS, "--retention", "kd"), "no bank is retained"),
        ((*OTHERS, "--method", "full"), "no bank is retained"),
    ):
        assert says in finetune(model, *options, *own, code=EXIT_USAGE).err, options


@pytest.mark.parametrize("way", ["bank", "kd"])
def test_killed_and_resumed_it_is_the_same(way: str, made: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    model, bank = made
    retained = ("--bank", bank) if way == "bank" else ("--retention", "kd")
    command = (model, *OTHERS, *retained, "--steps", 5, "--save-every", 1, *FEW, "--workspace")
    unbroken = weights(finetune(*command, tmp_path / "a").path)
    step_of, seen = training_run.train_step, []

    def broken(run: Any, step: int) -> Any:
        seen.append(step)
        if step == 3:
            raise RuntimeError("power cut")
        return step_of(run, step)

    with monkeypatch.context() as patched:
        patched.setattr("finectl.training.loop.train_step", broken)
        assert run_cli("finetune", *command, tmp_path / "b").code == 1
    resumed = finetune(*command, tmp_path / "b")
    assert seen == [0, 1, 2, 3] and "step=3 steps=5" in resumed.err
    assert weights(resumed.path) == unbroken


def test_few_parameters_are_trained_and_the_result_is_a_plain_model(made: tuple[Path, Path]) -> None:
    model, _ = made
    ran = finetune(model, *OTHERS, "--steps", 2, *FEW, "--peft", "difffit", "--peft-set", "blocks=1")
    tuned, metrics = whole(ran.path), whole(ran.path).manifest.metrics
    assert metrics["peft"]["method"] == "difffit" and metrics["trainable_parameters"] < metrics["parameters"] / 10
    assert f"training {metrics['trainable_parameters']:,} of {metrics['parameters']:,}" in ran.err
    assert tuned.manifest.config["lr"] == pytest.approx(5e-3), "ten times that of full tuning"
    assert tuned.manifest.config["peft_set"] == ["layers=proj,fc2", "blocks=1", "labels=yes"]
    assert finetune("--recipe", ran.path).path.resolve() == ran.path.resolve(), "settings with commas come back"
    assert any(file.path.startswith("adapter/") for file in tuned.manifest.files)
    before, after = (load_tensors(path / "ema.safetensors") for path in (model, ran.path))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert set(before) == set(after) and moved and "x_embedder.proj.weight" not in moved
    load_any_model(tuned)


def test_a_dry_run_says_what_would_be_trained(made: tuple[Path, Path]) -> None:
    model, _ = made
    plan = planned(model, *OTHERS, "--retention", "kd", "--steps", 10, "--batch-size", 32)
    assert plan["batch"] == {"retained": 6, "target": 26} and plan["mean_timestep"]["target"] == 666.0
    assert plan["parameters"] == plan["trainable_parameters"] and plan["memory_bytes"] > 0
    assert plan["step_s"] > 0 and plan["steps_per_s"] == pytest.approx(1 / plan["step_s"], rel=0.1)
    settings = planned(model, "--data", "shape:1x8x8:4", "--method", "full")["config"]
    wanted = {"steps": 24_000, "batch_size": 32, "lr": 1e-4, "ema": 0.9999, "clip_grad": 0.0, "weight_decay": 0.0}
    assert settings.items() >= wanted.items() and settings["lr_schedule"] == "constant" and settings["betas"] is None


def test_plain_tuning_with_a_recipe_of_diff_tuning(made: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = made
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("finetune:\n  coefficients: weights\n  power: 0.5\n  retention-share: 0.5\n  bank-samples: 3\n")
    plan = planned(model, *OTHERS, *ONE, "--recipe", recipe, "--method", "full")
    assert plan["config"]["power"] is None and plan["batch"] == {"target": 8}
    alone = planned(model, *OTHERS, *ONE, "--recipe", recipe, "--retention", "none")
    assert alone["config"]["power"] == 0.5 and alone["config"]["retention_share"] is None


def test_an_imported_model_with_a_learned_variance(workspace: Path, tmp_path: Path) -> None:
    file = tmp_path / "dit.pt"
    torch.save(published_state(), file)
    model = run_cli("convert", file, "--heads", 3).path
    assert read_config(whole(model)).learn_sigma
    bank = run_cli("bank", model, *LESS).path
    diffusers_vae().save_pretrained(tmp_path / "vae")  # its latents are as large as its images
    latents = run_cli(
        "encode", "--data", f"folder:{images_of(tmp_path / 'i', 3, mode='RGB')}", "--vae", tmp_path / "vae"
    ).path
    ran = finetune(model, "--data", f"latents:{latents}", "--bank", bank, *ONE)
    tuned = whole(ran.path)
    assert read_config(tuned).learn_sigma and read_config(tuned).num_classes == 3
    before, after = (load_tensors(path / "model.safetensors") for path in (model, ran.path))
    channels = before["final_layer.linear.bias"].numel() // 2
    assert not torch.equal(after[TABLE][3], before[TABLE][10]), "the null class goes on learning"
    assert not torch.equal(before["final_layer.linear.bias"][channels:], after["final_layer.linear.bias"][channels:])


@pytest.mark.parametrize("labelled", [True, False])
def test_unets_with_and_without_classes(labelled: bool, workspace: Path, tmp_path: Path) -> None:
    diffusers_unet(**({"num_class_embeds": 4} if labelled else {})).save_pretrained(tmp_path / "unet")
    model = run_cli("convert", tmp_path / "unet").path
    data = ("--data", f"folder:{images_of(tmp_path / 'three', 3)}")
    taught = run_cli("finetune", model, *data, *ONE, "--retention", "kd")
    bank = run_cli("bank", model, *LESS).path
    tuned = whole(finetune(model, *data, *ONE, "--bank", bank, "--lr", 0).path)
    config, before = read_config(tuned), load_tensors(model / "model.safetensors")
    after = load_tensors(tuned.path / "model.safetensors")
    if not labelled:
        assert config.num_classes == 0 and taught.code == 0
        assert all(torch.equal(before[name], value) for name, value in after.items())
        refused = finetune(model, *data, *ONE, "--bank", bank, "--label-rows", "new", code=EXIT_USAGE)
        assert "has no label table" in refused.err
        return
    assert taught.code == EXIT_USAGE and "--retention bank" in taught.err
    assert (config.num_classes, config.has_null_class) == (3, True)
    assert after[UNET_TABLE].shape[0] == 4
    assert torch.allclose(after[UNET_TABLE][3], before[UNET_TABLE].mean(0))
    assert tuned.manifest.metrics["label_rows"]["null"] == "mean of the rows"
    total = sum(value.numel() for value in after.values())
    assert tuned.manifest.metrics["parameters"] == total
    plain = whole(finetune(model, *data, *ONE, "--method", "full").path)
    assert not read_config(plain).has_null_class and read_config(plain).num_classes == 3


@pytest.mark.parametrize("way", ["bank", "kd"])
def test_a_model_of_text_retains_images_under_the_empty_caption(way: str, workspace: Path, monkeypatch: Any) -> None:
    model = run_cli("init", "--method", "he", "--model", "unet-text-nano", "--text-encoder", "hash").path
    retained: tuple[object, ...] = ("--retention", "kd")
    if way == "bank":
        retained = ("--bank", run_cli("bank", model, *LESS, "--prompt", "a photo").path)
    seen: list[tuple[list[int], int]] = []
    step_of = training_run.train_step

    def watch(run: Any, step: int) -> Any:
        (part,) = run.batches.get(step)
        seen.append((part.labels.tolist(), len(run.model._texts) - 1))
        return step_of(run, step)

    monkeypatch.setattr("finectl.training.loop.train_step", watch)
    finetune(model, "--data", "digits#3,4", "--steps", 2, "--batch-size", 10, "--eval-every", 0, *retained)
    for labels, empty in seen:
        assert labels[:2] == [empty, empty] and empty not in labels[2:]


def test_experts_of_ranges_retain_images(made: tuple[Path, Path]) -> None:
    model, bank = made
    short = (*OTHERS, "--ranges", 2, "--steps", 2, *FEW)
    ran = run_cli("finetune-ranges", model, *short, "--method", "diff-tuning")
    assert ran.code == 0 and f"taking {bank}" in ran.err, ran.err
    together = whole(ran.path)
    experts = [whole(ran.path / parent.path) for parent in together.manifest.parents[1:]]
    assert [[parent.role for parent in expert.manifest.parents] for expert in experts] == [["base", "bank"]] * 2
    settings = experts[0].manifest.config
    assert settings.items() >= {"consistency": 0.0, "retention_share": 0.2, "retention_weight": 0.1}.items()
    named = run_cli("finetune-ranges", model, *short, "--method", "diff-tuning", "--bank", bank)
    assert named.path == ran.path and "already there" in named.err
    assert run_cli("finetune-ranges", "--recipe", ran.path).path.resolve() == ran.path.resolve()
    held = run_cli("finetune-ranges", model, *short).path
    alone = run_cli("finetune-ranges", model, *short, "--consistency", 0).path
    assert len({weights(path)["experts/0/model.safetensors"] for path in (ran.path, held, alone)}) == 3
    for options, says in (
        (("--bank", bank), "leave"),
        (("--method", "diff-tuning", "--consistency", 1), "leave --consistency out"),
        (("--method", "diff-tuning", "--batch-size", 4), "--retention-share 0.2 of a batch of 4"),
    ):
        refused = run_cli("finetune-ranges", model, *short, *options)
        assert refused.code == EXIT_USAGE and (says in refused.err or "--method diff-tuning" in refused.err), (
            refused.err
        )


def dit_xl(workspace: Path) -> Path:
    """Publish a DiT-XL/2 without weights, which a plan does not read."""

    def make(job: Job[CountConfig]) -> Outcome:
        config = preset("dit-xl/2", image_size=32, channels=4, num_classes=1000, learn_sigma=True)
        write_json(job.directory / CONFIG, config.to_dict())
        write_atomic(job.directory / "model.safetensors", tiny_safetensors())
        return Outcome()

    def name(config: CountConfig, parents: Sequence[Any]) -> Plan[CountConfig]:
        return Plan(config, slug="dit-xl")

    made = run_stage(
        Stage("convert", 1, "model", CountConfig, lambda config: None, name, make),
        CountConfig(), [], RunOptions(workspace=workspace), Console(quiet=True),
    )  # fmt: skip
    assert made.artifact is not None
    return made.artifact.path


RECIPE = ROOT / "recipes" / "diff-tuning-dit-xl.yaml"
SETS = {
    "food-101": 101, "sun397": 397, "df20-mini": 182, "caltech-101": 102, "cub-200": 200, "artbench-10": 10,
    "flowers-102": 102, "stanford-cars": 196,
}  # fmt: skip


def test_the_papers_settings_on_its_eight_data_sets(workspace: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stage, "STAGE", replace(stage.STAGE, measure=None))
    model = dit_xl(workspace)
    for name, classes in SETS.items():
        plan = planned(model, "--recipe", f"{RECIPE}:{name}")
        rest = 1152 * (classes - 1000)
        assert plan["parameters"] == plan["trainable_parameters"] == 674_834_720 + rest, name
        assert plan["label_rows"] == {"rows": "reuse", "classes": classes, "null": "kept"}
        assert plan["batch"] == {"retained": 6, "target": 26}
        assert plan["mean_timestep"] == {"target": 666.0, "retained": 333.0}
        settings = plan["config"]
        wanted = {"steps": 24_000, "batch_size": 32, "lr": 1e-4, "ema": 0.9999, "clip_grad": 0.0, "weight_decay": 0.0}
        assert settings.items() >= wanted.items() and settings["flip"] and settings["retention_weight"] == 0.1
    few = planned(model, "--recipe", f"{RECIPE}:difffit")
    assert few["trainable_parameters"] == 687_776 + 1152 * (200 - 101), "as counted for 101 classes"
    alike = planned(model, "--recipe", f"{RECIPE}:difffit", "--batch-size", 32)
    saved = planned(model, "--recipe", f"{RECIPE}:cub-200")["memory_bytes"] - alike["memory_bytes"]
    frozen = few["parameters"] - few["trainable_parameters"]
    assert saved == 4 * 4 * frozen, "gradients, moments and average of what is frozen"
    plain = planned(model, "--recipe", f"{RECIPE}:cub-200", "--method", "full")
    assert plain["batch"] == {"target": 32} and plain["config"]["steps"] == 24_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("batch", "retention"), [(1, "none"), (2, "bank")])
def test_one_step_of_dit_xl(batch: int, retention: str, workspace: Path, capfd: Any) -> None:
    """DiT-XL/2 at 256 tokens with a learned variance, in less than 24 GiB: without retained images, and with one."""
    from finectl.data.dataset import ImageSet
    from finectl.data.sources import DataInfo
    from finectl.training.batches import Batches, Retained
    from finectl.training.estimate import trial_run
    from finectl.training.retention import Chain, ChainLoss, ChainTimesteps
    from finectl.world import World

    config = preset("dit-xl/2", image_size=32, channels=4, num_classes=200, learn_sigma=True)
    run = trial_run(config, Execution("cpu", "float32"), batch)
    kept = 1 if retention == "bank" else 0
    info = DataInfo("bank", "", 2, 2, 0, 32, 4, 200, (), False)
    bank = ImageSet.in_memory(info, "train", torch.randn(2, 4, 32, 32), torch.full((2,), 200))
    run.batches = Batches(
        run.batches.data, batch, 0, torch.device("cpu"), World(), retained=Retained(bank, kept) if kept else None
    )
    chain = Chain(batch, kept)
    run.loss, run.timesteps = ChainLoss(chain), ChainTimesteps(chain)
    before = run.model.final_layer.linear.bias.detach().clone()
    assert float(training_run.train_step(run, 0)) > 0
    assert not torch.equal(before, run.model.final_layer.linear.bias)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capfd.disabled():
        print(f"\npeak memory of a step of {batch}: {peak:.1f} GiB")
    assert peak < 24
