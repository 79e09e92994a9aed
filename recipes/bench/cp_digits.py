"""Run the models of cp_digits.sh and print the table: every line is made by finectl commands."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.console import Console
from finectl.models.io import load_weights, read_dit_config, save_model
from finectl.models.learngene import dense_config, evenly_spaced
from finectl.runner import RunOptions, run_stage

ANCESTOR_STEPS = 4000
COMPARED = 600  # updates of every target
DISTILLED = 500
WIDTH = 64

HE, EVEN, CP, FINE = "he", "even", "cp", "fine"


@dataclass(frozen=True)
class Variant:
    """One line of the table: how the targets start, and from what."""

    name: str
    kind: str
    condense: tuple[str, ...] = ()
    init: tuple[str, ...] = ()
    tuning: int = 0


def rank(share: float) -> tuple[str, ...]:
    return ("--rank", str(int(share * WIDTH)), *(("--overcomplete",) if share > 1 else ()))


PLAIN = ("--cp-weighting", "none")
DISTIL = ("--distill-steps", str(DISTILLED), "--lr-schedule", "cosine")
LONG_DISTIL = ("--distill-steps", "1500", "--lr-schedule", "cosine")
INTERPOLATED = ("--sigma", "interpolated")
VARIANTS = (
    Variant("he (usual initialisation)", HE),
    Variant("evenly spaced layers of the ancestor", EVEN),
    Variant("fit of the weights, r = d, sigma interpolated", CP, (*rank(1), *PLAIN), INTERPOLATED),
    Variant("fit of the weights, r = d", CP, (*rank(1), *PLAIN)),
    Variant("fit of the outputs, r = d, sigma interpolated", CP, rank(1), INTERPOLATED),
    Variant("fit of the outputs, r = d/2", CP, rank(0.5)),
    Variant("fit of the outputs, r = d", CP, rank(1)),
    Variant("fit of the outputs, r = 1.5 d", CP, rank(1.5)),
    Variant(f"fit of the outputs, r = d, {DISTILLED} updates of distillation", CP, (*rank(1), *DISTIL)),
    Variant(f"fit of the outputs, r = 1.5 d, {DISTILLED} updates of distillation", CP, (*rank(1.5), *DISTIL)),
    Variant("the same, 50 updates of tuning sigma, counted", CP, (*rank(1.5), *DISTIL), tuning=50),
    Variant("fit of the outputs, r = 1.5 d, 1,500 updates of distillation", CP, (*rank(1.5), *LONG_DISTIL)),
    Variant("FINE, 1,500 updates, r = d", FINE, ("--steps", "1500")),
    Variant("FINE, 4,000 updates, r = d", FINE, ("--steps", "4000")),
)


@dataclass(frozen=True)
class EvenConfig:
    """The options of the control."""

    depth: int


def plan_even(config: EvenConfig, parents: Sequence[Artifact]) -> Plan[EvenConfig]:
    return Plan(config, slug=f"dit-nano-even-l{config.depth}", data=InheritedData.of(parents[0]))


def run_even(job: Job[EvenConfig]) -> Outcome:
    """Copy evenly spaced layers, the embedders and the final layer."""
    ancestor, depth = job.parents[0], job.config.depth
    config, state = read_dit_config(ancestor), load_weights(ancestor, "ema")
    kept = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for index, layer in enumerate(evenly_spaced(config.depth, depth)):
        prefix = f"blocks.{layer}."
        kept.update({f"blocks.{index}.{n[len(prefix) :]}": v for n, v in state.items() if n.startswith(prefix)})
    save_model(job.directory, dense_config(config, depth), kept)
    return Outcome()


EVEN_STAGE = Stage("even", 1, "model", EvenConfig, lambda config: Reads("source", ("model",)), plan_even, run_even)


def finectl(*arguments: str) -> Path:
    """Run one command and return the artifact's path."""
    done = subprocess.run(
        [sys.executable, "-m", "finectl", *arguments, "--quiet"], check=True, stdout=subprocess.PIPE, text=True
    )
    return Path(done.stdout.strip())


def ancestor() -> Path:
    start = finectl("init", "--method", "he", "--model", "dit-nano", "--depth", "6", "--data", "digits")
    return finectl("train", str(start), "--steps", str(ANCESTOR_STEPS))


def condensed(variant: Variant, source: Path) -> Path:
    origin = ("--from", str(source)) if variant.kind == CP else ("--data", "digits")
    return finectl("condense", *origin, *variant.condense)


def even(source: Path, depth: int) -> Path:
    """Make the control or find it; only the main thread can make it."""
    made = run_stage(EVEN_STAGE, EvenConfig(depth), [str(source)], RunOptions(), Console(quiet=True)).artifact
    if made is None:
        raise RuntimeError("the control was not made")
    return made.path


def target(variant: Variant, source: Path, depth: int, seed: int) -> Path:
    """Make one trained model."""
    common = ["--depth", str(depth), "--seed", str(seed)]
    if variant.kind == HE:
        start = finectl("init", str(source), "--method", "he", *common)
    elif variant.kind == EVEN:
        start = even(source, depth)  # it is there already
    else:
        learngene = finectl("extract", str(condensed(variant, source)))
        start = finectl("init", str(learngene), *common, "--tune-steps", str(variant.tuning), *variant.init)
    return finectl(
        "train", str(start), "--seed", str(seed), "--steps", str(COMPARED - variant.tuning), "--eval-every", "50"
    )


def losses(model: Path, tuning: int = 0) -> dict[int, float]:
    """Return held-out loss by updates, tuning counted."""
    entries = [json.loads(line) for line in (model / "log.jsonl").read_text().splitlines()]
    return {tuning + e["step"]: e["heldout_loss"] for e in entries if "heldout_loss" in e}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[3])
    arguments = parser.parse_args()
    source = ancestor()
    for depth in arguments.depths:
        even(source, depth)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Every learngene is there before its targets: two processes may not make one artifact at the same time.
        recipes = {(v.kind, v.condense): v for v in VARIANTS if v.kind in (CP, FINE)}
        list(pool.map(lambda variant: condensed(variant, source), recipes.values()))
        runs = [(v, d, s) for d in arguments.depths for v in VARIANTS for s in arguments.seeds]
        models = dict(zip(runs, pool.map(lambda run: target(run[0], source, *run[1:]), runs), strict=True))
    report(arguments.depths, arguments.seeds, source, models)


def report(
    depths: Sequence[int], seeds: Sequence[int], source: Path, models: dict[tuple[Variant, int, int], Path]
) -> None:
    """Print the table."""
    out = sys.stdout
    out.write(f"Ancestor: {losses(source)[ANCESTOR_STEPS]:.4f} after {ANCESTOR_STEPS:,} updates. ")
    out.write(f"Held-out loss of the targets, mean of seeds {list(seeds)}:\n\n")
    steps = (0, 100, 300, COMPARED)
    out.write("| initialisation | depth | start | " + " | ".join(map(str, steps[1:])) + " |\n")
    out.write("|---|--:|" + "--:|" * len(steps) + "\n")
    for depth in depths:
        for variant in VARIANTS:
            curves = [losses(models[(variant, depth, seed)], variant.tuning) for seed in seeds]
            means = [statistics.mean(curve[max(step, variant.tuning)] for curve in curves) for step in steps]
            out.write(f"| {variant.name} | {depth} | {' | '.join(f'{mean:.4f}' for mean in means)} |\n")


if __name__ == "__main__":
    main()
