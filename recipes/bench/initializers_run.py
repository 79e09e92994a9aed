"""Make and measure the models of initializers.sh: every method and variant of `finectl ls methods`, one table of rows.

Everything is made by finectl commands, in processes that import torch once and run one command after the other. What
is in the workspace already is not made again, so a run that was interrupted, or a further method, costs only the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.json"
PRESET, ANCESTOR_DEPTH = "dit-nano", 6
TARGET_DATA, TARGET_SIZE, SOURCE_DATA = "digits", 8, "photos"
DIRECT = "direct"
OF_SOURCE = "fine (sigma of photos)"
ANCESTOR, FINE, DECOMPOSED = "ancestor", "fine", "cp"
METRICS = ("loss", "frechet", "accuracy")


@dataclass(frozen=True)
class Settings:
    """What is made: depths of the targets, seeds, updates, and how they are measured."""

    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    budget: int
    tuning: int
    batch_size: int
    samples: int
    sampling_steps: int
    draws: int
    rate: float
    task: str
    source_size: int
    methods: tuple[str, ...]

    @property
    def updates(self) -> int:
        """Updates of every target in all, tuning counted."""
        return self.steps[-1]

    @property
    def source_data(self) -> tuple[str, ...]:
        """Options that name the data of the ancestor and of the condensed models."""
        if self.task == "same":
            return ("--data", TARGET_DATA)
        return ("--data", SOURCE_DATA, "--image-size", str(self.source_size))


@dataclass(frozen=True)
class Member:
    """One row of the table: a method, its variant, and what it starts from."""

    label: str
    method: str
    source: str
    options: tuple[str, ...] = ()
    tunes: bool = False


@dataclass(frozen=True)
class Task:
    """One target: it is made, trained and measured by one process."""

    settings: Settings
    seed: int
    depth: int
    member: Member
    source: str


def finectl(*arguments: object) -> Path:
    """Run one command in this process and return the artifact's path.

    Raises:
        RuntimeError: it failed; the message is what it wrote.
    """
    from finectl.cli.main import main

    argv = [*map(str, arguments), "--quiet"]
    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.StringIO("")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    finally:
        sys.stdin = stdin
    if code:
        raise RuntimeError(f"finectl {' '.join(argv)}: exit {code}\n{err.getvalue()}")
    return Path(out.getvalue().strip())


def manifest(path: Path | str) -> Any:
    from finectl.artifacts.store import open_artifact

    return open_artifact(Path(path)).manifest


def table() -> list[dict[str, Any]]:
    """Return the table of methods, as `finectl ls methods --json` prints it."""
    from finectl.cli.main import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(["ls", "methods", "--json"])
    return [json.loads(line) for line in out.getvalue().splitlines()]


def members(settings: Settings) -> list[Member]:
    """Return the rows: each variant of each method, from an ancestor and from a condensed model where it takes both."""
    found: list[Member] = []
    lines = table()
    names = {line["method"] for line in lines}
    for line in lines:
        if line["method"] == DIRECT:
            continue
        tunes = "tune_steps" in line["options"]
        for variant in line["variants"] or [None]:
            options = ("--variant", variant) if variant else ()
            for kind in sources_of(line):
                label = " ".join(filter(None, (line["method"], variant)))
                if kind not in (ANCESTOR, *sources_of(line)[:1]):
                    label += f" ({kind})"
                elif kind == ANCESTOR and len(sources_of(line)) > 1:
                    label += " (fitted)"
                found.append(Member(label, line["method"], kind, options, tunes))
    if "fine-cp" not in names:
        found += [Member("fine-cp", "fine", DECOMPOSED, (), True)]
    if settings.task == "transfer":
        found.append(Member(OF_SOURCE, "fine", FINE, (), True))
    found.append(Member(DIRECT, "he", ANCESTOR))
    wanted = set(settings.methods)
    unknown = wanted - {one.method for one in found} - {one.label for one in found}
    if unknown:
        raise SystemExit(f"METHODS: there is no {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    return [one for one in found if not wanted or one.label in wanted or (one.method in wanted and own_name(one))]


def own_name(member: Member) -> bool:
    """Tell whether a row goes by its method's name; others have to be asked for by theirs."""
    return member.label.split()[0] == member.method


def sources_of(line: Mapping[str, Any]) -> list[str]:
    """Return what a method is started from: the condensed model that it needs, the dense ancestor, or each of them."""
    condensed = line.get("condensed") or ""
    if line["method"] == "fine-cp":
        return [DECOMPOSED]
    found = [condensed] if condensed else []
    if "model" in line["sources"]:
        found.append(ANCESTOR)
    return found or [FINE]


