"""Where the work runs: devices by name, and memory that is kept for the next tensor."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from support import child_environment

from finectl.errors import UsageError
from finectl.training.device import resolve_device
from finectl.training.memory import tune_allocator

FAULTS = """
import resource, torch
from finectl.training.device import resolve_device
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.zeros(1 << 24)  # 64 MiB
for _ in range(16):
    x * 2
before = faults()
for _ in range(8):
    x * 2
print(faults() - before)
"""


def page_faults(call: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        capture_output=True, text=True, check=True, env=child_environment(),
    )  # fmt: skip
    return int(done.stdout)


def test_there_is_a_cpu_and_no_other_name_for_it() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for name in ("cpu0", "gpu", "cuda:99"):
        with pytest.raises(UsageError):
            resolve_device(name)


@pytest.mark.skipif(not tune_allocator(), reason="another C library than glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    assert page_faults("resolve_device('cpu')") < page_faults("") / 4
