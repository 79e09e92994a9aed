"""Keep what continual.sh measured, and print means over the seeds: after each data set, and at the end.

finectl finetune --then ... --json | python continual_report.py keep RESULTS SEED ROW
python continual_report.py show RESULTS
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deme_report import mean
from seed_tables import keep_row, read_seeds
from timing import say

METRICS = (("frechet", "Fréchet distance", 3, 1), ("accuracy", "accuracy, %", 1, 100), ("loss", "held-out loss", 4, 1))


def show(results: Path) -> None:
    """Print one table a metric: each set when it was learned, the earlier ones at the end, and means of both."""
    seeds = read_seeds(results)
    sets = [one["after"] for one in next(iter(seeds[0].values()))]
    say(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    for metric, title, digits, factor in METRICS:
        say()
        heads = (
            [f"{name}, learned" for name in sets] + ["mean"] + [f"{name}, at the end" for name in sets[:-1]] + ["mean"]
        )
        say(f"| {title} | {' | '.join(heads)} |")
        say("|---|" + "--:|" * len(heads))
        for row in seeds[0]:
            found = [_values(seed[row], metric, factor) for seed in seeds]
            cells = [mean([values[place] for values in found], digits) for place in range(len(heads))]
            say(f"| {row} | {' | '.join(cells)} |")


def _values(table: Sequence[dict[str, Any]], metric: str, factor: float) -> list[float]:
    """Return a metric on each set when it was learned, their mean, and on the earlier ones at the end, theirs."""
    learned = [factor * one["on"][one["after"]][metric]["value"] for one in table]
    left = [factor * table[-1]["on"][one["after"]][metric]["value"] for one in table[:-1]]
    return [*learned, statistics.fmean(learned), *left, statistics.fmean(left)]


if __name__ == "__main__":
    what, results, *rest = sys.argv[1:]
    if what == "keep":
        keep_row(Path(results), *rest, json.loads(sys.stdin.read().splitlines()[-1])["continual"])
    else:
        show(Path(results))
