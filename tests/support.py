"""What several test modules share: running finectl, a stage without torch, and comparisons."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from finectl.artifacts.files import write_atomic, write_json
from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.artifacts.kinds import KINDS
from finectl.artifacts.store import Artifact, Workspace, open_artifact, verify_artifacts
from finectl.cli.main import main
from finectl.console import Console
from finectl.runner import Result, RunOptions, run_stage

ROOT = Path(__file__).resolve().parent.parent
TINY_DATA = ("--steps", "3", "--batch-size", "8")


@dataclass(frozen=True)
class Ran:
    """What a run of finectl left: exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        """The artifact's path, when stdout is that one line and nothing else."""
        assert self.code == 0, self.err
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return Path(lines[0])


def run_cli(*arguments: object, stdin: str | None = "") -> Ran:
    """Run finectl in this process."""
    argv = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    source = None if stdin is None else io.StringIO(stdin)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", source),
        mock.patch.object(sys, "argv", ["finectl", *argv]),
    ):
        code = main(argv)
    return Ran(code, out.getvalue(), err.getvalue())


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment of a subprocess: one thread, no network, nothing of the user's finectl."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FINECTL_") or name in more}
    workspace = os.environ.get("FINECTL_WORKSPACE")
    own = {"FINECTL_WORKSPACE": workspace} if workspace else {}
    return {**kept, **own, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **more}


def command_line(*arguments: object) -> list[str]:
    """Return the command that runs finectl in a subprocess."""
    return [sys.executable, "-m", "finectl", *map(str, arguments)]


def finectl(*arguments: object, stdin: str = "", environment: Mapping[str, str] | None = None, **options: Any) -> Ran:
    """Run finectl as a subprocess to its end."""
    done = subprocess.run(
        command_line(*arguments),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=child_environment(**(environment or {})),
        **options,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def whole(path: Path) -> Artifact:
    """Open an artifact and hash all its files."""
    artifact = open_artifact(path)
    verify_artifacts([artifact])
    return artifact


def weights(path: Path) -> dict[str, bytes]:
    """Return the bytes of every safetensors file of an artifact, by its path in it."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*.safetensors"))}
    assert found, f"{path} holds no weights"
    return found


def tiny_safetensors(values: bytes = b"\0" * 8) -> bytes:
    """Return a safetensors file with one tensor of bytes, made without the library."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [len(values)], "data_offsets": [0, len(values)]}}).encode()
    return len(header).to_bytes(8, "little") + header + values


@dataclass(frozen=True)
class CountConfig:
    """Options of the stage below."""

    text: str = "a"
    steps: int = 3
    log: str = ""


def count_stage(during: Callable[[Job[CountConfig], int], None] | None = None, version: int = 1) -> Stage[CountConfig]:
    """Return a stage that counts to `steps`, saves its state after each, and writes two files: a run without torch.

    Args:
        during: Called within each step.
        version: The stage's version.
    """

    def run(job: Job[CountConfig]) -> Outcome:
        state = job.state / "count.json"
        step = json.loads(state.read_text())["step"] if state.exists() else 0
        while step < job.config.steps:
            if job.config.log:
                with Path(job.config.log).open("a") as log:
                    log.write(f"{step}\n")
            if during is not None:
                during(job, step)
            step += 1
            write_json(state, {"step": step})
            job.stop_if_requested(lambda: None)
        write_atomic(job.directory / "model.safetensors", tiny_safetensors(job.config.text.encode() * 8))
        (job.directory / "samples").mkdir(exist_ok=True)
        write_atomic(job.directory / "samples" / "text.txt", job.config.text.encode() * 100)
        return Outcome(metrics={"step": step}, cost={"steps": step})

    def plan(config: CountConfig, parents: Sequence[Artifact]) -> Plan[CountConfig]:
        return Plan(config, slug=f"count-{config.text}")

    return Stage("count", version, "samples", CountConfig, lambda config: None, plan, run)


def run_count(
    workspace: Path, text: str = "a", stage: Stage[CountConfig] | None = None, log: str = "", **options: Any
) -> Result:
    """Run the counting stage in a workspace."""
    config = CountConfig(text=text, log=log)
    return run_stage(
        stage or count_stage(), config, [], RunOptions(workspace=workspace, **options), Console(quiet=True)
    )


def published(workspace: Path) -> list[Path]:
    """Return every directory that looks like an artifact."""
    store = Workspace(workspace)
    return [path for kind in KINDS for path in store.paths(kind)]


def tiny_vae(folder: Path, *, channels: int = 1, seed: int = 0, **config: Any) -> Path:
    """Write an autoencoder of 4 latent channels that halves the sides of images, with random weights."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    blocks = 2
    options: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": (8, 16),
        "latent_channels": 4,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
        **config,
    }
    AutoencoderKL(**options).save_pretrained(folder)
    return folder


def tiny_clip(folder: Path, *, seed: int = 0, width: int = 16, words: str = "abcdefg") -> Path:
    """Write a CLIP text model and its tokenizer, as a diffusers pipeline holds them."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokens = [*words, *(f"{sign}</w>" for sign in words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(folder / "tokenizer" / name)
    config = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder
