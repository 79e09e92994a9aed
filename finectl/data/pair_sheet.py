"""The contact sheet of pairs: source images of every split, and what each concept made of them."""

from __future__ import annotations

from pathlib import Path

import torch

from finectl.data.images import make_rows
from finectl.data.pairs import SPLITS, Pairs

SHEET_CONCEPTS, SHEET_IMAGES = 40, 12


def draw_sheet(path: Path, pairs: Pairs) -> None:
    """Draw images of every split, and below them what each concept made of them."""
    every = [pairs.rows(split) for split in SPLITS]
    share = max(1, SHEET_IMAGES // len(every))
    rows = torch.cat([some[torch.linspace(0, len(some) - 1, min(share, len(some))).long()] for some in every])
    spread = max(1, -(-len(pairs.concepts) // SHEET_CONCEPTS))
    shown = pairs.concepts[::spread]
    pictures = [pairs.source_rows(rows), *(pairs.target_rows(concept, rows) for concept in shown)]
    make_rows(pictures, ["source", *(f"{concept.name} ({concept.role})" for concept in shown)]).save(path)
