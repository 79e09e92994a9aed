"""Images to latents from the command line, and models that are trained on them and decoded again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import child_environment, command_line, finectl, run_cli, tiny_vae, weights, whole

from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors
from finectl.data.dataset import load
from finectl.data.images import to_uint8
from finectl.data.latents import INDEX, LatentIndex
from finectl.data.sources import DataOptions, describe
from finectl.errors import EXIT_INPUT, EXIT_SAVED, EXIT_USAGE
from finectl.models.vae import describe_vae, load_vae

DEADLINE_S = 180.0
TINY = ("--steps", 3, "--batch-size", 8, "--eval-every", 0)
# Small batches make it last long enough to be killed.
SLOW = ("--shard-size", 100, "--batch-size", 2, "--flip")


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vae(tmp_path_factory.mktemp("vae") / "grey")


@pytest.fixture(scope="session")
def _latents(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latents")
    options = ("--shard-size", 500, "--batch-size", 100, "--flip")
    return run_cli("encode", "--data", "digits", "--vae", vae, *options, "--workspace", place).path


@pytest.fixture(scope="session")
def _model(_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of latents, by way of every stage."""
    place = ("--workspace", tmp_path_factory.mktemp("chain"))
    data = ("--data", f"latents:{_latents}", "--flip")
    condensed = run_cli("condense", "--depth", 2, *data, *TINY, *place).path
    learngene = run_cli("extract", condensed, *place).path
    init = run_cli("init", learngene, "--depth", 3, "--tune-steps", 2, "--batch-size", 8, *place).path
    return run_cli("train", init, *TINY, *place).path


@pytest.fixture
def latents(_latents: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_latents, tmp_path / "latents"))


@pytest.fixture
def model(_model: Path, workspace: Path) -> Iterator[Path]:
    """A model whose autoencoder is where it was."""
    return shutil.copytree(_model, workspace / "model" / _model.name)


def test_latents_are_those_of_the_autoencoder(latents: Path, vae: Path) -> None:
    artifact = whole(latents)
    index = LatentIndex.read(latents / INDEX)
    assert artifact.kind == "latents" and artifact.name == "latents" and index.flips
    assert [shard.count for shard in index.shards] == [500, 500, 500, 297]
    train = load(f"latents:{latents}", "train", options=DataOptions(flip=True))
    images = load("digits", "train")
    assert torch.equal(train.indices, images.indices) and torch.equal(train.labels, images.labels)
    some = torch.tensor([1, 700, 1400])
    encoder = load_vae(str(vae))
    wanted = encoder.encode_moments(images.transform(images.read(some)))
    assert torch.allclose(train.read(some).float(), wanted, rtol=1e-3, atol=1e-5)
    mirrored = encoder.encode_moments(images.transform(images.read(some)).flip(-1))
    read = train.read(some, torch.ones(3, dtype=torch.bool)).float()
    assert torch.allclose(read, mirrored, rtol=1e-3, atol=1e-5) and not torch.allclose(read, wanted, rtol=1e-2)
    scale = describe_vae(str(vae))["scaling_factor"]
    assert torch.allclose(train.transform(train.read(some)), wanted[:, :4] * scale, rtol=2e-3, atol=1e-5)
    metrics = artifact.manifest.metrics
    assert metrics["images"] == 1797 and 0 < metrics["latent_std"] < 10
    assert artifact.manifest.config["vae"] == str(vae)


