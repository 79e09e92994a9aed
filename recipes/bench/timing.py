"""What the benchmarks of speed share: output, ratios within a round, and the machine's own speed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = 2
Step = Callable[[], float]
# Dense matrix products in bfloat16, as the maker states them (without sparsity), in floating-point operations a second.
STATED_PEAKS = {"H100 80GB HBM3": 989e12, "H200": 989e12, "A100": 312e12}


def say(line: str = "") -> None:
    """Write one line to stdout at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def paired_ratio(times: list[float], others: list[float]) -> float:
    """Return the median over the rounds of the ratio within a round: slow spells of the machine hit both."""
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))


def peak_flops(device: Any, dtype: Any) -> tuple[float, str]:
    """Return the floating-point operations a second that a model's utilisation is a share of, and where they are from.

    On a GPU that is known, what its maker states for bfloat16; elsewhere the best of some large matrix products here.
    """
    import torch

    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in STATED_PEAKS.items():
            if known in name:
                return peak, f"{name}, as stated"
    size = 8192 if device.type == "cuda" else 2048
    one, two = torch.randn(2, size, size, device=device, dtype=dtype).unbind(0)
    seconds = []
    for _ in range(8):
        synchronise(device)
        start_s = time.perf_counter()
        one @ two
        synchronise(device)
        seconds.append(time.perf_counter() - start_s)
    return 2 * size**3 / min(seconds), f"a product of {size}x{size} matrices here"


def synchronise(device: Any) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
