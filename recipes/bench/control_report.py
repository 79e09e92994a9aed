"""Keep what control.sh measured, and print it over the seeds: when ControlNets suddenly obey, and how well at the end.

finectl finetune --control edge --validate-every N --json | python control_report.py keep RESULTS SEED ROW
python control_report.py show RESULTS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deme_report import mean
from seed_tables import keep_row, read_seeds
from timing import say

MEASURES = (("ssim", "1 - SSIM"), ("mse", "squared error"))


def show(results: Path) -> None:
    """Print one table: the update of sudden convergence and its share of plain training's, by each measure."""
    seeds = read_seeds(results)
    plain = next(iter(seeds[0]))
    heads = [
        head
        for _, title in MEASURES
        for head in (f"{title}, before any update", "at the end", "suddenly at update", "% of plain's")
    ]
    say(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    say()
    say(f"| | {' | '.join(heads)} |")
    say("|---|" + "--:|" * len(heads))
    for row in seeds[0]:
        cells: list[str] = []
        for measure, _ in MEASURES:
            found = [seed[row][measure] for seed in seeds]
            steps, others = _steps(seeds, row, measure), _steps(seeds, plain, measure)
            cells += [mean([one["first"] for one in found], 3), mean([one["last"] for one in found], 3)]
            both = [(mine, other) for mine, other in zip(steps, others, strict=True) if mine and other]
            cells.append(", ".join(str(step or "-") for step in steps))
            cells.append(mean([100 * mine / other for mine, other in both], 0) if both else "-")
        say(f"| {row} | {' | '.join(cells)} |")


def _steps(seeds: Sequence[dict[str, Any]], row: str, measure: str) -> list[int | None]:
    """Return the update of sudden convergence by each seed; None where there was none."""
    return [(seed[row][measure]["sudden_convergence"] or {}).get("step") for seed in seeds]


if __name__ == "__main__":
    what, results, *rest = sys.argv[1:]
    if what == "keep":
        made = json.loads(sys.stdin.read().splitlines()[-1])
        keep_row(Path(results), *rest, made["metrics"]["validation"]["measures"])
    else:
        show(Path(results))
