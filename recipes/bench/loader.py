"""Measure the loader of latents: images/s beside what a dit-s step consumes, and what memory a set of N images takes.

The latents are random numbers in the shards that `finectl encode` writes. Each set is measured in a process of its own:
the loader alone over all images once and more, then real training steps that read from it. Memory is what the kernel
says: RssAnon, which nothing but this process can free, and RssFile, pages of the mapped files that it can take back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timing import THREADS, say

BATCH, CHANNELS, CLASSES, SHARD = 16, 4, 1000, 4096
LEAST_READ = 20_000
TARGET = 5.0
UNIT = 2**20


@dataclass(frozen=True)
class Config:
    """The random latents of one artifact."""

    count: int
    side: int


def make(place: Path, count: int, side: int) -> None:
    """Make an artifact of `count` random latents."""
    import torch

    from finectl.artifacts.job import Job, Outcome, Plan, Stage
    from finectl.artifacts.store import Artifact
    from finectl.console import Console
    from finectl.data.latents import KIND, LatentIndex, write_shard
    from finectl.runner import RunOptions, run_stage

    index = LatentIndex(
        count=count,
        shard_size=SHARD,
        latent_channels=CHANNELS,
        latent_size=side,
        image_size=8 * side,
        storage="float16",
        flips=False,
        class_names=tuple(map(str, range(CLASSES))),
        vae={"digest": "0" * 64, "scaling_factor": 1.0, "shift_factor": 0.0, "downscale": 8},
        source={"fingerprint": "0" * 64},
    )

    def run(job: Job[Config]) -> Outcome:
        for shard in index.shards:
            labels = torch.arange(shard.first, shard.first + shard.count) % CLASSES
            write_shard(job.directory / shard.file, "float16", torch.randn(shard.count, *index.row), labels)
        index.write(job.directory)
        return Outcome()

    def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
        return Plan(config, slug="random")

    stage = Stage("encode", 1, KIND, Config, lambda config: None, plan, run)
    run_stage(stage, Config(count, side), [], RunOptions(out=place), Console(quiet=True))


def memory() -> dict[str, float]:
    """Return this process's resident memory in MiB, that of its own and that of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 / UNIT for name in ("RssAnon", "RssFile")}


def measure(path: Path, threads: int, steps: int) -> dict[str, Any]:
    """Return what one set costs; runs in a process of its own."""
    import torch

    from finectl.artifacts.job import Execution
    from finectl.data.dataset import load
    from finectl.models.presets import preset
    from finectl.training.batches import Batches
    from finectl.training.estimate import trial_run
    from finectl.training.run import train_step
    from finectl.world import World

    torch.set_num_threads(threads)
    images = load(f"latents:{path}", "train")
    with Batches(images, BATCH, 0, torch.device("cpu"), World()) as batches:
        reads = max(LEAST_READ, len(images)) // BATCH
        start_s = time.perf_counter()
        for step in range(reads):
            batches.get(step)
        loaded = BATCH * reads / (time.perf_counter() - start_s)
    after_reading = memory()
    config = preset("dit-s", image_size=images.info.image_size, channels=CHANNELS, num_classes=CLASSES)
    times = []
    run = trial_run(config, Execution("cpu", "float32"), BATCH)
    with Batches(images, BATCH, 0, torch.device("cpu"), World(), workers=Execution().workers) as batches:
        run = replace(run, batches=batches)
        for step in range(steps):
            start_s = time.perf_counter()
            train_step(run, step)
            times.append(time.perf_counter() - start_s)
    return {
        "loader_images_per_s": loaded,
        "step_images_per_s": BATCH / statistics.median(times),
        "reading": after_reading,
        "training": memory(),
    }


def main() -> int:
    """Measure and print; exit code 1 when the loader is slower than the target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", default="1000,10000,50000", help="Images of each set.")
    parser.add_argument("--side", type=int, default=32, help="Height and width of the latents; 32 is 256x256 pixels.")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--steps", type=int, default=6, help="Training steps on each set.")
    parser.add_argument("--json", type=Path, help="Write the figures there, too.")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        say(json.dumps(measure(options.measure, options.threads, options.steps)))
        return 0
    counts = [int(count) for count in options.counts.split(",")]
    results: dict[int, dict[str, Any]] = {}
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="finectl-loader-") as folder:
            make(Path(folder) / "latents", count, options.side)
            again = [sys.executable, __file__, "--measure", f"{folder}/latents", "--threads", str(options.threads)]
            done = subprocess.run(
                [*again, "--steps", str(options.steps)], stdout=subprocess.PIPE, text=True, check=True
            )
        results[count] = json.loads(done.stdout.splitlines()[-1])
    report(results, options.side, options.threads)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    ratios = [one["loader_images_per_s"] / one["step_images_per_s"] for one in results.values()]
    return 0 if min(ratios) >= TARGET else 1


def report(results: dict[int, dict[str, Any]], side: int, threads: int) -> None:
    """Print the table."""
    say(f"latents {CHANNELS}x{side}x{side} in float16, batch {BATCH}, {threads} threads; memory in MiB")
    say()
    say(
        "| images | loader, images/s | dit-s step, images/s | ratio | own, reading | own, training | mapped, training |"
    )
    say("|--:|--:|--:|--:|--:|--:|--:|")
    for count, one in results.items():
        ratio = one["loader_images_per_s"] / one["step_images_per_s"]
        say(
            f"| {count:,} | {one['loader_images_per_s']:,.0f} | {one['step_images_per_s']:.1f} | {ratio:,.0f} "
            f"| {one['reading']['RssAnon']:.0f} | {one['training']['RssAnon']:.0f} | {one['training']['RssFile']:.0f} |"
        )
    say()
    say(f"aim: a ratio of at least {TARGET:g}, and memory that does not grow with the number of images")


if __name__ == "__main__":
    sys.exit(main())
