"""The coefficients of the chain of forgetting: what is kept at low noise and learned anew at high noise. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finectl.errors import UsageError

SAMPLING = "sampling"
WEIGHTS = "weights"
COEFFICIENTS = (SAMPLING, WEIGHTS)
WEIGHT = {SAMPLING: 0.1, WEIGHTS: 1.0}
"""What retention counts: as the released code has it, and as the paper's formula does."""
SHARE = 0.2
"""Of a batch, as released: 6 retained images of 32."""


@dataclass(frozen=True)
class Chain:
    """How retained and new images share a batch, and which timesteps either sees or is weighed at.

    Args:
        batch: B, images of a batch over all processes.
        retained: S, those of them that are retained; 0 for none.
        power: Exponent of psi, the coefficient of new images; 0 is 1 everywhere.
        retention_power: Exponent of xi, the coefficient of retained ones.
        coefficients: `sampling`, by which timesteps are drawn, as in the released code, or `weights`, by which losses
            at uniform timesteps are weighed, as in the paper's formula.
        weight: lambda, what the mean loss of the retained images counts.

    Raises:
        UsageError: no image is new, or a number is out of range.

    Reference: Diff-Tuning, arXiv 2406.00773; the sampling is that of its released code.
    """

    batch: int
    retained: int
    power: float = 1.0
    retention_power: float = 1.0
    coefficients: str = SAMPLING
    weight: float = WEIGHT[SAMPLING]

    def __post_init__(self) -> None:
        if not 0 <= self.retained < self.batch:
            raise UsageError(
                f"{self.retained} retained images in a batch of {self.batch}",
                expected=f"between 0 and {self.batch - 1}",
            )
        if self.coefficients not in COEFFICIENTS:
            raise UsageError(f"unknown coefficients {self.coefficients!r}", expected=" or ".join(COEFFICIENTS))
        if min(self.power, self.retention_power, self.weight) < 0:
            raise UsageError("a negative exponent or weight of the chain of forgetting", expected="0 or more")

    @property
    def new(self) -> int:
        """B - S."""
        return self.batch - self.retained

    def psi(self, t: Any, timesteps: int) -> Any:
        """Return ((t + 1) / T)^power, of a number or of a tensor: how much new images count at t."""
        return ((t + 1) / timesteps) ** self.power

    def xi(self, t: Any, timesteps: int) -> Any:
        """Return ((T - t) / T)^retention_power: how much retained images count at t."""
        return ((timesteps - t) / timesteps) ** self.retention_power

    def mean_timesteps(self, timesteps: int) -> dict[str, float]:
        """Return the mean timestep of new and of retained images, under the probabilities or the weights."""
        found = {"target": _mean(self.psi, timesteps)}
        return {**found, "retained": _mean(self.xi, timesteps)} if self.retained else found


def retained_of(batch: int, share: float) -> int:
    """Return how many images of a batch are retained: the whole part of the share, as in the released code.

    Raises:
        UsageError: the share is not below 1, or gives no image.
    """
    count = int(share * batch + 1e-9)  # 0.3 of 10 are 3, whatever the rounding
    if not 0 < count < batch:
        raise UsageError(
            f"--retention-share {share:g} of a batch of {batch} are {count} retained images",
            expected=f"between 1 and {batch - 1}",
            fix=f"--retention-share {min(SHARE, 1 / batch) if batch < 1 / SHARE else SHARE:g} and --batch-size "
            f"{max(batch, 5)}, or --retention none",
        )
    return count


def _mean(coefficient: Callable[[float, int], float], timesteps: int) -> float:
    values: Sequence[float] = [coefficient(float(t), timesteps) for t in range(timesteps)]
    return round(sum(t * value for t, value in enumerate(values)) / sum(values), 3)