def test_float32_keeps_what_the_autoencoder_gives(vae: Path, workspace: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", mode="L")
    options = ("--shard-size", 4, "--batch-size", 3, "--storage", "float32")
    path = run_cli("encode", "--data", f"folder:{folder}", "--vae", vae, *options).path
    assert path.name.startswith("pictures-8-") and path.parent.name == "latents"
    latents, images = load(f"latents:{path}", "train"), load(f"folder:{folder}", "train")
    wanted = load_vae(str(vae)).encode_moments(images.images)
    assert torch.allclose(latents.read(torch.arange(len(latents))), wanted, atol=1e-5)
    info = describe(f"latents:{path}")
    assert info.class_names == ("one", "two") and (info.image_size, info.channels, info.bundled) == (4, 4, False)
    assert info.split_by == images.info.fingerprint and info.fingerprint != images.info.fingerprint


def pictures(folder: Path, mode: str, side: int = 8) -> Path:
    """Make a folder of 10 images of noise in two classes."""
    generator = torch.Generator().manual_seed(0)
    for number in range(10):
        shape = (side, side) if mode == "L" else (side, side, 3)
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()
        (folder / ("one", "two")[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / ("one", "two")[number % 2] / f"{number}.png")
    return folder


def test_the_recipe_counts_content_not_places(vae: Path, workspace: Path, tmp_path: Path) -> None:
    def recipe(*options: object) -> str:
        return str(json.loads(run_cli("encode", "--dry-run", "--json", *options).out)["recipe"])

    copied = Path(shutil.copytree(vae, tmp_path / "copy"))
    other = tiny_vae(tmp_path / "other", seed=1)
    recipes = [
        recipe("--data", "digits", "--vae", vae),
        recipe("--data", "digits", "--vae", other),
        recipe("--data", "digits", "--vae", vae, "--flip"),
        recipe("--data", "digits", "--vae", vae, "--storage", "float32"),
    ]
    assert recipe("--data", "digits", "--vae", copied) == recipes[0] and len(set(recipes)) == 4


def test_the_plan_is_printed(vae: Path, workspace: Path) -> None:
    ran = run_cli("encode", "--vae", vae, "--shard-size", 1000, "--flip", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert (plan["images"], plan["latents"], plan["shards"]) == (1797, "4x4x4", 2)
    assert plan["disk_bytes"] == 1797 * (2 * 2 * 8 * 4 * 4 + 8) and not workspace.exists()


def test_every_stage_to_pictures(model: Path, vae: Path, latents: Path) -> None:
    manifest = open_artifact(model).manifest
    recorded = manifest.data["vae"]
    assert recorded == describe_vae(str(vae)) and manifest.data["name"].startswith("latents:")
    sampled = run_cli("sample", model, "--samples", 5, "--sampling-steps", 4, "--batch-size", 2).path
    assert len(list(sampled.glob("samples/*.png"))) == 5
    assert Image.open(sampled / "samples" / "000004.png").size == (8, 8)
    assert whole(sampled).manifest.config["vae_digest"] == recorded["digest"]
    levels = load_tensors(sampled / "samples.safetensors")["images"]
    assert levels.shape == (5, 1, 8, 8)
    evaluated = run_cli("evaluate", model, "--draws", 1)
    assert evaluated.code == 0 and "loss" in evaluated.err


def test_decoded_samples_are_measured_against_decoded_latents(model: Path, vae: Path, latents: Path) -> None:
    options = ("--metrics", "loss,frechet", "--draws", 1, "--samples", 64, "--sampling-steps", 2)
    ran = run_cli("evaluate", model, *options)
    row = json.loads((ran.path / "metrics.json").read_text())[0]
    protocol = row["frechet"]["protocol"]
    assert (protocol["image_size"], protocol["reference_n"]) == (8, 1438) and protocol["reference"].endswith("/train")
    whole_set = run_cli("evaluate", model, *options, "--reference", f"latents:{latents}")
    other = json.loads((whole_set.path / "metrics.json").read_text())[0]["frechet"]
    assert other["protocol"]["reference_n"] == 1797 and other["value"] != row["frechet"]["value"]
    pixels = run_cli("evaluate", model, *options, "--reference", "digits")
    assert json.loads((pixels.path / "metrics.json").read_text())[0]["frechet"]["protocol"]["image_size"] == 8


def test_pictures_are_decoded_unclipped_latents(model: Path, vae: Path) -> None:
    from finectl.diffusion.sampling import sample_images
    from finectl.models.io import load_model

    network = load_model(open_artifact(model)).eval()
    options: dict[str, Any] = {
        "null_label": 10, "scheduler": "ddim", "sampling_steps": 4, "guidance": 1.0, "seed": 0, "clip": False,
    }  # fmt: skip
    drawn = sample_images(network, (4, 4, 4), [0, 1, 2], **options)
    assert drawn.abs().max() > 1, "a clamp would show"
    wanted = to_uint8(load_vae(str(vae)).decode(drawn))
    path = run_cli("sample", model, "--samples", 3, "--sampling-steps", 4).path
    assert torch.equal(load_tensors(path / "samples.safetensors")["images"], wanted)


def test_another_autoencoder_is_refused(model: Path, vae: Path, tmp_path: Path) -> None:
    few = ("--samples", 1, "--sampling-steps", 1)
    other = tiny_vae(tmp_path / "other", seed=1)
    refused = run_cli("sample", model, *few, "--vae", other)
    assert refused.code == EXIT_INPUT and str(other) in refused.err and str(vae) in refused.err
    rescaled = tiny_vae(tmp_path / "rescaled", scaling_factor=0.25)
    refused = run_cli("sample", model, *few, "--vae", rescaled)
    assert refused.code == EXIT_INPUT
    assert "scaling factor 0.5" in refused.err and "scaling factor 0.25" in refused.err
    moved = Path(shutil.copytree(vae, tmp_path / "moved"))
    here = run_cli("sample", model, *few, "--vae", moved)
    assert here.code == 0 and run_cli("sample", model, *few).path == here.path, "where it lies does not matter"


def test_an_autoencoder_that_is_gone_or_changed(tmp_path: Path, workspace: Path) -> None:
    vae = tiny_vae(tmp_path / "vae")
    latents = run_cli("encode", "--data", "digits", "--vae", vae, "--batch-size", 200).path
    model = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 1, "--data", f"latents:{latents}").path
    few = ("--samples", 1, "--sampling-steps", 1)
    moved = vae.rename(tmp_path / "moved")
    gone = run_cli("sample", model, *few)
    assert gone.code == EXIT_INPUT and "--vae PATH" in gone.err and str(vae) in gone.err
    tiny_vae(vae, seed=1)
    assert run_cli("sample", model, *few).code == EXIT_INPUT
    assert run_cli("sample", model, *few, "--vae", moved).code == 0


def test_models_whose_latents_are_not_recorded(chain: Any, model: Path, vae: Path) -> None:
    few = ("--samples", 1, "--sampling-steps", 1)
    pixels = run_cli("sample", chain.model, *few, "--vae", vae)
    assert pixels.code == EXIT_USAGE and "trained on pixels (digits)" in pixels.err
    manifest = model / "manifest.yaml"
    text = manifest.read_text()
    start, end = text.index("\ndata:"), text.index("\nmetrics:")
    manifest.write_text(text[:start] + "\ndata: {}" + text[end:])
    unknown = run_cli("sample", model, *few)
    assert unknown.code == EXIT_INPUT and "4 channels, which are no pixels" in unknown.err and "--vae" in unknown.err
    assert run_cli("sample", model, *few, "--vae", vae).code == 0


def test_latents_of_another_space_are_refused_in_training(model: Path, tmp_path: Path) -> None:
    for change in ({"seed": 1}, {"scaling_factor": 0.25}):
        other = tiny_vae(tmp_path / f"other-{next(iter(change))}", **change)  # type: ignore[arg-type]
        latents = run_cli("encode", "--data", "digits", "--vae", other, "--batch-size", 200).path
        refused = run_cli("train", model, "--data", f"latents:{latents}", *TINY)
        assert refused.code == EXIT_INPUT and "one autoencoder" in refused.err


def test_wrong_calls(vae: Path, latents: Path, workspace: Path, tmp_path: Path) -> None:
    colour = pictures(tmp_path / "colour", mode="RGB", side=9)
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), EXIT_USAGE, "no autoencoder is named"),
        (("--vae", tmp_path / "nowhere"), EXIT_INPUT, "stabilityai/sd-vae-ft-ema"),
        (("--vae", "owner/name"), EXIT_INPUT, "--download"),
        (("--vae", "owner/name", "--download", "--offline"), EXIT_INPUT, "--download"),
        (("--vae", vae, "--data", f"latents:{latents}"), EXIT_USAGE, "latents already"),
        (("--vae", vae, "--data", f"folder:{colour}"), EXIT_INPUT, "RGB images"),
        (
            ("--vae", tiny_vae(tmp_path / "rgb", channels=3), "--data", f"folder:{colour}"),
            EXIT_INPUT,
            "9x9 pixels do not fit",
        ),
        (("--vae", vae, "--shard-size", 0), EXIT_USAGE, "--shard-size"),
    ]
    for options, code, message in cases:
        data = () if "--data" in options else ("--data", "digits")
        ran = run_cli("encode", *data, *options)
        assert (ran.code, message in ran.err) == (code, True), (options, ran.err)
        assert ran.out == "" and not list(workspace.glob("latents/*"))
    for options, message in ((("--flip",), "finectl encode --flip"), (("--image-size", 8), "--image-size 4")):
        plain = run_cli("encode", "--data", "digits", "--vae", vae, "--batch-size", 200).path
        ran = run_cli("condense", "--data", f"latents:{plain}", *TINY, *options)
        assert ran.code == EXIT_USAGE and message in ran.err


