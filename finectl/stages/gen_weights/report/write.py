"""What `report` writes and shows: tables, curves and strips of images."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finectl.artifacts.files import staged, write_atomic, write_json
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors
from finectl.data.concepts import Concept
from finectl.data.images import make_rows
from finectl.data.pairs import Pairs, open_pairs
from finectl.metrics.pairs.names import BETTER, LABELS
from finectl.metrics.plots import available, plot_bands
from finectl.metrics.report import Table
from finectl.metrics.starts import Starts, TunedRun
from finectl.stages.gen_weights.report.config import (
    BASELINE,
    PIX2PIX,
    PREDICTION,
    Config,
    Run,
    Sources,
    picture_file,
    pictured_places,
    seeds_of,
    starts_of,
)
from finectl.stages.gen_weights.report.tables import (
    ROLES,
    against_table,
    headline,
    plural,
    said_in_words,
    seconds_table,
    value_text,
    values_table,
)
from finectl.training.weights.names import STARTS

FILES = {"md": "table.md", "csv": "table.csv", "json": "table.json"}
RUNS, METRICS = "runs.csv", "metrics.json"
PLOTS, STRIPS = "plots", "samples"
MAIN = "l1"
SHOWN_STEPS = 3
GREY = 127
FEW = ("lora", "mean", "nearest", "ridge", "prediction", "oracle")
"""What the curves with bands show."""
SINGLE = 30  # more concepts than these are not listed one by one


def write_report(
    job: Job[Config], sources: Sources, runs: Sequence[TunedRun], metrics: Sequence[str]
) -> dict[str, Any]:
    """Write the comparison as tables and pictures, and show its main tables.

    Args:
        job: The run.
        sources: What is compared.
        runs: All runs.
        metrics: What was measured, the main one first.

    Returns:
        What the manifest says of it, by role.
    """
    said: dict[str, Any] = {}
    tables: list[tuple[str, Table]] = []
    for role in (role for role in ROLES if any(run.role == role for run in runs)):
        mine = [run for run in runs if run.role == role]
        starts = Starts.of([run for run in mine if run.start != PIX2PIX])
        scratch = Starts.of([run for run in mine if run.start == PIX2PIX])
        said[role] = {"left_out": list(starts.left_out)}
        if not starts.runs:
            job.console.note(f"all concepts of role {role} diverged with some start: there is nothing to compare")
            continue
        said[role] |= headline(starts, MAIN)
        made = tables_of(job.config, sources, role, starts, scratch, metrics)
        for title, table in made[:2]:
            job.console.table(title, table.columns, table.cells, table.best, table.notes)
        if PREDICTION in starts.starts:
            job.console.note(f"{role}: {said_in_words(starts, MAIN)}")
        tables += made
        draw_curves(job, role, starts, metrics)
    write_tables(job.directory, tables)
    write_atomic(job.directory / RUNS, runs_csv(runs, metrics).encode())
    write_json(job.directory / METRICS, said)
    draw_strips(job, sources)
    return said


def tables_of(
    config: Config, sources: Sources, role: str, starts: Starts, scratch: Starts, metrics: Sequence[str]
) -> list[tuple[str, Table]]:
    """Return the tables of the concepts of one role with their titles."""
    count, seeds = len(starts.concepts), len(starts.seeds)
    title = f"{plural(count, ROLES[role])}; {plural(seeds, 'seed')}"
    notes = (*notes_of(config, sources), *left_out_notes(starts))
    made = [(f"{title}: {LABELS[MAIN]}", replace(values_table(starts, MAIN), notes=notes))]
    if PREDICTION in starts.starts:
        made.append((f"The prediction against the others, {role}: {MAIN}", against_table(starts, MAIN)))
    made.append((f"Seconds, {role}", seconds_table(starts, scratch, MAIN)))
    made += [(f"{title}: {LABELS[name]}", values_table(starts, name)) for name in metrics if name != MAIN]
    if count <= SINGLE:
        made.append((f"Concept by concept, {role}: {MAIN}", single_table(starts)))
    return made


def notes_of(config: Config, sources: Sources) -> tuple[str, ...]:
    """Return what a reader has to know of the main table."""
    rows = config.subset or sources.images("train")
    adversary = "no discriminator" if config.gan_from >= 1 else "the base's discriminator"
    return (
        f"all runs: {min(rows, sources.images('train'))} training pairs, batch {config.batch_size}, lr {config.lr:g}, "
        f"L1 weight {config.l1:g}, {adversary}, the same order of data in each seed; "
        f"{sources.images('test')} test images of other photographs",
        "± is half of the 95 % interval over concepts and seeds; bold: the best mean of its column, oracle left aside",
        *(f"{name}: {STARTS[name]}" for name in starts_of(config)),
    )


def left_out_notes(starts: Starts) -> tuple[str, ...]:
    """Return a note for concepts that diverged from some start."""
    if not starts.left_out:
        return ()
    return (f"left out, because a run of theirs diverged: {', '.join(starts.left_out)}",)


def single_table(starts: Starts) -> Table:
    """Return the means over seeds of every concept: a row a concept, a column a start, values by updates."""
    steps, cells = starts.steps(MAIN), []
    raw_columns = ("concept", *(f"{start}_{step}" for start in starts.starts for step in steps))
    raw = []
    for place, concept in enumerate(starts.concepts):
        found = [[_mean(starts.grid(MAIN, start, step)[place]) for step in steps] for start in starts.starts]
        cells.append((concept, *("/".join(value_text(MAIN, value)[1:] for value in values) for values in found)))
        raw.append((concept, *(value for values in found for value in values)))
    columns = ("/".join(map(str, steps)), *starts.starts)
    rows = tuple(dict(zip(raw_columns, row, strict=True)) for row in raw)
    return Table(columns, tuple(cells), frozenset(), (), raw_columns, tuple(raw), rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_tables(directory: Path, tables: Sequence[tuple[str, Table]]) -> None:
    """Write the tables in the formats that people, spreadsheets and programs read."""
    content = [{"title": title, **table.content()} for title, table in tables]
    texts = {
        "md": "\n".join(f"## {title}\n\n{table.to_markdown()}" for title, table in tables),
        "csv": "\r\n".join(f"{title}\r\n{table.to_csv()}" for title, table in tables),
        "json": json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    }
    for kind, text in texts.items():
        write_atomic(directory / FILES[kind], text.encode())


def runs_csv(runs: Sequence[TunedRun], metrics: Sequence[str]) -> str:
    """Return every value of every run, without seconds: one row a run and number of updates."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(("concept", "role", "start", "seed", "updates", *metrics))
    for run in runs:
        for step in run.values[MAIN]:
            writer.writerow((run.concept, run.role, run.start, run.seed, step, *(run.values[n][step] for n in metrics)))
    return stream.getvalue()


