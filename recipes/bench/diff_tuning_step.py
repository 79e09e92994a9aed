"""Time a step of Diff-Tuning beside one of plain fine-tuning, and weigh full fine-tuning against few parameters.

All contestants train the same model with the same batch size, by the very code of `finectl finetune`: data are read
from files by threads, a step is forward, backward, optimiser and moving average. Diff-Tuning fills a fifth of the batch
from a bank of latents (arXiv 2406.00773), so a step should cost what a plain one does; with `--retention kd` a teacher
is computed beside it, for the retained images alone. LoRA trains a hundredth of the parameters: it saves gradients,
moments and averages, not activations.

Every contestant runs in a process of its own, and all take turns within one run, one step each, in an order that
changes from round to round. Times are medians over the rounds, ratios medians of the ratios within a round. Peak memory
is that of the process above what it held before it built anything, or on a GPU that of its allocator.

    python recipes/bench/diff_tuning_step.py [--models dit-s,dit-b] [--batch-size N] [--rounds N] [--json FILE]
        [--contestants 'plain,diff-tuning'] [--dtype float32|bfloat16] [--compile]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from timing import Step, Worker, paired_ratio, say, serve, take_turns

CHANNELS, PRETRAINED_CLASSES, TARGET_CLASSES = 4, 1000, 100
# Batch and latent side: a step of about a second on two cores, the paper's 256 pixels on a GPU.
SIZES = {"cpu": (16, 16), "cuda": (32, 32)}
IMAGES, SHARD = 2_000, 256
DIGEST = "0" * 64
# What takes memory of its own when it is imported, the same for all contestants.
PRELOADED = ("finectl", "finectl.training.run", "finectl.adapters.peft.tuning", "peft")


@dataclass(frozen=True)
class Contestant:
    """What is trained, and how.

    Args:
        retention: `bank`, `kd`, or `none` for plain fine-tuning.
        peft: `none` for all parameters, or a method of `--peft`.
    """

    retention: str
    peft: str = "none"


PLAIN = "plain"
CONTESTANTS = {
    PLAIN: Contestant("none"),
    "diff-tuning": Contestant("bank"),
    "diff-tuning kd": Contestant("kd"),
    "plain lora": Contestant("none", "lora"),
    "diff-tuning lora": Contestant("bank", "lora"),
}


def bank_of(folder: Path, side: int, seed: int) -> Any:
    """Write a bank of random latents and return it as an artifact, as `finectl bank` makes one of a model's samples."""
    import torch

    from finectl.artifacts.manifest import Manifest, ParentRecord
    from finectl.artifacts.staging import Staging
    from finectl.artifacts.store import Artifact
    from finectl.data.bank import KIND, LATENTS, ROLE, BankShards

    random = torch.Generator().manual_seed(seed)
    staging = Staging(folder, DIGEST)
    shards = BankShards(staging.path, IMAGES, SHARD)
    for first in shards.firsts:
        count = len(shards.span(first))
        images = torch.randn(count, CHANNELS, side, side, generator=random).half()
        shards.save(first, {"images": images, "labels": torch.arange(first, first + count) % TARGET_CLASSES})
    manifest = Manifest(
        kind=KIND,
        stage=KIND,
        created="",
        command=[],
        config={
            "shard_size": SHARD, "weights": "ema", "scheduler": "ddim", "sampling_steps": 50, "guidance": 1.5,
            "seed": 0,
        },
        execution={},
        recipe=DIGEST,
        parents=[ParentRecord(ROLE, "", DIGEST)],
        files=staging.records(),
        digest=DIGEST,
        data={},
        metrics={
            "images": IMAGES, "space": LATENTS, "channels": CHANNELS, "image_size": side,
            "labels": [0] * TARGET_CLASSES,
        },
    )  # fmt: skip
    path = staging.publish()
    staging.close()
    return Artifact(path, manifest)


