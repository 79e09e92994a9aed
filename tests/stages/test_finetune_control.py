"""`finetune --control` end to end on a tiny UNet of text, and `sample` with what it makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import run_cli, tiny_vae, weights, whole

from finectl.artifacts.tensors import load_tensors
from finectl.errors import EXIT_INPUT, EXIT_USAGE
from finectl.models.io import load_any_model
from finectl.training import run as training_run
from finectl.training.log import read_log

FEW = ("--batch-size", 8, "--eval-every", 0, "--data", "photos", "--image-size", 8)
QUICK = ("--validate-every", 2, "--validation-images", 2, "--validation-steps", 2)
BANK = ("--bank-samples", 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A workspace with a UNet of text and a ControlNet on it."""
    root = tmp_path_factory.mktemp("control")
    place = ("--workspace", root)
    small = ("--data", "photos", "--image-size", 8, "--text-encoder", "hash")
    base = run_cli("init", "--method", "he", "--model", "unet-text-nano", *small, *place).path
    bank = run_cli("bank", base, "--samples", 6, "--sampling-steps", 1, "--prompt", "a cat", "--guidance", 1, *place)
    tuned = run_cli(
        "finetune", base, "--control", "edge", "--bank", bank.path, "--steps", 4, "--keep-at", "2", *FEW, *QUICK, *place
    )
    return {"root": root, "base": base, "bank": bank.path, "tuned": tuned.path}


@pytest.fixture
def here(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Path]]:
    monkeypatch.setenv("FINECTL_WORKSPACE", str(made["root"]))
    yield made


def test_the_artifact_is_a_controlnet_that_diffusers_loads_and_says_what_was_done(here: dict[str, Path]) -> None:
    from diffusers import ControlNetModel

    tuned, path = whole(here["tuned"]), here["tuned"]
    metrics, config = tuned.manifest.metrics, tuned.manifest.config
    assert tuned.kind == "controlnet" and [parent.role for parent in tuned.manifest.parents] == ["model", "bank"]
    branch = ControlNetModel.from_pretrained(path)
    assert metrics["trainable_parameters"] == sum(parameter.numel() for parameter in branch.parameters())
    state = load_tensors(path / "diffusion_pytorch_model.safetensors")
    raw = load_tensors(path / "raw" / "diffusion_pytorch_model.safetensors")
    assert (
        set(state) == set(raw) == set(branch.state_dict()) == set(load_tensors(path / "checkpoints/000002.safetensors"))
    )
    assert any(not torch.equal(state[name], raw[name]) for name in raw)
    backbone: Any = load_any_model(whole(here["base"]))
    assert not torch.equal(raw["conv_in.weight"], backbone.unet.conv_in.weight)
    assert metrics["control"]["settings"] == {"sigma": 1.0, "low": 0.1, "high": 0.2}
    assert metrics["batch"] == {"retained": 1, "target": 7}
    assert metrics["mean_timestep"] == {"target": pytest.approx(666, abs=1), "retained": pytest.approx(333, abs=1)}
    assert config["control_set"] == "sigma=1,low=0.1,high=0.2" and config["bank_control"] == "extracted"
    assert config["retention_weight"] == 0.1 and config["caption_dropout"] == 0.1 and tuned.manifest.cost["flops"] > 0


