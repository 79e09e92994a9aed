"""What the benchmarks of speed share: output, processes that take turns, ratios within a round, the machine's speed."""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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


def serve(make: Callable[[], Step]) -> None:
    """Build one contestant, then time one step for every line on stdin and answer with a line of JSON.

    Args:
        make: Builds it; a step returns a number, so that the device has finished.
    """
    import resource

    # Importing finectl repairs torchvision beside a CPU-only torch; timm and diffusers import torchvision.
    importlib.import_module("finectl")
    # Whatever a peer prints goes to stderr: stdout carries the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    step: Step | None = None
    idle = 0
    for _ in sys.stdin:
        if step is None:
            import torch

            torch.set_num_threads(THREADS)
            idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            step = make()
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        answer = {"seconds": seconds, "loss": loss, "peak_mib": peak, "idle_mib": idle}
        if torch.cuda.is_available():
            answer["device_mib"] = torch.cuda.max_memory_allocated() >> 20
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """A process that holds one contestant and runs a step when asked.

    Args:
        command: What it runs; it calls `serve`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.times: list[float] = []
        self.last: dict[str, float] = {}

    def step(self) -> float:
        """Run one step and return its seconds."""
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("a worker has no pipes")
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with exit code {self.process.wait()}")
        self.last = json.loads(line)
        return self.last["seconds"]

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def take_turns(workers: Mapping[str, Worker], rounds: int, warmup: int) -> None:
    """Let workers time `rounds` steps each, one after another in an order that changes, then end them.

    Args:
        workers: By name; their `times` are filled.
        rounds: Timed steps of each.
        warmup: Steps of each before those, which are not kept.
    """
    names = list(workers)
    try:
        for worker in workers.values():
            for _ in range(warmup):
                worker.step()
        for index in range(rounds):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                workers[name].times.append(workers[name].step())
    finally:
        for worker in workers.values():
            worker.close()
