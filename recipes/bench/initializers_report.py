"""Tables and plots of initializers.sh, from the results.json that initializers_run.py writes."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from initializers_plots import plot_all
from initializers_results import DIRECT, FINE, METRICS, MODELS, SMALL_SHARE, Results, costed, costs

from finectl.console import format_table, marked
from finectl.metrics.plots import available
from finectl.metrics.units import si_text

# 97.5 % quantile of Student's t, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
MISSING = "-"
TRANSFERS = {
    "same": "ancestor, condensed models and targets on the same data",
    "transfer": "ancestor and condensed models on photos, targets on digits",
}


def spread(values: Sequence[float], digits: int, factor: float = 1.0) -> str:
    """Return mean and standard deviation as text."""
    if not values:
        return MISSING
    text = f"{factor * statistics.fmean(values):.{digits}f}"
    return f"{text} ± {factor * statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(columns: Sequence[str], cells: Sequence[Sequence[str]], best: frozenset[tuple[int, int]]) -> str:
    return format_table(list(columns), marked([list(row) for row in cells], best)) + "\n"


def best_cells(values: Sequence[Sequence[float | None]], higher: bool) -> frozenset[tuple[int, int]]:
    """Return (row, column) of the best number of each column; the first column of the table holds names."""
    found = set()
    for column in range(len(values[0]) if values else 0):
        known = [(row[column], index) for index, row in enumerate(values) if row[column] is not None]
        if len(known) > 1:
            found.add(((max if higher else min)(known)[1], column + 1))
    return frozenset(found)


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def metric_table(results: Results, depth: int, metric: str, digits: int, factor: float, higher: bool) -> str:
    """Return one metric of one depth at all numbers of updates, the best at the end first."""
    sign, last = (-1 if higher else 1), results.steps[-1]

    def order(label: str) -> float:
        value = mean(results.values(label, metric, depth=depth, updates=last))
        return math.inf if value is None else sign * value

    labels = sorted((label for label in results.labels if results.of(label, depth=depth)), key=order)
    found = [[results.values(label, metric, depth=depth, updates=step) for step in results.steps] for label in labels]
    cells = [
        [label, *(spread(values, digits, factor) for values in row)] for label, row in zip(labels, found, strict=True)
    ]
    best = best_cells([[mean(values) for values in row] for row in found], higher)
    budget = results.settings["budget"]
    direct = results.values(DIRECT, metric, depth=depth, updates=budget)
    if direct:
        blank = [MISSING] * (len(results.steps) - 1)
        cells.append([f"{DIRECT} ({budget:,} updates)", *blank, spread(direct, digits, factor)])
    return table(["after so many updates", *(f"{step:,}" for step in results.steps)], cells, best)


def ranks(results: Results, labels: Sequence[str], metric: str, step: int, higher: bool) -> dict[str, list[float]]:
    """Return the mean rank over depths of each label, one a seed; of those that were measured everywhere."""
    found: dict[str, list[float]] = {label: [] for label in labels}
    for seed in results.seeds:
        places: dict[str, list[int]] = {label: [] for label in labels}
        for depth in results.depths:
            scores = [
                (value, label)
                for label in labels
                for value in results.values(label, metric, seed=seed, depth=depth, updates=step)
            ]
            for value, label in scores:
                better = sum(other > value if higher else other < value for other, _ in scores)
                places[label].append(better + 1)
        for label, own in places.items():
            if len(own) == len(results.depths):
                found[label].append(statistics.fmean(own))
    return {label: own for label, own in found.items() if len(own) == len(results.seeds)}


def interval(values: Sequence[float]) -> float:
    """Return half of the 95 % interval of a mean; infinite for a single value."""
    if len(values) < 2:
        return math.inf
    return STUDENT.get(len(values) - 1, 1.96) * statistics.stdev(values) / math.sqrt(len(values))


def rank_table(results: Results, labels: Sequence[str], metric: str, higher: bool) -> str:
    """Return mean ranks over depths at all numbers of updates, the first at the end first."""
    found = [ranks(results, labels, metric, step, higher) for step in results.steps]
    ordered = sorted(labels, key=lambda label: mean(found[-1].get(label, [])) or math.inf)
    cells = [
        [label, f"{100 * results.share(label):.1f}", *(spread(one.get(label, []), 2) for one in found)]
        for label in ordered
    ]
    best = best_cells([[None, *(mean(one.get(label, [])) for one in found)] for label in ordered], higher=False)
    return table(["mean rank after updates", "% transferred", *(f"{step:,}" for step in results.steps)], cells, best)


def verdict(results: Results, labels: Sequence[str], metric: str, title: str, higher: bool) -> list[str]:
    """Say where the best of FINE's variants is among methods, at each number of updates."""
    lines = []
    for step in results.steps:
        found = ranks(results, labels, metric, step, higher)
        own = [label for label in found if label.startswith(FINE)]
        if not own or len(found) < 2:
            continue
        first = min(found, key=lambda label: statistics.fmean(found[label]))
        fine = min(own, key=lambda label: statistics.fmean(found[label]))
        ours, top = statistics.fmean(found[fine]), statistics.fmean(found[first])
        half = interval(found[first])
        if fine == first:
            says = f"{fine} is first of {len(found)}, with mean rank {ours:.2f}"
        else:
            within = "one seed gives no interval" if math.isinf(half) else f"± {half:.2f} at 95 %"
            place = "" if math.isinf(half) else (", within" if ours <= top + half else ", outside of") + " the interval"
            says = (
                f"{first} is first of {len(found)}, with mean rank {top:.2f} ({within}); {fine} has {ours:.2f}{place}"
            )
        lines.append(f"- {title} after {step:,} updates: {says}.")
    return lines


