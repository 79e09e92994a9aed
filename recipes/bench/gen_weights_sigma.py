"""Make and measure the models of gen_weights_sigma.sh, in one process that runs one finectl command after the other."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from finectl.artifacts.store import open_artifact
from finectl.cli.main import main
from finectl.data.concepts import Concept
from finectl.data.sources import describe
from finectl.data.tasks import class_tasks, data_of

DATA = "digits"
STARTS = ("interpolated, not tuned", "generated", "generated for another task", "tuned")


def finectl(*arguments: object) -> Path:
    """Run a command and return the path that it prints."""
    argv = [str(argument) for argument in arguments]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(sys, "argv", ["finectl", *argv]):
        code = main(argv)
    if code:
        raise SystemExit(code)
    return Path(out.getvalue().strip().splitlines()[-1])


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--learngene", help="one of digits; made where it is left out")
    parser.add_argument("--ancestor-steps", type=int, default=600)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--depths", default="2,4,6", help="that are collected")
    parser.add_argument("--new-depth", type=int, default=3, help="that is not")
    parser.add_argument("--tune-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--generator-steps", type=int, default=300)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--measured-tasks", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args(argv)


def start_of(
    name: str, learngene: Path, generator: Path, task: Concept, other: Concept, given: argparse.Namespace, depth: int
) -> Path:
    """Make a model of a task with one of `STARTS`."""
    common = ("init", learngene, "--depth", depth, "--data", data_of(task), "-q")
    if name == STARTS[0]:
        return finectl(*common, "--tune-steps", 0)
    if name == STARTS[3]:
        images = describe(data_of(task)).train_count
        tuning = ("--tune-steps", given.tune_steps, "--batch-size", given.batch_size, "--tune-samples", images)
        return finectl(*common, *tuning)
    return finectl(*common, "--sigma-from", generator, "--prompt", (task if name == STARTS[1] else other).prompt)


def losses(model: Path, given: argparse.Namespace) -> list[float]:
    """Train a model and return its held-out loss at 0, half and all updates."""
    half = max(1, given.updates // 2)
    steps = (
        "--steps",
        given.updates,
        "--batch-size",
        given.batch_size,
        "--eval-every",
        half,
        "--ema",
        0,
        "--warmup-steps",
        0,
    )
    log = finectl("train", model, *steps, "--lr", "3e-4", "-q") / "log.jsonl"
    found = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["heldout_loss"] for entry in found if "heldout_loss" in entry][:3]


def run() -> None:
    """Make everything and print the table."""
    given = options()
    learngene = (
        Path(given.learngene)
        if given.learngene
        else finectl(
            "extract",
            finectl("condense", "--model", "dit-nano", "--depth", 6, "--steps", given.ancestor_steps, "-q"),
            "-q",
        )
    )
    collection = finectl(
        *("gen-weights", "collect", learngene, "--target", "sigma", "--data", DATA, "--tasks", given.tasks),
        *("--depths", given.depths, "--steps", given.tune_steps, "--batch-size", given.batch_size),
        *("--workers", given.workers),
    )
    generator = finectl("gen-weights", "train", collection, "--steps", given.generator_steps)
    print("R^2 of the generator:", json.dumps(open_artifact(generator).manifest.metrics["r2"]))
    tasks = class_tasks(describe(DATA), given.tasks, 3, 0)
    held = [task for task in tasks if task.role == "test"][: given.measured_tasks]
    print(f"\nHeld-out tasks: {', '.join(task.prompt for task in held)}; collected depths {given.depths}.\n")
    half = max(1, given.updates // 2)
    print(f"| start | updates of sigma | depth | loss at 0 | at {half} | at {given.updates} |")
    print("|---|--:|--:|--:|--:|--:|")
    seen = int(given.depths.split(",")[-1])
    for depth in (seen, given.new_depth):
        shown = f"{depth}" if depth == seen else f"{depth} (new)"
        for name in STARTS:
            rows = []
            for place, task in enumerate(held):
                other = held[(place + 1) % len(held)] if len(held) > 1 else tasks[0]
                rows.append(losses(start_of(name, learngene, generator, task, other, given, depth), given))
            means = [sum(row[place] for row in rows) / len(rows) for place in range(len(rows[0]))]
            tuned = given.tune_steps if name == "tuned" else 0
            print(f"| {name} | {tuned} | {shown} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |", flush=True)


if __name__ == "__main__":
    run()
