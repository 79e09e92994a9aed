"""Keep what diff_tuning.sh measured under the names of its rows; print tables and draw curves over all seeds.

python diff_tuning_report.py keep RESULT ON_TARGET ON_SOURCE ON_THE_WAY FORGETTING... -- NAME...

ON_THE_WAY is an evaluation of the rows that kept weights of earlier updates, or - where none did.
python diff_tuning_report.py show RESULTS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from deme_report import mean, read
from timing import say

PLAIN = "full"
"""The row that others are compared with: the first that is called so, or ends with it, before them."""
FIRST = {"ablation": "neither"}
"""Parts in which that row has another name."""
MEASURED = ("frechet", "accuracy", "loss")
"""On the target; photographs have the loss alone."""
COLUMNS = (
    ("frechet", "Fréchet distance", 3, 1),
    ("accuracy", "accuracy, %", 1, 100),
    ("loss", "loss, target", 4, 1),
    ("source_loss", "loss, source", 4, 1),
    ("ewc", "EWC distance, 1e-4", 1, 1e4),
)


def keep(result: Path, evaluations: Sequence[Path], moved: Sequence[Path], names: Sequence[str]) -> None:
    """Write one row a name: metrics, what is compared on the way to them as `curve`, and the EWC distance."""
    on_target, on_source, on_the_way = evaluations
    digests = _models(on_target)
    target, source = ({row["digest"]: row for row in _json(path)} for path in (on_target, on_source))
    kept = [] if str(on_the_way) == "-" else _json(on_the_way)
    if not len(digests) == len(names) == len(moved):
        raise SystemExit(f"{on_target} is of {len(digests)} models, and there are {len(names)} names")
    rows = []
    for name, digest, path in zip(names, digests, moved, strict=True):
        rows.append(
            {
                "row": name,
                **{key: target[digest][key]["value"] for key in MEASURED if key in target[digest]},
                "curve": [row[compared(row)]["value"] for row in kept if row["digest"] == digest],
                "source_loss": source[digest]["loss"]["value"],
                "ewc": _json(path)["ewc"]["total"],
            }
        )
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def compared(row: Mapping[str, Any]) -> str:
    """Return the metric in which rows are compared with plain tuning."""
    return "frechet" if "frechet" in row else "loss"


def _models(evaluation: Path) -> list[str]:
    """Return the digests of the models that an evaluation is of, in their order."""
    manifest = yaml.safe_load((evaluation / "manifest.yaml").read_text(encoding="utf-8"))
    return [parent["digest"] for parent in manifest["parents"] if parent["role"] == "model"]


def _json(artifact: Path) -> Any:
    return json.loads((artifact / "metrics.json").read_text(encoding="utf-8"))


def show(results: Path) -> None:
    """Print one table a part."""
    for part, seeds in read(results).items():
        say(f"## {part}: {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
        say()
        table(part, seeds)
        say()


def table(part: str, seeds: Sequence[Sequence[dict[str, Any]]]) -> None:
    """Print the rows of a part: means over the seeds, and distances or losses as shares of plain tuning's, by seed."""
    curved = any(len(row["curve"]) > 1 for row in seeds[0])
    columns = [column for column in COLUMNS if column[0] in seeds[0][0]]
    of = compared(seeds[0][0])
    word, digits_of = ("distance", 3) if of == "frechet" else ("loss", 4)
    heads = [
        *(title for _, title, *_ in columns),
        f"{word}, % of plain",
        *([f"{word} on the way"] if curved else []),
    ]
    say(f"| {part} | {' | '.join(heads)} |")
    say("|---|" + "--:|" * len(heads))
    for place, first in enumerate(seeds[0]):
        rows = [seed[place] for seed in seeds]
        if {row["row"] for row in rows} != {first["row"]}:
            raise SystemExit(f"the seeds of {part} have other rows")
        cells = [mean([row[key] * factor for row in rows], digits) for key, _, digits, factor in columns]
        plain = [seed[plain_of(part, seed, place)][of] for seed in seeds]
        shares = [100 * row[of] / one for row, one in zip(rows, plain, strict=True)]
        cells.append(mean(shares, 0))
        if curved:
            way = zip(*(row["curve"][:-1] for row in rows), strict=True)
            cells.append(", ".join(f"{sum(values) / len(values):.{digits_of}f}" for values in way))
        say(f"| {first['row']} | {' | '.join(cells)} |")


def plain_of(part: str, rows: Sequence[dict[str, Any]], place: int) -> int:
    """Return the row that a row is compared with: the last one of plain tuning up to it, or the first of the part."""
    named = FIRST.get(part, PLAIN)
    found = [index for index in range(place + 1) if rows[index]["row"].endswith(named)]
    if part == "peft":
        return place - place % 2  # each method without Diff-Tuning, then with it
    return found[-1] if found else 0


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "keep":
        cut = rest.index("--")
        result, *paths = map(Path, rest[:cut])
        keep(result, paths[:3], paths[3:], rest[cut + 1 :])
    else:
        show(Path(rest[0]))
