"""Keep what control.sh measured, and print it over the seeds: when ControlNets suddenly obey, and how well at the end.

finectl finetune --control edge --validate-every N --json | python control_report.py keep RESULTS SEED ROW
python control_report.py show RESULTS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deme_report import mean
from seed_tables import keep_row, read_seeds
from timing import say

from finectl.metrics.sudden_convergence import smoothed, sudden_convergence

MEASURES = (("ssim", "1 - SSIM"), ("mse", "squared error"))


def curves(model: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (update, dissimilarity) of a ControlNet's validation by each measure."""
    lines = [json.loads(line) for line in (model / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    keys = {measure: f"control_{measure}" for measure, _ in MEASURES}
    return {
        measure: [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        for measure, key in keys.items()
    }


def show(results: Path) -> None:
    """Print one table: by each measure how the curve begins and ends, and from which update on it is below a threshold.

    The threshold is the one of plain training's sudden convergence with the same seed.
    """
    seeds = read_seeds(results)
    plain = next(iter(seeds[0]))
    heads = [
        head
        for _, title in MEASURES
        for head in (f"{title}, before any update", "at the end", "below the threshold from update", "% of plain's")
    ]
    say(f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    say()
    say(f"| | {' | '.join(heads)} |")
    say("|---|" + "--:|" * len(heads))
    for row in seeds[0]:
        cells: list[str] = []
        for measure, _ in MEASURES:
            found = [seed[row][measure] for seed in seeds]
            reached = [_reached(seed[row][measure], seed[plain][measure]) for seed in seeds]
            first = [_reached(seed[plain][measure], seed[plain][measure]) for seed in seeds]
            shares = [100 * mine / other for mine, other in zip(reached, first, strict=True) if mine and other]
            cells += [mean([curve[place][1] for curve in found], 3) for place in (0, -1)]
            cells += [", ".join(str(step or "never") for step in reached), mean(shares, 0) if shares else ""]
        say(f"| {row} | {' | '.join(cells)} |")


def _reached(curve: Sequence[tuple[int, float]], plain: Sequence[tuple[int, float]]) -> int | None:
    """Return the update from which on a smoothed curve stays below the threshold of plain training's, if any."""
    convergence = sudden_convergence(plain)
    if convergence is None:
        return None
    above = [
        step
        for (step, _), value in zip(curve, smoothed([v for _, v in curve]), strict=True)
        if value >= convergence.threshold
    ]
    after = [step for step, _ in curve if not above or step > above[-1]]
    return after[0] if after else None


if __name__ == "__main__":
    what, results, *rest = sys.argv[1:]
    if what == "keep":
        keep_row(Path(results), *rest, curves(Path(json.loads(sys.stdin.read().splitlines()[-1])["path"])))
    else:
        show(Path(results))