def step_of(contestant: Contestant, options: argparse.Namespace, folder: Path) -> Step:
    """Return the step of a contestant, with the defaults of `finectl finetune` for data of one's own."""
    import torch

    from finectl.adapters.peft.table import PeftOptions
    from finectl.adapters.peft.tuning import tune
    from finectl.artifacts.job import Execution
    from finectl.data.bank import open_bank
    from finectl.models.dit import DiT, initialize_
    from finectl.models.presets import preset
    from finectl.training.batches import Retained
    from finectl.training.chain import SHARE, Chain, retained_of
    from finectl.training.retention import ChainLoss, ChainTimesteps
    from finectl.training.run import plain_loss, prepare, train_step, uniform_timesteps
    from finectl.training.settings import TrainSettings
    from finectl.world import World

    images, side = size(options)
    execution = Execution(device(), options.dtype, compile=options.compile)
    config = preset(options.models, image_size=side, channels=CHANNELS, num_classes=TARGET_CLASSES)
    random = torch.Generator().manual_seed(0)
    student = DiT(config)
    initialize_(student, random)
    tuning = tune(student, PeftOptions.parse(contestant.peft, ()), 0)
    data = open_bank(bank_of(folder / "target", side, 0))
    loss, timesteps, retained, first = plain_loss, uniform_timesteps, None, 0
    if contestant.retention != "none":
        first = retained_of(images, SHARE)
        chain = Chain(images, first)
        loss = ChainLoss(chain, teacher_of(options, side) if contestant.retention == "kd" else None)
        timesteps = ChainTimesteps(chain)
        retained = Retained(open_bank(bank_of(folder / "bank", side, 1), TARGET_CLASSES), first)
    settings = TrainSettings(
        steps=10**6,
        batch_size=images,
        lr=1e-4 * tuning.lr_scale,
        lr_schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        ema=0.9999,
        eval_every=0,
        seed=0,
    )
    run = prepare(
        SimpleNamespace(execution=execution, world=World()),  # type: ignore[arg-type]
        student,
        data,
        settings,
        groups=None,
        loss=loss,
        sharded=False,
        timesteps=timesteps,
        retained=retained,
    )
    labels = run.batches.get(0)[0].labels
    if (labels == TARGET_CLASSES).nonzero().flatten().tolist() != list(range(first)):
        raise SystemExit(f"the first {first} images of a batch should have no class, and its labels are {labels}")
    sys.stderr.write(
        f"{contestant}: {tuning.trainable:,} parameters are trained, {first} of {images} images retained\n"
    )
    steps = itertools.count()
    return lambda: float(train_step(run, next(steps)))


def teacher_of(options: argparse.Namespace, side: int) -> Any:
    """Return a frozen model with the classes that it was pre-trained in."""
    import torch

    from finectl.models.dit import DiT, initialize_
    from finectl.models.presets import preset

    teacher = DiT(preset(options.models, image_size=side, channels=CHANNELS, num_classes=PRETRAINED_CLASSES))
    initialize_(teacher, torch.Generator().manual_seed(0))
    if options.compile:
        teacher.compile()
    return teacher.to(device())


def device() -> str:
    """Return the device that all contestants run on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def size(options: argparse.Namespace) -> tuple[int, int]:
    """Return the batch size and the side of the latents."""
    images, side = SIZES[device()]
    return options.batch_size or images, side


def bench(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the contestants on one model, all in memory at once, and print their table."""
    wanted = [name.strip() for name in options.contestants.split(",") if name.strip()] or list(CONTESTANTS)
    if unknown := [name for name in wanted if name not in CONTESTANTS]:
        raise SystemExit(f"no contestants {', '.join(unknown)}; there are: {', '.join(CONTESTANTS)}")
    common = ["--models", model, "--dtype", options.dtype, "--batch-size", str(options.batch_size or 0)]
    common += ["--compile"] if options.compile else []
    workers = {name: Worker([sys.executable, __file__, "--worker", name, *common]) for name in wanted}
    take_turns(workers, options.rounds, options.warmup)
    images, side = size(options)
    say(f"\n{model}: batch {images}, {side}x{side}x{CHANNELS}, {device()}, {options.dtype}, {options.rounds} rounds")
    say(f"{'contestant':18} {'median ms':>10} {'images/s':>9} {'of plain':>9} {'peak MiB':>9} {'of plain':>9}")
    return [report(name, model, images, workers) for name in wanted]


def report(name: str, model: str, images: int, workers: dict[str, Worker]) -> dict[str, Any]:
    """Print one contestant's row: time, throughput and memory, each beside plain fine-tuning of all parameters."""
    worker, plain = workers[name], workers.get(PLAIN)
    median_s, peak = statistics.median(worker.times), peak_mib(worker)
    row = {
        "model": model,
        "contestant": name,
        "median_ms": median_s * 1e3,
        "time_of_plain": paired_ratio(worker.times, plain.times) if plain else None,
        "peak_mib": peak,
        "memory_of_plain": peak / peak_mib(plain) if plain else None,
    }
    ratios = [f"{row[key]:9.3f}" if row[key] is not None else " " * 9 for key in ("time_of_plain", "memory_of_plain")]
    say(f"{name:18} {median_s * 1e3:10.0f} {images / median_s:9.1f} {ratios[0]} {peak:9.0f} {ratios[1]}")
    return row


def peak_mib(worker: Worker) -> float:
    """Return what a contestant took at its peak: on a GPU there, else in its process above what it began with."""
    last = worker.last
    return last["device_mib"] if "device_mib" in last else last["peak_mib"] - last["idle_mib"]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="dit-b", help="presets, separated by commas (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=0, help="images of a batch (default: 16, on a GPU 32)")
    parser.add_argument("--contestants", default="", help=f"some of: {', '.join(CONTESTANTS)} (default: all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "tf32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="let torch.compile make the models' code")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the comparison, or one of its workers."""
    options = parse()
    if options.worker:
        for module in PRELOADED:
            importlib.import_module(module)
        with tempfile.TemporaryDirectory(prefix="finectl-bench-") as folder:
            serve(lambda: step_of(CONTESTANTS[options.worker], options, Path(folder)))
        return
    rows = [row for model in options.models.split(",") for row in bench(model, options)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