def shards_of(workspace: Path) -> dict[str, tuple[int, bytes]]:
    """Return inode and content of the shards that are done."""
    found = sorted(workspace.glob("latents/.*.partial/latents-*.safetensors"))
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in found}


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline_s, "it never got there"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_and_run_again(number: signal.Signals, vae: Path, workspace: Path, fast_disk: Path) -> None:
    arguments = ("encode", "--data", "digits", "--vae", vae, *SLOW)
    process = subprocess.Popen(
        command_line(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=child_environment(),
    )
    wait_for(process, lambda: len(shards_of(workspace)) >= 3)
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_SAVED), err
    assert out == "" and not list(workspace.glob("latents/[!.]*"))
    before = shards_of(workspace)
    assert 3 <= len(before) < 18
    resumed = run_cli(*arguments)
    assert f"image={100 * len(before)} images=1797" in resumed.err, "it did not go on from the finished shards"
    after = whole(resumed.path)
    for name, (inode, content) in before.items():
        assert after.file(name).stat().st_ino == inode and after.file(name).read_bytes() == content
    unbroken = run_cli(*arguments, "--workspace", fast_disk / "unbroken").path
    assert weights(resumed.path) == weights(unbroken)
    assert not (resumed.path / "state").exists()


def test_a_damaged_shard_is_made_again(vae: Path, workspace: Path, fast_disk: Path) -> None:
    arguments = ("encode", "--data", "digits", "--vae", vae, "--shard-size", 1000, "--batch-size", 200)
    whole_run = run_cli(*arguments).path
    partial = whole_run.with_name(f".{whole_run.name}.partial")
    recipe = open_artifact(whole_run).manifest.recipe
    whole_run.rename(partial)
    (partial / "manifest.yaml").unlink()
    (partial / "recipe").write_text(recipe)
    (partial / "state").mkdir()
    shard = partial / "latents-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    again = run_cli(*arguments)
    assert "image=1000 images=1797" in again.err and (again.path / shard.name).read_bytes() == content


def test_two_processes_share_the_shards(vae: Path, workspace: Path, fast_disk: Path) -> None:
    arguments = ("encode", "--data", "digits", "--vae", vae, "--shard-size", 300, "--batch-size", 100)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "finectl")
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert whole(path).manifest.execution["world_size"] == 2
    assert "images=900" in done.stderr, "the first process has three of the six shards"
    assert weights(path) == weights(run_cli(*arguments, "--workspace", fast_disk / "alone").path)


def test_encode_reads_the_help_of_nothing_heavy() -> None:
    ran = finectl("encode", "--help")
    assert ran.code == 0 and "--vae" in ran.out and "--shard-size" in ran.out
