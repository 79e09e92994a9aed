"""What a metric returns: a value that never goes without its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Z_95 = 1.959964


@dataclass(frozen=True)
class Measured:
    """A measured value with its 95 % interval.

    Args:
        value: The value, in the metric's own units.
        low: Lower end of the interval.
        high: Upper end of the interval.
        details: What else belongs to it, in plain JSON: counts, splits, sizes of subsets.
    """

    value: float
    low: float
    high: float
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def around(cls, value: float, standard_error: float, details: dict[str, Any] | None = None) -> Measured:
        """Return a value with the normal interval of its standard error."""
        half = Z_95 * standard_error
        return cls(value, value - half, value + half, details or {})

    @classmethod
    def mean_of(cls, values: Tensor, details: dict[str, Any] | None = None) -> Measured:
        """Return the mean of independent values (N,), one an image, with its interval; N at least 1."""
        values = values.double()
        error = float(values.std()) / math.sqrt(values.numel()) if values.numel() > 1 else math.inf
        return cls.around(float(values.mean()), error, {"n": values.numel(), **(details or {})})

    def record(self) -> dict[str, Any]:
        """Return it as metrics.json and the manifest keep it."""
        return {"value": self.value, "interval": [self.low, self.high], **self.details}
