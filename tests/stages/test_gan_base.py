"""`finectl gen-weights base`: end to end, killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_pairs import make_pairs
from support import child_environment, command_line, run_cli, weights, whole

from finectl.artifacts.store import open_artifact
from finectl.models.gan.io import load_discriminator, load_generator, read_gan

QUICK = ("--batch-size", 4, "--steps", 4)


def base(*more: object) -> tuple[object, ...]:
    return ("gen-weights", "base", *QUICK, *more)


def test_it_makes_a_gan_that_is_read_back(workspace: Path) -> None:
    pairs = make_pairs(workspace)
    path = run_cli(*base("--ema", 0.5)).path
    artifact = whole(path)
    gan = read_gan(artifact)
    assert artifact.kind == "gan" and (gan.preset, gan.generator.image_size) == ("nano", 16)
    assert gan.text is not None and gan.text["name"] == "hash"
    assert artifact.manifest.metrics["concepts"] == 2  # dark and bright: the base's
    assert [parent.digest for parent in artifact.manifest.parents] == [open_artifact(pairs).manifest.digest]
    raw, averaged = (load_generator(artifact, which) for which in ("raw", "ema"))
    assert not torch.equal(raw.head.conv.weight, averaged.head.conv.weight)
    assert torch.equal(raw.head.conv.weight, load_generator(artifact, "raw").head.conv.weight)
    load_discriminator(artifact)
    assert (path / "samples.png").stat().st_size > 100
    entries = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "heldout_l1" in entry] == [0, 1, 2, 3, 4]
    assert run_cli(*base("--ema", 0.5)).path == path


def test_pix2pix_has_no_text_and_one_concept(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finectl.models.gan import config

    make_pairs(workspace)
    monkeypatch.setitem(config.PRESETS, "pix2pix", config.Preset(4, 2, 0, 4, "", affine=False))
    refused = run_cli(*base("--preset", "pix2pix"))
    assert refused.code == 2 and "--concept dark" in refused.err
    path = run_cli(*base("--preset", "pix2pix", "--concept", "inverted")).path
    assert read_gan(whole(path)).text is None
    assert "pix2pix-inverted" in path.name


def test_what_it_refuses(workspace: Path) -> None:
    make_pairs(workspace, size=20)
    assert "cannot be halved" in run_cli(*base()).err
    make_pairs(workspace)
    for more, word in (
        (("--concept", "drak"), "did you mean 'dark'"),
        (("--preset", "pix2pix", "--concept", "dark", "--text-encoder", "hash"), "has no text"),
        (("--epochs", 2), "both given"),
        (("--text-encoder", "/nowhere"), "no text encoder"),
    ):
        refused = run_cli(*base(*more))
        assert refused.code in (2, 3) and word in refused.err, refused.err


def test_a_dry_run_counts_without_work(workspace: Path) -> None:
    make_pairs(workspace)
    ran = run_cli("gen-weights", "base", "--epochs", 3, "--batch-size", 4, "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert plan["config"]["steps"] == 12 and plan["training_pairs"] == 16
    assert plan["parameters"] == 111_344
    assert not list(workspace.glob("gan/*"))


def test_interrupted_and_killed_equal_unbroken(workspace: Path) -> None:
    pairs = make_pairs(workspace)
    command = ("gen-weights", "base", pairs, "--batch-size", 4, "--steps", 60, "--gan-from", 0.2, "--eval-every", 20)
    unbroken = run_cli(*command, "--out", workspace / "unbroken").path
    out = workspace / "parts"
    state = workspace / ".parts.partial" / "state" / "gan.safetensors"
    codes = []
    for number in (signal.SIGKILL, signal.SIGINT):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen(
            command_line(*command, "--out", out, "--save-every", 3),
            env=child_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        limit = time.monotonic() + 120
        while (not state.exists() or state.stat().st_mtime_ns == before) and time.monotonic() < limit:
            time.sleep(0.005)
        os.kill(process.pid, number)
        codes.append(process.wait(timeout=60))
    assert codes == [-signal.SIGKILL, 75]
    resumed = run_cli(*command, "--out", out).path
    assert weights(resumed) == weights(unbroken)
