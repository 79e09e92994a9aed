"""Run the models of fine_digits.sh and print the tables: every line is made by finectl commands, two at a time."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

DEPTHS = (2, 4, 6, 8)
ABLATION_DEPTHS = (4,)
COMPARED = 600  # updates of every model in the tables, tuning counted
LONG_SCRATCH = 3000
TUNING = 50
EVAL_EVERY = {"fine": 25, "he": 100}


@dataclass(frozen=True)
class Variant:
    """One line of the ablation: how the auxiliary model is made, and how targets start from it."""

    name: str
    condense: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    tuning: int = TUNING
    method: str = "fine"
    depths: tuple[int, ...] = field(default=ABLATION_DEPTHS)


Run = tuple[Variant, int, int, int]  # variant, depth, seed, updates

SCRATCH = Variant("he (usual initialisation)", method="he", tuning=0, depths=DEPTHS)
FINE = Variant("FINE: r = d, adaLN factorised, sigma interpolated and tuned", depths=DEPTHS)
ABLATIONS = (
    Variant("he, trained at the auxiliary model's rate (--lr 4e-3)", method="he", tuning=0, train=("--lr", "4e-3")),
    Variant("FINE, trained at that rate", train=("--lr", "4e-3")),
    Variant("sigma interpolated as read (--depth-scale 0), tuned", init=("--depth-scale", "0")),
    Variant("sigma interpolated, not tuned", init=("--sigma", "interpolated"), tuning=0),
    Variant("sigma identical in all layers, not tuned", init=("--sigma", "identical"), tuning=0),
    Variant("sigma random, not tuned", init=("--sigma", "random"), tuning=0),
    Variant("r = d/2", condense=("--rank", "32")),
    Variant("adaLN not factorised", condense=("--factorize", "qkv,o,in,out")),
)


def finectl(*arguments: str) -> Path:
    """Run one command and return the artifact's path."""
    done = subprocess.run(["finectl", *arguments, "--quiet"], check=True, stdout=subprocess.PIPE, text=True)
    return Path(done.stdout.strip())


def learngene(seed: int, options: Sequence[str]) -> Path:
    condensed = finectl("condense", "--data", "digits", "--seed", str(seed), "--eval-every", "150", *options)
    return finectl("extract", str(condensed))


def target(variant: Variant, depth: int, seed: int, updates: int) -> Path:
    """Make one trained model; `updates` counts the tuning."""
    options = ["--method", variant.method, "--depth", str(depth), "--seed", str(seed), *variant.init]
    if variant.method == "fine":
        options += ["--tune-steps", str(variant.tuning)]
    start = finectl("init", str(learngene(seed, variant.condense)), *options)
    steps = ["--steps", str(updates - variant.tuning), "--eval-every", str(EVAL_EVERY[variant.method])]
    return finectl("train", str(start), "--seed", str(seed), *steps, *variant.train)


def losses(model: Path, tuning: int) -> dict[int, float]:
    """Return held-out loss by updates, tuning counted."""
    entries = [json.loads(line) for line in (model / "log.jsonl").read_text().splitlines()]
    return {tuning + e["step"]: e["heldout_loss"] for e in entries if "heldout_loss" in e}


def first_at(curve: dict[int, float], bound: float) -> int | None:
    return next((step for step, loss in sorted(curve.items()) if loss <= bound), None)


def measured(models: Sequence[Path]) -> dict[str, float]:
    """Return the means over seeds of what `finectl evaluate` measures."""
    evaluation = finectl("evaluate", *map(str, models), "--samples", "500")
    rows = json.loads((evaluation / "metrics.json").read_text())
    means = {name: statistics.mean(row[name]["value"] for row in rows) for name in ("loss", "frechet", "accuracy")}
    return {**means, "transferred": rows[0]["transferred"], "parameters": rows[0]["parameters"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--long-seeds", type=int, nargs="+", default=[0, 1, 2], help="of the long runs from scratch")
    parser.add_argument("--ablation-seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    long = [(SCRATCH, d, s, LONG_SCRATCH) for d in DEPTHS for s in arguments.long_seeds]
    made: dict[Run, Path] = {}
    table: dict[tuple[Variant, int], dict[str, float]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for variants, seeds, more in (
            ((SCRATCH, FINE), arguments.seeds, long),
            (ABLATIONS, arguments.ablation_seeds, []),
        ):
            # Every learngene is there before its targets: two processes may not make one artifact at the same time.
            recipes = sorted({variant.condense for variant in variants})
            list(pool.map(lambda job: learngene(*job), [(s, recipe) for recipe in recipes for s in seeds]))
            runs = [(v, d, s, COMPARED) for v in variants for d in v.depths for s in seeds] + more
            made.update(zip(runs, pool.map(lambda run: target(*run), runs), strict=True))
            groups = [(v, d) for v in variants for d in v.depths]
            models = [[made[(*group, s, COMPARED)] for s in seeds] for group in groups]
            table.update(zip(groups, pool.map(measured, models), strict=True))
    report(arguments.seeds, arguments.ablation_seeds, made, table)


def report(
    seeds: Sequence[int],
    ablation_seeds: Sequence[int],
    made: dict[Run, Path],
    table: dict[tuple[Variant, int], dict[str, float]],
) -> None:
    """Print both tables."""
    out = sys.stdout
    out.write(f"After {COMPARED} updates, tuning counted; mean of seeds {seeds}, ablations {ablation_seeds}:\n\n")
    out.write("| initialisation | depth | parameters | transferred | held-out loss | Frechet | accuracy |\n")
    out.write("|---|--:|--:|--:|--:|--:|--:|\n")
    for (variant, depth), row in table.items():
        out.write(
            f"| {variant.name} | {depth} | {row['parameters']:,} | {row['transferred']:,} | {row['loss']:.4f} "
            f"| {row['frechet']:.2f} | {100 * row['accuracy']:.0f} % |\n"
        )
    long_seeds = sorted({run[2] for run in made if run[3] == LONG_SCRATCH})
    out.write("\nUpdates until FINE has the held-out loss of the usual initialisation, seed by seed:\n\n")
    header = [f"loss of he at {updates} | FINE is there at" for updates in (COMPARED, LONG_SCRATCH)]
    out.write(f"| depth | {' | '.join(header)} |\n|--:|--:|--:|--:|--:|\n")
    for depth in DEPTHS:
        cells = [str(depth)]
        for updates, some in ((COMPARED, seeds), (LONG_SCRATCH, long_seeds)):
            bounds = [losses(made[(SCRATCH, depth, seed, updates)], 0)[updates] for seed in some]
            curves = [losses(made[(FINE, depth, seed, COMPARED)], TUNING) for seed in some]
            steps = [first_at(curve, bound) for curve, bound in zip(curves, bounds, strict=True)]
            shown = ", ".join(f"over {COMPARED}" if step is None else str(step) for step in steps)
            cells += [f"{statistics.mean(bounds):.4f}", shown]
        out.write(f"| {' | '.join(cells)} |\n")


if __name__ == "__main__":
    main()