def cost_table(results: Results, unit: str, write: Callable[[float], str]) -> str:
    """Return the total cost of n models: what is spent once, and n times tuning and training; equal lines are one."""
    lines: dict[tuple[float, float], list[str]] = {}
    for label in costed(results):
        lines.setdefault(costs(results, label, unit), []).append(label)
    direct = costs(results, DIRECT, unit)[1] if results.of(DIRECT) else None
    cells = []
    for (once, each), labels in sorted(lines.items(), key=lambda line: line[0][0] + MODELS[-1] * line[0][1]):
        row = [", ".join(labels), write(once), write(each)]
        for count in MODELS:
            total = once + count * each
            ratio = f" ({count * direct / total:.2f}x)" if direct and total and labels != [DIRECT] else ""
            row.append(write(total) + ratio)
        cells.append(row)
    return table(["method", "once", "each", *(f"n = {count}" for count in MODELS)], cells, frozenset())


def parameter_table(results: Results) -> str:
    """Return what each method takes from its source."""
    cells = []
    for label in sorted(results.labels, key=results.share):
        rows = results.of(label)
        blocks = statistics.fmean(row["transferred"] for row in rows)
        whole = statistics.fmean(row["transferred_with_embedders"] for row in rows)
        cells.append([label, rows[0]["source"], f"{blocks:,.0f}", f"{whole:,.0f}", f"{100 * results.share(label):.1f}"])
    titles = ["method", "made from", "parameters", "with embedders and final layer", "% of the ancestor, at most"]
    return table(titles, cells, frozenset())


def report(results: Results) -> str:
    """Return all tables as Markdown."""
    settings, small = results.settings, [label for label in results.labels if results.is_small(label)]
    seeds = len(results.seeds)
    parts = [
        f"# Initialisation methods: {TRANSFERS[settings['task']]}\n",
        f"Depths {', '.join(map(str, results.depths))}; {seeds} {'seed' if seeds == 1 else 'seeds'}; ancestor, "
        f"condensed models and direct training {settings['budget']:,} updates each; targets {results.steps[-1]:,} "
        f"updates in all, of which methods that tune spend {settings['tuning']:,} on it. {settings['samples']:,} "
        f"samples of {settings['sampling_steps']} DDIM steps. Mean ± standard deviation over seeds; bold: the best "
        f"mean of its column, whatever the spread. {MISSING}: not measured, within the tuning or without one.\n",
        f"## Parameters transferred\n\nMean over depths; the ancestor has {results.ancestor_parameters:,}.\n",
        parameter_table(results),
    ]
    for metric, title, digits, factor, higher in METRICS:
        parts.append(f"## {title[0].upper()}{title[1:]}\n")
        for depth in results.depths:
            parts.append(f"Depth {depth}\n\n{metric_table(results, depth, metric, digits, factor, higher)}")
    parts.append(f"## Mean rank over depths\n\nAmong methods that transfer at most {SMALL_SHARE:.0%}:\n")
    for metric, title, _, _, higher in METRICS:
        parts.append(f"By {title}:\n\n{rank_table(results, small, metric, higher)}")
        parts.append("\n".join([*verdict(results, small, metric, title, higher), ""]))
    parts.append("Among all methods:\n")
    for metric, title, _, _, higher in METRICS:
        parts.append(f"By {title}:\n\n{rank_table(results, results.labels, metric, higher)}")
    parts.append(
        "## Total cost of n models\n\nWhat is spent once, and n times tuning and training, mean over depths; in "
        "brackets how many times as much direct training costs. Updates:\n"
    )
    parts.append(cost_table(results, "steps", lambda value: f"{value:,.0f}"))
    parts.append("Floating-point operations of training:\n")
    parts.append(cost_table(results, "flops", lambda value: si_text(value, "FLOP")))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tables.md").write_text(report(results), encoding="utf-8")
    if available():
        plot_all(results, arguments.out)
    print(arguments.out / "tables.md")


if __name__ == "__main__":
    main()
