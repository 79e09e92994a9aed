"""`finectl doctor`: the installation and the machine, checked."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path

from finectl.cli import options as opt

REQUIRED = ("torch", "numpy", "safetensors", "diffusers", "scikit-learn", "pillow", "pyyaml", "rich", "typer")
OPTIONAL = {
    "matplotlib": "plots",
    "scikit-image": "photos",
    "datasets": "hub",
    "tensorboard": "tensorboard",
    "torchvision": "vision",
    "clean-fid": "vision",
    "open-clip-torch": "vision",
    "torchmetrics": "vision",
    "peft": "peft",
}
NARROW_UNITS = ("amx_bf16", "avx512_bf16", "bf16")


def doctor(workspace: opt.Workspace = None, json_output: opt.Json = False) -> None:
    """Check the installation and this machine: versions, devices, threads, memory, disk, bundled data.

    Exit code 3 when something that finectl needs is missing.
    """
    from finectl.artifacts.store import Workspace
    from finectl.console import Console
    from finectl.errors import InputError

    facts: dict[str, str] = {"python": platform.python_version()}
    problems: list[str] = []
    for package in REQUIRED:
        facts[package] = _version(package) or "missing"
        if facts[package] == "missing":
            problems.append(f"pip install {package}")
    for package, extra in OPTIONAL.items():
        facts[package] = _version(package) or f"not installed (pip install 'finectl[{extra}]')"
    facts.update(_machine(Workspace(workspace).root))
    facts.update(_data(problems))
    facts.update(_networks())
    if json_output:
        sys.stdout.write(json.dumps({"facts": facts, "problems": problems}) + "\n")
    else:
        rows = [[name, value] for name, value in facts.items()]
        Console(stream=sys.stdout).table("finectl doctor", ["what", "found"], rows)
    if problems:
        raise InputError(f"{len(problems)} problems were found", fix=f"{'; '.join(problems)}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(root: Path) -> dict[str, str]:
    """Return processors, memory, disk and what torch computes with."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    facts = {
        "processors": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{memory:.1f} GB",
        "workspace": f"{root} ({shutil.disk_usage(there).free / 1e9:.1f} GB free)",
    }
    if _version("torch"):
        import torch

        from finectl.artifacts.cache import cache_root

        count = torch.cuda.device_count()
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count)) or "none"
        narrow = [name for name in NARROW_UNITS if torch.cpu.get_capabilities().get(name)]
        facts |= {
            "torch threads": str(torch.get_num_threads()),
            "bfloat16 on the CPU": ", ".join(narrow) or "emulated: --dtype float32 is faster",
            "CUDA devices": names,
            "image cache": str(cache_root()),
        }
    return facts


def _data(problems: list[str]) -> dict[str, str]:
    """Return whether the bundled digits and their classifier are there and whole."""
    from finectl.data.sources import describe
    from finectl.errors import FinectlError

    try:
        info = describe("digits")
        facts = {"digits": f"{info.count} images, fingerprint {info.fingerprint[:12]}"}
    except FinectlError as error:
        problems.append(error.fix)
        return {"digits": error.what}
    if _version("torch"):
        import torch

        from finectl.metrics.features import FeatureOptions, digits

        options = FeatureOptions()
        try:
            extractor = digits.load(digits.describe(options), options, torch.device("cpu"))
            facts["digits classifier"] = f"digest {extractor.info.digest[:12]}"
        except FinectlError as error:
            problems.append(error.fix)
            facts["digits classifier"] = error.what
    return facts


def _networks() -> dict[str, str]:
    """Return which files of weights are in the cache, for the metrics that need one."""
    from finectl.metrics.features.weights import WEIGHTS, cached_file

    found = {}
    for name, entry in WEIGHTS.items():
        path = cached_file(name)
        found[entry.what] = str(path) if path.is_file() else f"not here: {entry.option} FILE, or --download"
    return found
