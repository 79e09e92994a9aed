"""Which timesteps a batch is trained on: a pure function of the step's generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from finectl.diffusion.schedule import NoiseSchedule

COINS = ("batch", "sample")


@dataclass(frozen=True)
class RangeTimesteps:
    """Timesteps of one range, and with probability `p` of all ranges.

    So t falls into the range with probability (1 - p) + p (end - first) / T.

    Args:
        first: First timestep of the range.
        end: One past its last.
        p: Probability of a draw from 0..T-1, in [0, 1].
        coin: Whether one coin decides for the whole `batch`, as in the released code, or one for each `sample`.
        antithetic: Whether the second half of a batch mirrors the first: t and first + end - 1 - t.

    Reference: DeMe, arXiv 2410.06664, Eq. 6.
    """

    first: int
    end: int
    p: float
    coin: str = "batch"
    antithetic: bool = False

    def __call__(self, count: int, schedule: NoiseSchedule, *, step: int, generator: torch.Generator) -> Tensor:
        """Return (count,) timesteps, int64, on the generator's device."""
        device, total = generator.device, len(schedule)
        drawn = (count + 1) // 2 if self.antithetic else count
        coins = torch.rand(1 if self.coin == "batch" else drawn, generator=generator, device=device)
        # All are drawn, whatever the coin: no step waits for the device to tell on which side it fell.
        everywhere = torch.randint(total, (drawn,), generator=generator, device=device)
        inside = torch.randint(self.first, self.end, (drawn,), generator=generator, device=device)
        is_global = coins < self.p
        t = torch.where(is_global, everywhere, inside)
        if not self.antithetic:
            return t
        ends = torch.where(is_global, total, self.first + self.end)
        return torch.cat([t, ends - 1 - t])[:count]
