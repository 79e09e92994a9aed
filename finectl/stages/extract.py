"""Extract: the learngene of a condensed model.

What layers share (of FINE, U and V of each type) is what every size of model can be built from. Beside it, in files of
their own, go the parts that have no depth (embedders, final layer) and the curves over depth of what each layer has of
its own (sigma and biases).

Reference: FINE, arXiv 2409.19289, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.errors import UsageError
from finectl.models.io import load_weights, read_dit_config
from finectl.models.learngene import SIGMA_RULE, save_learngene, sigma_rule, split_state, storage

BYTES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Config:
    """The options of `finectl extract`."""

    weights: str
    depths: str


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Read the condensed model's architecture and count what will be kept.

    Raises:
        UsageError: the list of depths is not one of positive integers.
    """
    model = read_dit_config(parents[0])
    depths = parse_depths(config.depths)
    return Plan(
        replace(config, depths=",".join(map(str, depths))),
        slug=parents[0].name.rsplit("-", 1)[0],
        data=InheritedData.of(parents[0]),
        summary={"parameters_kept": storage(model, depths)["kept"]},
    )


def parse_depths(text: str) -> list[int]:
    """Return the depths of a comma-separated list.

    Raises:
        UsageError: it is not a list of positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--depths {text!r} is no list of depths", expected="positive integers such as 4,6,8")
    return [int(part) for part in parts]


def run(job: Job[Config]) -> Outcome:
    """Split the state, write the parts and print what is kept."""
    ancestor = job.parents[0]
    config = read_dit_config(ancestor)
    learngene = split_state(load_weights(ancestor, job.config.weights), config)
    save_learngene(job.directory, learngene)
    depths = parse_depths(job.config.depths)
    counts = storage(config, depths)
    ratio = counts["dense"] / counts["kept"]
    _print(job, counts, depths, ratio)
    metrics: dict[str, Any] = {
        "parameters_learngene": counts["learngene"],
        "parameters_rest": counts["rest"],
        "parameters_curves": counts["curves"],
        "bytes": BYTES_PER_PARAMETER * counts["kept"],
        "depths": depths,
        SIGMA_RULE: sigma_rule(ancestor.manifest),
        "parameters_dense": counts["dense"],
        "storage_ratio": round(ratio, 3),
    }
    return Outcome(metrics=metrics)


def _print(job: Job[Config], counts: dict[str, int], depths: list[int], ratio: float) -> None:
    """Show what is kept and what it stands for."""
    rows = [
        ("learngene: what layers share", counts["learngene"]),
        ("rest: embedders and final layer", counts["rest"]),
        ("curves: what each layer has of its own", counts["curves"]),
        ("kept in all", counts["kept"]),
        (f"dense models of depth {', '.join(map(str, depths))}", counts["dense"]),
    ]
    cells = [(name, f"{count:,}", f"{count * BYTES_PER_PARAMETER:,}") for name, count in rows]
    job.console.table("Learngene", ["part", "parameters", "bytes"], cells)
    job.console.line(f"Storage: {ratio:.1f} times less than the {len(depths)} dense models.")


STAGE = Stage(
    name="extract",
    version=1,
    makes="learngene",
    config=Config,
    reads=lambda config: Reads("condensed", ("condensed",)),
    plan=plan,
    run=run,
)
