"""Rows of a benchmark by seed: one JSON file a seed, name of the row -> what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def keep_row(results: Path, seed: str, row: str, measured: Any) -> None:
    """Write one row; the others of its seed stay."""
    target = results / f"{seed}.json"
    rows = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    results.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**rows, row: measured}, indent=1) + "\n", encoding="utf-8")


def read_seeds(results: Path) -> list[dict[str, Any]]:
    """Return the rows of every seed."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
