"""The rows of initializers.sh, as initializers_run.py writes them, and what tables and plots ask them for."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DIRECT, FINE = "direct", "fine"
SMALL_SHARE = 0.25
MODELS = (1, 2, 3, 5, 9)
# Name in the rows, title, digits, factor, whether higher is better.
METRICS = (
    ("loss", "held-out loss", 4, 1.0, False),
    ("frechet", "Fréchet distance", 1, 1.0, False),
    ("accuracy", "accuracy, %", 1, 100.0, True),
)


@dataclass(frozen=True)
class Results:
    """The rows, and what they can be asked for."""

    settings: Mapping[str, Any]
    ancestor_parameters: int
    rows: tuple[Mapping[str, Any], ...]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read the rows.

        Raises:
            SystemExit: there are none, or they were not measured in the same way.
        """
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(content["rows"])
        if not rows:
            raise SystemExit(f"{path}: there are no rows")
        for name, *_ in METRICS:
            ways = {json.dumps(row["protocol"][name], sort_keys=True) for row in rows}
            if len(ways) > 1:
                raise SystemExit(f"{path}: {name} was measured in {len(ways)} ways, which do not compare")
        return cls(content["settings"], content["ancestor_parameters"], rows)

    @property
    def steps(self) -> list[int]:
        """Updates that are measured, tuning counted."""
        return list(self.settings["steps"])

    @property
    def depths(self) -> list[int]:
        return sorted({row["depth"] for row in self.rows})

    @property
    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    @property
    def labels(self) -> list[str]:
        """Methods with their variants in the order of the table, without the directly trained models."""
        return [label for label in dict.fromkeys(row["label"] for row in self.rows) if label != DIRECT]

    def of(self, label: str, **wanted: Any) -> list[Mapping[str, Any]]:
        """Return the rows of a label with these values."""
        return [row for row in self.rows if row["label"] == label and all(row[k] == v for k, v in wanted.items())]

    def values(self, label: str, metric: str, **wanted: Any) -> list[float]:
        """Return a metric of the rows of a label with these values, one a seed and depth."""
        return [row[metric]["value"] for row in self.of(label, **wanted)]

    def share(self, label: str, **wanted: Any) -> float:
        """Return the blocks' parameters that were taken over as a part of the ancestor's size, at most."""
        return max((row["transferred"] for row in self.of(label, **wanted)), default=0) / self.ancestor_parameters

    def is_small(self, label: str) -> bool:
        return self.share(label) <= SMALL_SHARE


def costs(results: Results, label: str, unit: str) -> tuple[float, float]:
    """Return what is spent once and on each target, mean over depths and seeds, in `steps` or `flops`."""
    last = results.settings["budget"] if label == DIRECT else results.steps[-1]
    rows = results.of(label, updates=last)
    return (
        statistics.fmean(row[f"once_{unit}"] for row in rows),
        statistics.fmean(row[f"each_{unit}"] for row in rows),
    )


def costed(results: Results) -> list[str]:
    """Return the labels whose last updates are there, the directly trained models first."""
    last = results.steps[-1]
    direct = [DIRECT] if results.of(DIRECT, updates=results.settings["budget"]) else []
    return direct + [label for label in results.labels if results.of(label, updates=last)]