def test_validation_measures_the_control_again_and_draws_what_it_made(here: dict[str, Path]) -> None:
    log = [entry for entry in read_log(here["tuned"] / "log.jsonl") if "control_ssim" in entry]
    assert [entry["step"] for entry in log] == [0, 2, 4] and all(0 <= entry["control_mse"] <= 1 for entry in log)
    found = whole(here["tuned"]).manifest.metrics["validation"]
    assert found["images"] == 2 and found["measure"] == "ssim" and set(found["measures"]) == {"ssim", "mse"}
    assert found["measures"]["mse"]["last"] == log[-1]["control_mse"]
    assert found["measures"]["mse"]["of_real_images_of_other_controls"] > 0
    pictures = sorted((here["tuned"] / "validation").iterdir())
    assert [picture.name for picture in pictures] == ["000000.png", "000002.png", "000004.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.height > 3 * 48


@pytest.mark.parametrize("more", [("--method", "full"), ("--retention", "kd"), ("--bank-control", "empty")])
def test_interrupted_training_goes_on_bit_for_bit(
    here: dict[str, Path], tmp_path: Path, monkeypatch: Any, more: tuple[str, ...]
) -> None:
    bank = ("--bank", here["bank"]) if more[0] == "--bank-control" else ()
    command = ("finetune", here["base"], "--control", "sketch", *more, *bank, "--steps", 4, "--save-every", 2, *FEW)
    command = (*command, *QUICK, "--out")
    unbroken = run_cli(*command, tmp_path / "a").path
    step_of, seen = training_run.train_step, []

    def broken(run: Any, step: int) -> Any:
        seen.append(step)
        if step == 3:
            raise RuntimeError("power cut")
        return step_of(run, step)

    with monkeypatch.context() as patched:
        patched.setattr("finectl.training.loop.train_step", broken)
        assert run_cli(*command, tmp_path / "b").code == 1
    resumed = run_cli(*command, tmp_path / "b").path
    assert seen == [0, 1, 2, 3] and weights(resumed) == weights(unbroken)
    one, other = (whole(path).manifest.metrics["validation"] for path in (unbroken, resumed))
    assert one == other


def test_options_change_what_is_learned(here: dict[str, Path], tmp_path: Path) -> None:
    found, flops = {}, {}
    for name, more in {
        "plain": ("--method", "full"),
        "no texts": ("--method", "full", "--caption-dropout", 1),
        "other edges": ("--method", "full", "--control-set", "sigma=0.3"),
        "none": ("--retention", "none"),
        "kd": ("--retention", "kd"),
        "bank": ("--bank", here["bank"]),
        "empty controls": ("--bank", here["bank"], "--bank-control", "empty"),
    }.items():
        ran = run_cli("finetune", here["base"], "--control", "edge", "--steps", 3, "--validate-every", 0, *FEW, *more)
        found[name] = weights(ran.path)["raw/diffusion_pytorch_model.safetensors"]
        flops[name] = whole(ran.path).manifest.cost["flops"]
        assert "validation" not in {path.name for path in ran.path.iterdir()}
    assert len(set(found.values())) == len(found)
    assert flops["plain"] == flops["none"] == flops["bank"] < flops["kd"], "the UNet without its branch teaches"


def test_a_bank_is_made_where_none_is_named_and_another_models_is_refused(
    here: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "w"
    small = ("--data", "photos", "--image-size", 8, "--text-encoder", "hash", "--workspace", root)
    other = run_cli("init", "--method", "he", "--model", "unet-text-nano", "--seed", 1, *small).path
    ran = run_cli("finetune", other, "--control", "edge", "--bank", here["bank"], "--steps", 1, *FEW)
    assert ran.code == EXIT_INPUT and "made by another model" in ran.err and "finectl bank" in ran.err
    ran = run_cli("finetune", other, "--control", "edge", "--dry-run", "--json", *FEW, "--workspace", root)
    plan = json.loads(ran.out)
    assert plan["trainable_parameters"] == whole(here["tuned"]).manifest.metrics["trainable_parameters"]
    assert "would be sampled" in ran.err and plan["memory_bytes"] > 10**6 and not (root / "bank").exists()


def test_models_without_a_controlnet_are_refused(here: dict[str, Path]) -> None:
    for name, more in (("unet-nano", ("--data", "digits")), ("dit-nano", ("--data", "digits"))):
        model = run_cli("init", "--method", "he", "--model", name, *more).path
        ran = run_cli("finetune", model, "--control", "edge")
        assert ran.code == EXIT_USAGE and "for which diffusers has no ControlNet" in ran.err
        assert "unet-text-nano" in ran.err and ran.err.count("error:") == 1
        assert not list((here["root"] / "bank").glob(f"{model.name}*")), "a bank was made first"


def test_options_that_do_not_go_together_are_refused(here: dict[str, Path], tmp_path: Path) -> None:
    base, tuned = here["base"], here["tuned"]
    control = ("finetune", base, "--method", "full", "--control")
    for arguments, said in (
        ((*control, "edge", "--flip"), "mirrors images"),
        ((*control, "edge", "--peft", "lora"), "--peft lora with --control"),
        ((*control, "edge", "--shots", 3), "--shots 3 with --control"),
        ((*control, "edge", "--bank-control", "empty"), "there is no bank"),
        ((*control, "edge", "--control-images", tmp_path), "which is measured"),
        ((*control, "edge", "--control-model", tmp_path), "needs none"),
        ((*control, "depth"), "no network is named|none is named"),
        ((*control, "folder"), "no folder of control images"),
        (("finetune", base, "--validate-every", 3), "--validate-every 3 without --control"),
        (("sample", base, "--control-scale", 0.5), "INPUT is no ControlNet"),
        (("sample", tuned, "--labels", "1"), "--labels 1 with a ControlNet"),
        (("sample", tuned, "--control-image", "a.png", "--from-image", "b.png"), "both given"),
    ):
        ran = run_cli(*arguments)
        assert ran.code == EXIT_USAGE and any(part in ran.err for part in said.split("|")), ran.err


def test_sampling_follows_held_out_controls_given_ones_and_those_of_images(
    here: dict[str, Path], tmp_path: Path
) -> None:
    tuned, quick = here["tuned"], ("--samples", 3, "--sampling-steps", 2)
    path = run_cli("sample", tuned, *quick).path
    made, artifact = load_tensors(path / "samples.safetensors"), whole(path)
    assert made["images"].shape == made["controls"].shape == (3, 3, 8, 8)
    assert [parent.role for parent in artifact.manifest.parents] == ["controlnet", "model"]
    assert all(text.startswith("a photo of") for text in json.loads((path / "prompts.json").read_text()))
    assert len(list((path / "samples").iterdir())) == len(list((path / "controls").iterdir())) == 3
    smaller = load_tensors(run_cli("sample", tuned, *quick, "--batch-size", 2).path / "samples.safetensors")
    assert torch.equal(smaller["controls"], made["controls"])
    piped = run_cli("sample", "-", *quick, stdin=f"{tuned}\n")
    assert piped.path == path
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        picture = Image.new("RGB", (20, 16), (0, 0, 0))
        picture.paste((255, 255, 255), (0, 0, 6 + 4 * index, 16))
        picture.save(folder / f"{index}.png")
    given = run_cli("sample", tuned, *quick, "--control-image", folder).path
    controls = load_tensors(given / "samples.safetensors")["controls"]
    assert torch.equal(controls[0], controls[2]) and not torch.equal(controls[0], controls[1])
    assert json.loads((given / "prompts.json").read_text()) == ["", "", ""]
    measured = run_cli("sample", tuned, *quick, "--from-image", folder / "0.png", "--prompt", "a cat").path
    edges = load_tensors(measured / "samples.safetensors")["controls"]
    assert (
        set(edges.unique().tolist()) == {0, 255}
        and json.loads((measured / "prompts.json").read_text()) == ["a cat"] * 3
    )
    guided = load_tensors(run_cli("sample", tuned, *quick, "--guidance", 3).path / "samples.safetensors")["images"]
    plain = load_tensors(run_cli("sample", tuned, *quick, "--control-scale", 0).path / "samples.safetensors")["images"]
    assert not torch.equal(guided, made["images"]) and not torch.equal(plain, made["images"])
    bare = run_cli("sample", tuned, *quick, "--control-scale", 0, "--weights", "raw").path
    assert torch.equal(load_tensors(bare / "samples.safetensors")["images"], plain), "the branch counts at scale 0"


def test_controls_from_a_folder_train_and_sample_and_wrong_names_are_listed(
    here: dict[str, Path], tmp_path: Path
) -> None:
    images, controls = tmp_path / "images", tmp_path / "controls"
    for folder in (images, controls):
        folder.mkdir()
        for index in range(10):
            Image.new("RGB", (8, 8), (20 * index, 0, 90)).save(folder / f"{index}.png")
            if folder is images:
                (folder / f"{index}.txt").write_text(f"a square {index}")
    command = ("finetune", here["base"], "--method", "full", "--control", "folder", "--data", f"folder:{images}")
    command = (*command, "--steps", 2, "--batch-size", 4, "--eval-every", 0, *QUICK, "--control-images", controls)
    path = run_cli(*command).path
    found = whole(path).manifest.metrics["validation"]
    assert found["measure"] is None and found["measures"] == {} and (path / "validation" / "000002.png").exists()
    assert run_cli("sample", path, "--samples", 2, "--sampling-steps", 1).code == 0
    ran = run_cli("sample", path, "--from-image", images)
    assert ran.code == EXIT_USAGE and "--control-image" in ran.err
    retained = run_cli(
        *command, "--method", "diff-tuning", "--retention-share", 0.5, "--bank", here["bank"], "--dry-run", "--json"
    )
    assert json.loads(retained.out)["config"]["bank_control"] == "empty", "the bank's images have no control there"
    (controls / "3.png").rename(controls / "three.png")
    ran = run_cli(*command)
    assert ran.code == EXIT_INPUT and "3.png" in ran.err and "three.png" in ran.err


def test_latents_are_controlled_by_what_they_decode_to(here: dict[str, Path], tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "vae", channels=3)
    latents = run_cli("encode", "--vae", vae, "--data", "photos", "--image-size", 16).path
    small = ("--data", f"latents:{latents}", "--text-encoder", "hash")
    base = run_cli("init", "--method", "he", "--model", "unet-text-nano", *small).path
    few = ("--steps", 2, "--batch-size", 8, "--eval-every", 0)
    path = run_cli("finetune", base, "--method", "full", "--control", "edge", *small[:2], *few, *QUICK).path
    assert json.loads((path / "config.json").read_text())["conditioning_embedding_out_channels"] == [16, 32]
    sampled = run_cli("sample", path, "--samples", 2, "--sampling-steps", 1).path
    made = load_tensors(sampled / "samples.safetensors")
    assert made["controls"].shape == made["images"].shape == (2, 3, 16, 16)


def test_an_artifact_is_made_again_from_its_manifest_and_found(here: dict[str, Path]) -> None:
    tuned = here["tuned"]
    again = run_cli("finetune", "--recipe", tuned / "manifest.yaml")
    assert again.path == tuned and "already there" in again.err
    folder = tuned / "validation"
    sampled = run_cli("sample", tuned, "--samples", 1, "--sampling-steps", 1, "--from-image", folder).path
    assert run_cli("sample", "--recipe", sampled / "manifest.yaml").path == sampled
    for command in (("show", tuned), ("verify", tuned), ("ls",)):
        ran = run_cli(*command)
        assert ran.code == 0 and "controlnet" in ran.out + ran.err


def test_a_controlnet_without_its_model_is_one_clear_error(here: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "w"
    shutil.copytree(here["root"] / "controlnet", root / "controlnet", symlinks=True)
    ran = run_cli("sample", root / "controlnet" / here["tuned"].name, "--workspace", root)
    assert ran.code == EXIT_INPUT and "the model that" in ran.err and "bring it back" in ran.err
