"""Keep what evaluate measured for deme.sh under the names of its rows; print and draw tables over all seeds."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from timing import say

METRICS = (("loss", "held-out loss", 4, 1), ("frechet", "Fréchet distance", 3, 1), ("accuracy", "accuracy, %", 1, 100))
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # of the 95 % interval, by the number of seeds
RANGES = 4
MERGED = "merged"


def keep(evaluation: Path, target: Path, names: Sequence[str]) -> None:
    """Write the metrics of an evaluation, one row a name, and what the search of a merged model took."""
    rows = json.loads((evaluation / "metrics.json").read_text(encoding="utf-8"))
    parents = yaml.safe_load((evaluation / "manifest.yaml").read_text(encoding="utf-8"))["parents"]
    if len(rows) != len(names):
        raise SystemExit(f"{evaluation} has {len(rows)} rows, and there are {len(names)} names")
    for row, name, parent in zip(rows, names, parents, strict=False):  # the reference may be a parent, too
        path = parent["path"]
        if not Path(path).name.startswith(row["name"]):
            raise SystemExit(f"the row {row['name']} is in the place of {path}")
        found = yaml.safe_load((evaluation / path / "manifest.yaml").read_text(encoding="utf-8"))["metrics"]
        kept = ("weights", "value", "candidates_measured", "samples_measured", "controls")
        row |= {"row": name, "search": {key: found[key] for key in kept if key in found}}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read(results: Path) -> dict[str, list[list[dict[str, Any]]]]:
    """Return the rows of every seed, by part."""
    parts: dict[str, list[list[dict[str, Any]]]] = {}
    for path in sorted(results.glob("*-*.json")):
        parts.setdefault(path.stem.rsplit("-", 1)[0], []).append(json.loads(path.read_text(encoding="utf-8")))
    return parts


def show(results: Path) -> None:
    """Print one table a part."""
    for part, seeds in read(results).items():
        say(f"## {part}: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
        say()
        table(seeds)
        say()


def draw(results: Path, picture: Path) -> None:
    """Draw the last metric but accuracy of every row, one panel a part: each seed a dot, the mean a line."""
    import matplotlib.pyplot as plt

    parts = read(results)
    heights = [len(seeds[0]) for seeds in parts.values()]
    figure, axes = plt.subplots(
        len(parts), figsize=(7, 0.3 * sum(heights) + 0.9 * len(parts)), height_ratios=heights, layout="constrained"
    )
    for axis, (part, seeds) in zip(axes if len(parts) > 1 else [axes], parts.items(), strict=True):
        key, title, _, factor = compared_metric(seeds)
        far = 2 * statistics.median(row[key]["value"] * factor for row in seeds[0])
        for place, first in enumerate(seeds[0]):
            values = [row[key]["value"] * factor for seed in seeds for row in seed if row["row"] == first["row"]]
            if statistics.mean(values) > far:  # one row far away would press all others together
                axis.annotate(
                    f"{statistics.mean(values):.2f} →", (1, place), xycoords=("axes fraction", "data"), ha="right"
                )
                continue
            axis.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
            axis.plot([statistics.mean(values)] * 2, [place - 0.3, place + 0.3], color="tab:blue")
        axis.set_yticks(range(len(seeds[0])), [row["row"] for row in seeds[0]])
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(f"{part}: {title}, less is better; a dot a seed", fontsize=10, loc="left")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def compared_metric(seeds: Sequence[Sequence[dict[str, Any]]]) -> tuple[str, str, int, int]:
    """Return the metric by which rows are compared: the last one that is no accuracy."""
    return [metric for metric in METRICS if metric[0] in seeds[0][0] and metric[0] != "accuracy"][-1]


def table(seeds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print the rows of a part: means over the seeds, and differences from one row, paired by seed."""
    names = [row["row"] for row in seeds[0]]
    metrics = [metric for metric in METRICS if metric[0] in seeds[0][0]]
    first = MERGED if MERGED in names else names[0]
    compared = compared_metric(seeds)
    heads = [title for _, title, *_ in metrics]
    heads += [f"{compared[1]}, minus {first}", "loss by range", "weights", "candidates"]
    say(f"| row | {' | '.join(heads)} |")
    say("|---|" + "--:|" * len(heads))
    for name in names:
        rows = [next(row for row in seed if row["row"] == name) for seed in seeds]
        cells = [mean([row[key]["value"] * factor for row in rows], digits) for key, _, digits, factor in metrics]
        key, _, digits, factor = compared
        base = [next(row for row in seed if row["row"] == first)[key]["value"] for seed in seeds]
        away = [(row[key]["value"] - value) * factor for row, value in zip(rows, base, strict=True)]
        weights = "; ".join(",".join(f"{w:g}" for w in row["search"].get("weights", ())) for row in rows)
        measured = ", ".join(str(row["search"].get("candidates_measured", "")) for row in rows)
        by_range = ""
        if len(rows[0]["loss"].get("ranges", ())) == RANGES:
            columns = zip(*([part["loss"] for part in row["loss"]["ranges"]] for row in rows), strict=True)
            by_range = " ".join(f"{statistics.mean(column):.3g}" for column in columns)
        say(f"| {name} | {' | '.join(cells)} | {mean(away, digits)} | {by_range} | {weights} | {measured} |")


def mean(values: Sequence[float], digits: int) -> str:
    """Return the mean over seeds with half of its 95 % interval."""
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return text
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{text} ±{half:.{digits}f}"


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "keep":
        keep(Path(rest[0]), Path(rest[1]), rest[2:])
    elif what == "draw":
        draw(Path(rest[0]), Path(rest[1]))
    else:
        show(Path(rest[0]))
