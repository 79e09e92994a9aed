"""The knowledge bank from the command line: what is in it, how it is made piece by piece, and who may use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support import child_environment, run_cli, tiny_vae, weights, whole

from finectl.artifacts.store import open_artifact
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.cli.bank import bank_for
from finectl.cli.command import Call
from finectl.console import Console
from finectl.data.bank import bank_info, bank_prompts, open_bank, require_bank_of
from finectl.data.images import to_uint8
from finectl.diffusion import sampling
from finectl.errors import EXIT_INPUT, EXIT_INTERRUPTED, EXIT_SAVED, EXIT_USAGE, InputError, UsageError
from finectl.models.io import load_model
from finectl.runner import RunOptions
from finectl.stages.bank import STAGE

FEW = ("--batch-size", 8, "--eval-every", 0)
QUICK = ("--sampling-steps", 2, "--batch-size", 8)
"""Two steps of the reverse process."""
SHARDS = ("--samples", 44, "--shard-size", 16, *QUICK)
"""Three shards of two batches each, the last one short."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of pixels and one of latents, whose autoencoder is not where it was."""
    root = tmp_path_factory.mktemp("bank")
    place = ("--workspace", root)
    vae = tiny_vae(root / "vae")
    latents = run_cli("encode", "--data", "digits", "--vae", vae, "--batch-size", 200, *place).path
    found = {}
    for name, data in (("pixels", "digits"), ("latents", f"latents:{latents}")):
        model = ("--method", "he", "--model", "dit-nano", "--depth", 2)
        start = run_cli("init", *model, "--data", data, *place).path
        found[name] = run_cli(
            "train", start, "--steps", 10, "--lr", 0.01, "--warmup-steps", 0, "--ema", 0, *FEW, *place
        ).path
    vae.rename(root / "moved")
    return {**found, "vae": root / "moved"}


@pytest.fixture
def model(made: dict[str, Path], workspace: Path) -> Path:
    return Path(shutil.copytree(made["pixels"], workspace / "model" / made["pixels"].name))


@pytest.fixture
def of_latents(made: dict[str, Path], workspace: Path) -> Path:
    return Path(shutil.copytree(made["latents"], workspace / "model" / made["latents"].name))


def drawn(path: Path, count: int, *, first: int = 0, guidance: float = 1.5, clip: bool) -> torch.Tensor:
    """Return what the reverse process gives of consecutive images, classes in turn."""
    network: Any = load_model(open_artifact(path)).eval()
    shape = (network.config.channels, network.config.image_size, network.config.image_size)
    labels = [index % 10 for index in range(first, first + count)]
    return sampling.sample_images(
        network, shape, labels, null_label=10, scheduler="ddim", sampling_steps=2, guidance=guidance, seed=0,
        first=first, clip=clip,
    )  # fmt: skip


def test_a_bank_of_pixels_holds_what_the_model_makes(model: Path) -> None:
    ran = run_cli("bank", model, *SHARDS)
    bank = whole(ran.path)
    assert bank.kind == "bank" and bank.name.endswith(bank.manifest.recipe[:8]) and "-n44-" in bank.name
    assert [(parent.role, parent.digest) for parent in bank.manifest.parents] == [
        ("model", open_artifact(model).manifest.digest)
    ]
    shards = [load_tensors(bank.file(f"images-0000{number}.safetensors")) for number in range(3)]
    images, labels = (torch.cat([shard[name] for shard in shards]) for name in ("images", "labels"))
    assert [len(shard["images"]) for shard in shards] == [16, 16, 12] and images.dtype == torch.uint8
    assert torch.equal(images[16:24], to_uint8(drawn(model, 8, first=16, clip=True)))
    assert not torch.equal(images[16:24], to_uint8(drawn(model, 8, first=16, guidance=1.0, clip=True)))
    assert labels.tolist() == [index % 10 for index in range(44)]
    assert bank.manifest.metrics["labels"] == [5, 5, 5, 5, 4, 4, 4, 4, 4, 4] and bank.manifest.metrics["images"] == 44
    with Image.open(bank.file("plots/grid.png")) as grid:
        assert grid.size[0] > grid.size[1] > 100
    info = bank_info(bank)
    assert (info.count, info.space, info.shape, info.guidance, info.sampling_steps) == (44, "pixels", (1, 8, 8), 1.5, 2)
    assert [run_cli(name, bank.path).code for name in ("show", "verify")] == [0, 0]
    assert f"bank/{bank.name}" in run_cli("ls").out and run_cli("bank", model, *SHARDS).path == bank.path
    ready = open_bank(bank)
    assert torch.equal(ready.read(torch.arange(44)), images) and torch.equal(ready.labels, labels)