def draw_curves(job: Job[Config], role: str, starts: Starts, metrics: Sequence[str]) -> None:
    """Draw each metric against updates: the starts that matter most with their bands, all of them, and differences.

    Concepts differ more from one another than starts do, so the bands of the differences, which are paired, say more.
    """
    if not available():
        job.console.note("no plots: matplotlib is not installed (pip install 'finectl[plots]')")
        return
    count = f"{plural(len(starts.concepts), f'concept of role {role}')}, {plural(len(starts.seeds), 'seed')}"
    few = [name for name in FEW if name in starts.starts]
    for metric in metrics:
        better, last = BETTER[metric], starts.steps(metric)[-1]
        label, folder = LABELS[metric], job.directory / PLOTS
        title = f"{count}; {better} is better"
        curves = {name: starts.curve(metric, name) for name in starts.starts}
        lines = {name: [(x, y, math.nan, math.nan) for x, y, *_ in points] for name, points in curves.items()}
        paired = {name: starts.difference_curve(metric, name, BASELINE) for name in few if name != BASELINE}
        for name, drawn, y in (
            ("", {name: curves[name] for name in few}, label),
            ("-all", lines, label),
            ("-paired", paired, f"difference to LoRA start: {metric}"),
        ):
            path = folder / f"{role}-{metric}{name}.png"
            plot_bands(
                path,
                drawn,
                x_label=f"updates of fine-tuning, of {last}",
                y_label=y,
                title=title,
                better=better,
                among=tuple(starts.starts),
            )


def draw_strips(job: Job[Config], sources: Sources) -> None:
    """Draw, for every concept, source and target, and what each start makes at first and after some updates."""
    pairs = open_pairs(sources.pairs)
    seed = seeds_of(job.config)[0]
    (job.directory / STRIPS).mkdir(exist_ok=True)
    for concept in sources.concepts if job.config.pictures else ():
        found = {}
        for start in (*starts_of(job.config), PIX2PIX):
            path = picture_file(job.state, Run(concept, start, seed))
            if path.exists():
                found[start] = load_tensors(path)
        if found:
            with staged(job.directory / STRIPS / f"{concept.name}.png") as temporary:
                strip(pairs, concept, found).save(temporary, format="png")


def strip(pairs: Pairs, concept: Concept, found: dict[str, dict[str, Tensor]]) -> Any:
    """Return one row a start; its columns are the same images at first and after some updates, in groups."""
    first = next(iter(found.values()))
    steps = sorted(first, key=int)[:SHOWN_STEPS]
    rows = pairs.rows("test")
    rows = rows[pictured_places(len(rows), len(first[steps[0]]))]
    gap = torch.full((1, *first[steps[0]].shape[1:]), GREY, dtype=torch.uint8)

    def in_groups(groups: Sequence[Tensor]) -> Tensor:
        return torch.cat([part for group in groups for part in (group, gap)][:-1])

    source, target = pairs.source_rows(rows), pairs.target_rows(concept, rows)
    pictures, names = [in_groups([source] * len(steps)), in_groups([target] * len(steps))], ["source", "target"]
    for start, made in found.items():
        shown = [made[step] if step in made else made[max(made, key=int)] for step in steps]
        pictures.append(in_groups(shown))
        names.append(start if set(steps) <= set(made) else f"{start}, {max(made, key=int)} updates")
    names[0] = f"source; after {', '.join(steps)} updates"
    return make_rows(pictures, names)
