"""theta_0, its experts, and models that were fine-tuned from it, for the tests of merging."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import run_cli

SHORT = ("--steps", 3, "--batch-size", 8, "--lr", 0.01, "--eval-every", 0)
CHEAP = ("--search-samples", 24, "--sampling-steps", 3, "--grid-step", 0.5)


@dataclass(frozen=True)
class Family:
    """theta_0 and the experts of two ranges, with projections, and two models that were fine-tuned from it plainly."""

    root: Path
    base: Path
    experts: Path
    models: tuple[Path, ...]

    @classmethod
    def made(cls, root: Path, *, models: int = 2) -> Family:
        """Make one in a workspace."""
        place = ("--workspace", root)
        start = run_cli("init", "--method", "he", "--model", "dit-nano", "--depth", 2, *place).path
        base = run_cli("train", start, *SHORT, *place).path
        experts = run_cli("finetune-ranges", base, "--ranges", 2, *SHORT, *place).path
        others = (run_cli("train", base, *SHORT, "--seed", seed, *place).path for seed in range(1, models + 1))
        return cls(root, base, experts, tuple(others))

    def copied(self, root: Path) -> Family:
        """Return a copy in another workspace, to be harmed at will."""
        shutil.copytree(self.root, root, symlinks=True)

        def moved(path: Path) -> Path:
            return root / path.relative_to(self.root)

        return Family(root, moved(self.base), moved(self.experts), tuple(map(moved, self.models)))

    def merge(self, *arguments: object) -> Any:
        return run_cli("merge", *arguments, "--workspace", self.root)