def test_a_bank_of_latents_is_what_the_sampler_gives_before_decoding(of_latents: Path) -> None:
    bank = whole(run_cli("bank", of_latents, *SHARDS).path)
    info = bank_info(bank)
    assert (info.space, info.shape, info.storage) == ("latents", (4, 4, 4), "float16") and not bank.has(
        "plots/grid.png"
    )
    images = open_bank(bank, 10)
    assert images.info.vae == open_artifact(of_latents).manifest.data["vae"]
    raw = images.read(torch.arange(44))
    wanted = torch.cat([drawn(of_latents, size, first=first, clip=False) for first, size in ((0, 8), (8, 8), (16, 8))])
    assert raw.dtype == torch.float16 and torch.equal(raw[:24], wanted.half())
    assert wanted.abs().max() > 1, "a clamp would show"
    assert torch.equal(images.transform(raw), raw.float()) and not images.sampled
    with pytest.raises(UsageError, match="mirrored"):
        images.read(torch.arange(2), torch.tensor([False, True]))


def test_every_label_is_the_null_class_and_several_threads_read(model: Path) -> None:
    images = open_bank(open_artifact(run_cli("bank", model, *SHARDS).path), null_label=10)
    assert len(images) == 44 and images.labels.tolist() == [10] * 44 and images.split == "train"
    every = images.images
    assert every.dtype == torch.float32 and every.min() >= -1 and every.max() <= 1 and len(every.unique()) > 10

    def read(seed: int) -> bool:
        chosen = torch.randint(0, 44, (32,), generator=torch.Generator().manual_seed(seed))
        return torch.equal(images.transform(images.read(chosen)), every[chosen])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(20)))
    mirrored = images.read(torch.tensor([3, 40]), torch.tensor([False, True]))
    plain = images.read(torch.tensor([3, 40]))
    assert torch.equal(mirrored[0], plain[0]) and torch.equal(mirrored[1], plain[1].flip(-1))


def test_a_small_bank_is_the_beginning_of_a_large_one(model: Path) -> None:
    large = open_bank(open_artifact(run_cli("bank", model, *SHARDS).path))
    small = open_bank(open_artifact(run_cli("bank", model, "--samples", 24, "--shard-size", 8, *QUICK).path))
    some = torch.arange(24)
    assert torch.equal(small.read(some), large.read(some)) and torch.equal(small.labels, large.labels[:24])
    other = open_bank(open_artifact(run_cli("bank", model, "--seed", 1, *SHARDS).path))
    assert not torch.equal(other.read(some), large.read(some))


@pytest.mark.parametrize("way", ["killed", "signal"])
def test_interrupted_work_goes_on_with_the_missing_shards(
    way: str, model: Path, fast_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = weights(run_cli("bank", model, *SHARDS, "--workspace", fast_disk / "unbroken").path)
    real, calls = sampling.sample_images, []

    def broken(*given: Any, **options: Any) -> Any:
        calls.append(options["first"])
        if len(calls) == 4:
            if way == "killed":
                raise MemoryError("of the test")
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **options)

    monkeypatch.setattr(sampling, "sample_images", broken)
    stopped = run_cli("bank", model, *SHARDS)
    assert stopped.code == (6 if way == "killed" else EXIT_SAVED) and stopped.out == ""
    resumed = run_cli("bank", model, *SHARDS)
    assert calls == [0, 8, 16, 24, 16, 24, 32, 40], "finished shards were made again, or others were not"
    assert weights(resumed.path) == unbroken


