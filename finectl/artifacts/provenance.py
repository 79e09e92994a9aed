"""What a manifest says of a run beside its files: data, cost, machine and versions."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from typing import Any

import finectl
from finectl.artifacts.job import DataRecord, Outcome
from finectl.world import World


def data_record(data: DataRecord | None) -> dict[str, Any]:
    """Return what a manifest says of the data set."""
    if data is None:
        return {}
    record = {"name": data.name, "fingerprint": data.fingerprint, "count": data.count, "bundled": data.bundled}
    more = {key: getattr(data, key, None) for key in ("skipped", "vae", "captions", "text", "whole")}
    return {**record, **{key: value for key, value in more.items() if value}}


def cost_of(outcome: Outcome, start_s: float) -> dict[str, Any]:
    """Complete a stage's cost with what is measured for all: wall seconds and peak memory."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    wall_s = round(time.monotonic() - start_s, 3)
    return {"steps": 0, "samples": 0, "wall_s": wall_s, **outcome.cost, "peak_memory_bytes": usage.ru_maxrss * unit}


def machine(world: World) -> dict[str, Any]:
    """Return what the arithmetic depends on beside the options: processes, threads and TF32."""
    torch = sys.modules.get("torch")
    tf32 = bool(torch and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32)
    threads = torch.get_num_threads() if torch else 1
    return {"world_size": world.size, "threads": threads, "tf32": tf32}


def environment() -> dict[str, str]:
    """Return the versions and the machine that a manifest records."""
    versions = {"finectl": finectl.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {**versions, "machine": platform.machine(), "system": platform.system()}
