"""Where and in which arithmetic the work runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from finectl.errors import UsageError
from finectl.training.memory import tune_allocator


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that `--device` names; `auto` and `cuda` are this process's CUDA device where there is one.

    On a CPU the process keeps, from here on, the memory that it frees (`tune_allocator`).

    Raises:
        UsageError: the name is none of a device, or that device is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"there is no device {name!r}", expected="auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and device.index is None:
        # A launcher may show each process its own device only.
        device = torch.device("cuda", local_rank if count > 1 else 0)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(
            f"--device {name}: this machine shows {count} CUDA devices, and device {device.index} was asked for",
            expected="a device that is there, one for each process of a machine",
            fix="--device cpu; finectl doctor says what torch sees",
        )
    if device.type == "cpu":
        tune_allocator()
    return device


@dataclass(frozen=True)
class Arithmetic:
    """The precision of the work on a device.

    Args:
        device: Where it runs.
        autocast: The dtype of the matrix products, None for that of the tensors.
    """

    device: torch.device
    autocast: torch.dtype | None

    @classmethod
    def of(cls, device: torch.device, dtype: str) -> Arithmetic:
        """Return what `--dtype` means on a device, and set TF32 accordingly.

        `auto` is bfloat16 autocast on CUDA and float32 elsewhere. TF32, on the devices that have it, rounds the inputs
        of float32 products to 10 bits; it is used with `tf32`, and with `bfloat16` for what autocast leaves in float32.
        """
        if dtype == "auto":
            dtype = "bfloat16" if device.type == "cuda" else "float32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype != "float32"
        return cls(device, torch.bfloat16 if dtype == "bfloat16" else None)

    def context(self) -> AbstractContextManager[Any]:
        """Return the context in which a model is to be called."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)


def arithmetic(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """Return the context of `--dtype` on a device."""
    return Arithmetic.of(device, dtype).context()