def test_what_is_stopped_before_a_shard_is_done_leaves_nothing(
    model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        options["after_step"]()

    monkeypatch.setattr(sampling, "sample_images", stopped)
    assert run_cli("bank", model, *SHARDS).code == EXIT_INTERRUPTED
    assert not [path for path in (workspace / "bank").iterdir() if path.is_dir()]


def test_a_damaged_shard_of_unfinished_work_is_made_again(model: Path) -> None:
    path = run_cli("bank", model, *SHARDS).path
    content = weights(path)
    partial = path.with_name(f".{path.name}.partial")
    recipe = open_artifact(path).manifest.recipe
    path.rename(partial)
    (partial / "manifest.yaml").unlink()
    (partial / "recipe").write_text(recipe)
    shard = partial / "images-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert weights(run_cli("bank", model, *SHARDS).path) == content


def test_two_processes_share_the_shards(model: Path, fast_disk: Path) -> None:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "finectl")
    done = subprocess.run(
        [*launcher, "bank", str(model), *map(str, SHARDS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert whole(path).manifest.execution["world_size"] == 2
    assert "images=28" in done.stderr, "the first process has two of the three shards"
    assert weights(path) == weights(run_cli("bank", model, *SHARDS, "--workspace", fast_disk / "alone").path)


def test_the_bank_of_another_model_is_refused_with_the_command_that_mends_it(model: Path, of_latents: Path) -> None:
    bank, one, other = (open_artifact(path) for path in (run_cli("bank", model, *SHARDS).path, model, of_latents))
    require_bank_of(bank, one)
    with pytest.raises(InputError) as refused:
        require_bank_of(bank, other)
    assert refused.value.fix == f"finectl bank {of_latents}"
    assert all(each.manifest.digest[:8] in refused.value.what for each in (one, other))
    with pytest.raises(InputError, match="of kind 'model'"):
        bank_info(one)


def test_a_corrupted_shard_is_found(model: Path) -> None:
    bank = open_artifact(run_cli("bank", model, *SHARDS).path)
    shard = bank.file("images-00001.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    changed = run_cli("verify", bank.path)
    assert changed.code == EXIT_INPUT and shard.name in changed.err and "finectl bank" in changed.err
    shard.write_bytes(content[:-8])
    assert run_cli("show", bank.path).code == EXIT_INPUT
    save_tensors(shard, {"images": torch.zeros(16, 1, 8, 4, dtype=torch.uint8), "labels": torch.zeros(16).long()})
    with pytest.raises(InputError, match="not the file of a bank"):
        open_bank(bank, 10)
    lacking = replace(bank, manifest=replace(bank.manifest, metrics={}))
    with pytest.raises(InputError, match="is no bank of images"):
        open_bank(lacking, 10)


def test_the_plan_is_printed_without_torch(model: Path, workspace: Path) -> None:
    script = (
        "import sys\nfrom finectl.cli.main import main\n"
        f"code = main(['bank', {str(model)!r}, '--dry-run', '--json'])\n"
        'sys.stderr.write(f\'HEAVY {[m for m in ("torch", "numpy", "PIL", "diffusers") if m in sys.modules]}\')'
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert "HEAVY []" in done.stderr
    plan = json.loads(done.stdout)
    assert (plan["images"], plan["network_calls"], plan["images_per_call"]) == (500, 25_000, 2)
    assert (plan["stored_as"], plan["disk_bytes"], plan["shards"]) == ("pixels 1x8x8", 500 * (64 + 8), 2)
    assert plan["config"]["guidance"] == 1.5 and not (workspace / "bank").exists()


def test_the_size_that_nobody_names(of_latents: Path) -> None:
    from finectl.models.io import read_config
    from finectl.stages.bank import usual_samples

    config = read_config(open_artifact(of_latents))
    sizes = {classes: usual_samples(replace(config, num_classes=classes), bundled=False) for classes in (0, 200, 9999)}
    assert sizes == {0: 5_000, 200: 10_000, 9999: 50_000} and usual_samples(config, bundled=True) == 500


def test_wrong_calls(model: Path, workspace: Path) -> None:
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--scheduler", "euler"), EXIT_USAGE, "euler"),
        (("--sampling-steps", 1001), EXIT_USAGE, "between 1 and 1000"),
        (("--samples", 0), EXIT_USAGE, "--samples"),
        (("--labels", "3,10"), EXIT_USAGE, "between 0 and 9"),
        (("--prompt", "a red square"), EXIT_USAGE, "not conditioned on text"),
    ]
    for options, code, message in cases:
        ran = run_cli("bank", model, *options)
        assert (ran.code, message in ran.err) == (code, True), (options, ran.err)
        assert ran.out == "" and not (workspace / "bank").exists()


def test_some_classes_alone(model: Path) -> None:
    bank = open_artifact(run_cli("bank", model, "--labels", "7,2", *SHARDS).path)
    assert bank.manifest.metrics["labels"] == [0, 0, 22, 0, 0, 0, 0, 22, 0, 0]
    assert open_bank(bank).labels[:4].tolist() == [7, 2, 7, 2] and bank_prompts(bank) is None


def test_a_bank_is_measured_as_samples_are(model: Path, of_latents: Path, made: dict[str, Path]) -> None:
    def row(*options: object) -> Any:
        return json.loads((run_cli("evaluate", *options).path / "metrics.json").read_text())[0]

    few = ("--samples", 72)
    sampled = run_cli("sample", model, *few, "--guidance", 1.5, *QUICK).path
    bank = run_cli("bank", model, *few, "--shard-size", 32, *QUICK).path
    one, other = row(sampled, "--metrics", "frechet,accuracy"), row(bank, "--metrics", "frechet,accuracy")
    for metric in ("frechet", "accuracy"):
        assert one[metric]["value"] == other[metric]["value"] and other[metric]["n"] == 72
    assert (other["steps"], other["parameters"]) == (10, one["parameters"]), "those of the model that made them"
    latents = run_cli("bank", of_latents, *few, *QUICK).path
    refused = run_cli("evaluate", latents)
    assert refused.code == EXIT_INPUT and "--vae PATH" in refused.err
    decoded = row(latents, "--vae", made["vae"], "--metrics", "frechet", "--samples", 70)
    assert decoded["frechet"]["n"] == 70 and decoded["frechet"]["protocol"]["image_size"] == 8


def called(**values: Any) -> Call:
    """Return a command that wants a bank and names none."""
    options = RunOptions(dry_run=values.pop("dry_run", False))
    return Call(STAGE, {}, (), options, Console(), {"bank_samples": None, "weights": "ema", **values}, frozenset())


def test_the_newest_bank_of_this_very_model_is_taken(model: Path, of_latents: Path, capsys: Any) -> None:
    ours = open_artifact(model)
    few = ("--shard-size", 16, *QUICK)
    first, second = (run_cli("bank", model, "--samples", n, *few).path for n in (20, 10))
    run_cli("bank", of_latents, "--samples", 20, *few)
    assert bank_for(called(), ours) == second
    assert "10 images" in capsys.readouterr().err
    assert bank_for(called(bank_samples=20), ours) == first
    (second / "images-00000.safetensors").unlink()
    assert bank_for(called(dry_run=True), ours) == first, "a damaged one is no reason to refuse the others"


def test_a_small_bank_is_made_where_there_is_none(model: Path, workspace: Path, capsys: Any) -> None:
    ours = open_artifact(model)
    assert bank_for(called(dry_run=True), ours) is None and not (workspace / "bank").exists()
    assert "500 images would be sampled first" in capsys.readouterr().err
    path = bank_for(called(bank_samples=12), ours)
    assert path is not None
    bank = whole(path)
    require_bank_of(bank, ours)
    assert "12 images are sampled first" in capsys.readouterr().err
    assert bank_info(bank).count == 12 and bank.manifest.command == ["finectl", "bank", str(model), "--samples", "12"]
    assert run_cli("bank", model, "--samples", 12).path == path, "the same options make the same bank"
    assert bank_for(called(bank_samples=12), ours) == path


@pytest.mark.slow
def test_all_processes_of_a_command_make_the_bank_that_it_wants(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from finectl.artifacts.store import open_artifact\n"
        "from finectl.cli.bank import bank_for\n"
        "from finectl.cli.command import Call\n"
        "from finectl.console import Console\n"
        "from finectl.runner import RunOptions\n"
        "from finectl.stages.bank import STAGE\n"
        "from finectl.world import World\n"
        "with World.from_environment() as world:\n"
        "    options = [RunOptions(world=world.part(name)) for name in ('first', 'second')]\n"
        "    calls = [Call(STAGE, {}, (), each, Console(), {'bank_samples': 8}, frozenset()) for each in options]\n"
        f"    model = open_artifact(Path({str(model)!r})) if world.leads else None\n"
        "    paths = [bank_for(call, model) for call in calls]\n"
        "    if world.leads:\n"
        "        print(*paths)\n"
    )
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*launcher, str(script)], capture_output=True, text=True, check=False, timeout=240, env=child_environment()
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second and whole(Path(first)).manifest.execution["world_size"] == 2


@pytest.fixture(scope="module")
def _text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = ("--workspace", tmp_path_factory.mktemp("text"))
    return run_cli("init", "--method", "he", "--model", "unet-text-nano", "--text-encoder", "hash", *place).path


@pytest.fixture
def text_model(_text: Path, workspace: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(_text, workspace / "model" / _text.name))


def test_a_model_of_text_makes_images_of_its_captions_or_of_prompts(text_model: Path, tmp_path: Path) -> None:
    few = ("--samples", 6, "--shard-size", 4, *QUICK)
    bank = whole(run_cli("bank", text_model, *few).path)
    texts = bank_prompts(bank)
    assert texts is not None and len(texts) == 6 and len(set(texts)) > 1 and bank_info(bank).has_prompts
    file = tmp_path / "prompts.txt"
    file.write_text("a red square\na blue square\n")
    named = whole(run_cli("bank", text_model, "--prompts", file, *few).path)
    assert bank_prompts(named) == ("a red square", "a blue square") * 3 and named.path != bank.path
    one, other = (open_bank(each, 99) for each in (bank, named))
    assert one.labels.tolist() == [99] * 6 and not torch.equal(one.images, other.images)
    refused = run_cli("bank", text_model, "--labels", "1", *few)
    assert refused.code == EXIT_USAGE and "conditioned on text" in refused.err
