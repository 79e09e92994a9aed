"""Where and in which arithmetic the work runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from finectl.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is CUDA where there is one.

    Raises:
        UsageError: the name is none of a device, or that device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", expected="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices",
            expected="a device that is there",
            fix="--device cpu; finectl doctor says what torch sees",
        )
    return device


def arithmetic(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return the autocast context of `--dtype`; float32 is plain arithmetic."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
