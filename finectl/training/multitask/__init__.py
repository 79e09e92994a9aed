"""Timestep clusters as tasks of their own: the table of ways to weigh their losses (no torch import).

The timesteps are cut into k uniform intervals, a batch holds equally many of each, and a method says what each
interval's loss counts.

Reference: Go et al., arXiv 2306.00354 (ANT).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finectl.errors import UsageError
from finectl.registry import Entry, Registry

if TYPE_CHECKING:
    from finectl.training.multitask.tasks import Tasks

DEFAULT_CLUSTERS = 4
BYTES = 4


@dataclass(frozen=True)
class Method(Entry):
    """One way to weigh the clusters' losses.

    Args:
        clip_grad: Largest norm of all gradients together that it is published with; 0 leaves them.
        gathers: Whether it keeps the gradients of all clusters at once.
    """

    clip_grad: float = 0.0
    gathers: bool = False


METHODS: Registry[Method] = Registry(
    "way to weigh timestep clusters",
    {
        "ant-uw": Method(
            "finectl.training.multitask.uncertainty:Uncertainty", "learned uncertainties weigh the clusters' losses"
        ),
        "ant-nash": Method(
            "finectl.training.multitask.nash:Nash",
            "the Nash bargaining solution of their gradients, every 25 updates",
            clip_grad=1.0,
            gathers=True,
        ),
        "pcgrad": Method(
            "finectl.training.multitask.pcgrad:ProjectedGradients",
            "gradients without their parts that oppose another cluster's",
            gathers=True,
        ),
    },
)


def make_tasks(name: str, clusters: int, seed: int) -> Tasks:
    """Return a way to weigh clusters, at its start.

    Args:
        name: Of `METHODS`.
        clusters: k, at least 2.
        seed: Seed of its random choices.

    Raises:
        UsageError: there is no such method.
    """
    tasks: Tasks = METHODS.load(name)(clusters, seed)
    return tasks


def require_even(batch_size: int, clusters: int, timesteps: int) -> None:
    """Check that a batch holds equally many images of each cluster.

    Raises:
        UsageError: it does not; the message names the nearest sizes. Or there are fewer timesteps than clusters.
    """
    if not 2 <= clusters <= timesteps:
        raise UsageError(f"--clusters {clusters} of {timesteps:,} timesteps", expected=f"2 to {timesteps:,}")
    rest = batch_size % clusters
    if rest:
        sizes = [size for size in (batch_size - rest, batch_size - rest + clusters) if size]
        raise UsageError(
            f"--batch-size {batch_size} does not hold equally many images of each of {clusters} timestep clusters",
            expected=f"a multiple of {clusters}",
            fix=f"--batch-size {' or '.join(map(str, sizes))}, or another --clusters",
        )


def extra_bytes(name: str, clusters: int, parameters: int) -> int:
    """Return the bytes that a method keeps beside those of plain training: one more gradient for each other cluster."""
    return BYTES * (clusters - 1) * parameters if METHODS[name].gathers else 0
