"""A `pairs` artifact of tiny images, made in milliseconds and without photographs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finectl.artifacts.job import Job, Outcome, Plan, Stage
from finectl.console import Console
from finectl.data.concepts import FILE, Concept, write_concepts
from finectl.data.pairs import Source, target_file, write_images, write_sources
from finectl.runner import RunOptions, run_stage

CONCEPTS = (
    Concept("dark", "dark", ("gloomy",), ("dark",), base=True),
    Concept("bright", "bright", (), ("bright",), base=True),
    Concept("red", "red", ("crimson", "scarlet"), ("red",)),
    Concept("flat", "flat", (), ("flat",)),
    Concept("pale", "pale", (), ("pale",), role="val"),
    Concept("inverted", "inverted", (), ("inverted",), role="test"),
)


@dataclass(frozen=True)
class SmallConfig:
    """Side and number of the images."""

    size: int = 16
    count: int = 12


def edited(name: str, images: Any) -> Any:
    """Return what a concept makes of images uint8 (N, 3, H, W)."""
    edits = {
        "dark": lambda x: x // 2,
        "bright": lambda x: 128 + x // 2,
        "red": lambda x: x * x.new_tensor([1, 0, 0])[:, None, None],
        "flat": lambda x: 64 + x // 4,
        "pale": lambda x: 192 + x // 4,
        "inverted": lambda x: 255 - x,
    }
    return edits[name](images)


def _run(job: Job[SmallConfig]) -> Outcome:
    import torch

    size, count = job.config.size, job.config.count
    blocks = torch.randint(0, 256, (count, 3, 2, 2), generator=torch.Generator().manual_seed(0))
    images = blocks.repeat_interleave(size // 2, 2).repeat_interleave(size // 2, 3).to(torch.uint8)
    splits = ["train"] * (count - 4) + ["val"] * 2 + ["test"] * 2
    write_sources(job.directory, [Source(f"{n}.png", str(n), split) for n, split in enumerate(splits)], images)
    write_concepts(job.directory / FILE, CONCEPTS)
    for concept in CONCEPTS:
        write_images(target_file(job.directory, concept.name), edited(concept.name, images))
    return Outcome()


def make_pairs(workspace: Path, size: int = 16, count: int = 12) -> Path:
    """Make the artifact in a workspace and return its path."""
    stage = Stage(
        "gen-weights-pairs", 1, "pairs", SmallConfig, lambda config: None, lambda config, p: Plan(config, "small"), _run
    )
    result = run_stage(stage, SmallConfig(size, count), [], RunOptions(workspace=workspace), Console(quiet=True))
    assert result.artifact is not None
    return result.artifact.path