def make_source(settings: Settings, seed: int, kind: str) -> str:
    """Make the ancestor, or a condensed model and what is extracted from it; every one has the same updates."""
    data, common = settings.source_data, ("--seed", seed)
    if kind == ANCESTOR:
        return str(dense(settings, seed, ANCESTOR_DEPTH, data))
    if kind == DECOMPOSED:  # what it costs beside its ancestor is no updates
        ancestor = make_source(settings, seed, ANCESTOR)
        condensed = finectl("condense", "--from", ancestor, *common)
    else:
        way = () if kind == FINE else ("--method", kind)
        budget = ("--steps", settings.budget, "--batch-size", settings.batch_size)
        condensed = finectl("condense", *way, "--model", PRESET, "--depth", ANCESTOR_DEPTH, *data, *budget, *common)
    return str(finectl("extract", condensed))


def dense(settings: Settings, seed: int, depth: int, data: Sequence[str]) -> Path:
    """Train a model from scratch for the whole budget; checkpoints on the way are what some methods look at.

    It is the ancestor, and what `init --method direct` does in one command, here at the ancestor's own rate.
    """
    start = finectl("init", "--method", "he", "--model", PRESET, "--depth", depth, *data, "--seed", seed)
    inner = {settings.budget * part // 5 for part in range(1, 5)} | set(settings.steps)
    kept = sorted(step for step in inner if 0 < step < settings.budget)
    keeps = ("--keep-at", ",".join(map(str, kept))) if kept else ()
    budget = ("--steps", settings.budget, "--batch-size", settings.batch_size, "--lr", settings.rate, *keeps)
    return finectl("train", start, *budget, "--seed", seed)


def make_target(task: Task) -> list[dict[str, Any]]:
    """Initialise, train and measure one target, and return a row for each number of updates."""
    settings, member = task.settings, task.member
    began = time.monotonic()
    if member.label == DIRECT:
        models = [dense(settings, task.seed, task.depth, ("--data", TARGET_DATA))]
        models.insert(0, Path(trace_start(models[0])))
    else:
        models, before = start(task)
        rest = settings.updates - before
        kept = [step - before for step in settings.steps if 0 < step - before < rest]
        keeps = ("--keep-at", ",".join(map(str, kept))) if kept else ()
        if rest > 0:
            common = ("--batch-size", settings.batch_size, "--eval-every", 0, "--seed", task.seed)
            models.append(finectl("train", models[-1], "--steps", rest, *keeps, *common))
    made = time.monotonic()
    evaluation = measure(settings, models)
    seconds = {"making_s": round(made - began, 1), "measuring_s": round(time.monotonic() - made, 1)}
    rows = manifest(evaluation).metrics["models"]
    carried = member.label == OF_SOURCE
    tuned = manifest(trace_start(models[1])).cost if carried and settings.tuning else {}
    first = manifest(trace_start(models[0]) if carried else models[0]).metrics
    moved = [{} if number == 0 else tuned for number in range(len(rows))]
    return [
        {
            "label": member.label,
            "method": member.method,
            "source": member.source,
            "seed": task.seed,
            "depth": task.depth,
            "updates": row["steps"] + moved[number].get("steps", 0),
            **measured(row),
            "transferred": first.get("parameters_transferred", 0),
            "transferred_with_embedders": first.get("parameters_transferred_with_embedders", 0),
            **cost(row, moved[number]),
            **seconds,
        }
        for number, row in enumerate(rows)
    ]


def start(task: Task) -> tuple[list[Path], int]:
    """Initialise a target.

    Returns:
        The models before training, the first of them without any updates of its own, and the updates of the last.
    """
    settings, member = task.settings, task.member
    common = ("--method", member.method, *member.options, "--depth", task.depth, "--seed", task.seed)
    if member.tunes:
        common = (*common, "--batch-size", settings.batch_size)
    if member.label == OF_SOURCE:
        return of_source(task, common)
    options = (task.source, *common, "--data", TARGET_DATA)
    if not member.tunes:
        made = finectl("init", *options)
        return [made], int(manifest(made).cost.get("steps", 0))
    untuned = finectl("init", *options, "--tune-steps", 0)
    if not settings.tuning:
        return [untuned], 0
    tuned = finectl("init", *options, "--tune-steps", settings.tuning)
    return [untuned, tuned], int(manifest(tuned).cost.get("steps", 0))


def of_source(task: Task, common: Sequence[object]) -> tuple[list[Path], int]:
    """Tune sigma on the source's data, then carry the blocks over to the target's, where nothing is tuned."""
    carried = []
    for steps in sorted({0, task.settings.tuning}):
        there = finectl("init", task.source, *common, "--tune-steps", steps)
        over = ("--method", "weight-selection", "--variant", "even", "--depth", task.depth, "--seed", task.seed)
        carried.append(finectl("init", there, *over, "--data", TARGET_DATA))
    return carried, task.settings.tuning


def measure(settings: Settings, models: Sequence[Path]) -> Path:
    """Measure models and the checkpoints that they keep; equal seeds give all targets the same noise."""
    how = ("--samples", settings.samples, "--sampling-steps", settings.sampling_steps, "--draws", settings.draws)
    # Tuning may leave so few updates that none on the way is measured.
    on_the_way = ("--steps-every", 1) if kept_of(models[-1]) else ()
    return finectl("evaluate", *models, *on_the_way, "--metrics", ",".join(METRICS), *how, "--allow-few")


def kept_of(model: Path) -> list[int]:
    """Return the updates whose weights a model keeps, beside the last."""
    from finectl.artifacts.store import open_artifact
    from finectl.models.io import checkpoints

    return checkpoints(open_artifact(model))


def trace_start(model: Path) -> Path:
    """Return the parent of a trained model."""
    from finectl.artifacts.store import Workspace, open_artifact

    artifact = open_artifact(model)
    record = artifact.manifest.parents[0]
    parent = Workspace(model.parent.parent).parent(artifact, record.path, record.digest)
    if parent is None:
        raise RuntimeError(f"{model}: its start is gone")
    return parent.path


def cost(row: Mapping[str, Any], moved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was spent once for all targets, and on this one, in updates and in floating-point operations.

    Args:
        row: Of `finectl evaluate`.
        moved: The cost that it counts among the first, and that is this target's.
    """
    shared = row["shared_cost"]
    return {
        "once_steps": shared["steps"] - moved.get("steps", 0),
        "once_flops": (shared["flops"] or 0) - (moved.get("flops") or 0),
        "each_steps": row["steps"] + moved.get("steps", 0),
        "each_flops": (row["flops"] or 0) + (moved.get("flops") or 0),
    }


def measured(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return value and interval of each metric, and all that has to be the same where two are compared."""
    values = {name: {key: row[name].get(key) for key in ("value", "interval")} for name in METRICS}
    return {**values, "protocol": {name: row[name]["protocol"] for name in METRICS}}


def in_turn(pool: ProcessPoolExecutor, work: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    """Run calls side by side, say when each is done, and return what came of each; what failed is left out."""
    began = time.monotonic()
    futures = {pool.submit(work, *call): call for call in calls}
    results = {}
    for number, future in enumerate(as_completed(futures), start=1):
        call, says = futures[future], "done"
        try:
            results[call] = future.result()
        except RuntimeError as error:
            says = f"FAILED: {error}"
        passed = f"{time.monotonic() - began:.0f} s"
        sys.stderr.write(f"{work.__name__} {number}/{len(futures)}, {passed}: {describe(call)}: {says}\n")
    return {call: results[call] for call in calls if call in results}


def describe(call: tuple[Any, ...]) -> str:
    last = call[-1]
    return f"seed {last.seed}, depth {last.depth}, {last.member.label}" if isinstance(last, Task) else f"{call[1:]}"


def run(settings: Settings, jobs: int, out: Path) -> None:
    """Make everything and write the rows."""
    rows = members(settings)
    kinds = sorted({row.source for row in rows if row.label != DIRECT} | {ANCESTOR})
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        calls = [(settings, seed, kind) for seed in settings.seeds for kind in kinds if kind != DECOMPOSED]
        later = [(settings, seed, kind) for seed in settings.seeds for kind in kinds if kind == DECOMPOSED]
        made = in_turn(pool, make_source, calls)
        made |= in_turn(pool, make_source, later)
        wanted = [(seed, depth, row) for seed in settings.seeds for depth in settings.depths for row in rows]
        tasks = [
            (Task(settings, seed, depth, row, made[settings, seed, row.source]),)
            for seed, depth, row in wanted
            if (settings, seed, row.source) in made
        ]
        found = in_turn(pool, make_target, tasks)
    records = [record for one in found.values() for record in one]
    size = parameters_of(made[settings, settings.seeds[0], ANCESTOR])
    content = {"settings": asdict(settings), "ancestor_parameters": size, "rows": records}
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if len(found) < len(wanted):
        sys.stderr.write(f"{len(wanted) - len(found)} of {len(wanted)} targets are missing: see above\n")


def parameters_of(model: str) -> int:
    """Return the number of a model's parameters."""
    from finectl.artifacts.store import open_artifact
    from finectl.models.io import read_config, total_parameters

    return total_parameters(read_config(open_artifact(Path(model))))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(",", " ").split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--depths", type=numbers, default=(2, 4, 6, 8))
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2))
    parser.add_argument("--steps", type=numbers, default=(0, 30, 100, 300, 1000), help="updates that are measured")
    parser.add_argument("--updates", type=int, default=1000, help="the last of them")
    parser.add_argument("--budget", type=int, default=1500)
    parser.add_argument("--tuning", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--task", choices=("same", "transfer"), default="same")
    parser.add_argument("--source-size", type=int, default=8)
    parser.add_argument("--methods", default="", help="methods or rows, separated by commas")
    values = vars(parser.parse_args())
    jobs, out, updates = values.pop("jobs"), values.pop("out"), values.pop("updates")
    values["steps"] = (*sorted({step for step in values["steps"] if step < updates} | {0}), updates)
    values["methods"] = tuple(part.strip() for part in values["methods"].split(",") if part.strip())
    run(Settings(**values), jobs, out)


if __name__ == "__main__":
    main()
