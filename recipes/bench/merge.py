"""Time a merge of five checkpoints, warm and cold: finectl, mergekit, and reading five files and writing one.

Every contestant is a process of its own, timed from its start to its end, in rounds that take them in turns. finectl is
`finectl merge --weights`, artifact, digests and all; inputs that it has not seen before ("first use") are hashed, too.
finectl and the floor sync what they write to the disk; mergekit does not. This process imports neither numpy nor torch:
what a process holds when it starts another counts in the other's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import paired_ratio, say

WEIGHTS = (0.1, 0.2, 0.3, 0.4)
UNIT = 1_000_000
BLOCK_BYTES = 42_513_408  # of dit-b in float32
AIMS = {"warm": {"mergekit": 0.12, "floor": 1.3}, "cold": {"mergekit": 0.4, "floor": 1.3}}
MOST_MB = 150
MINE, FIRST = "finectl", "finectl, first use"
FINECTL = [sys.executable, "-c", "from finectl.cli.main import entry_point; entry_point()"]

FLOOR = """
import os, sys
*inputs, out = sys.argv[1:]
buffer = memoryview(bytearray(1 << 19))  # faster here than 1 to 16 MB, which do not stay in the cache of a core
target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
handles = [os.open(path, os.O_RDONLY) for path in inputs]
for handle in handles:
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
place = 0
while True:
    got = [os.preadv(handle, [buffer], place) for handle in handles]
    if not got[0]:
        break
    os.pwrite(target, buffer[: got[0]], place)
    place += got[0]
os.fsync(target)
"""

COMPARE = """
import sys
from pathlib import Path
import numpy as np
from finectl.artifacts.merging.numbers import accumulator, decode
from finectl.artifacts.merging.sources import TensorFile
*inputs, weights, out = map(str, sys.argv[1:])
files, merged = [TensorFile(Path(path)) for path in inputs], TensorFile(Path(out))
worst = 0.0
for name, entry in list(merged.entries.items())[:12]:
    def numbers(file):
        raw = np.empty(entry.count * {"F32": 4, "BF16": 2}[entry.code], np.uint8)
        values = np.empty(entry.count, np.float64)
        file.read(name, 0, raw)
        decode(raw, entry.code, values)
        return values
    base, *models = map(numbers, files)
    wanted = base + sum(float(w) * (m - base) for w, m in zip(weights.split(","), models))
    worst = max(worst, float(np.abs(numbers(merged) - wanted).max()))
print(worst)
"""


def make(folder: Path, megabytes: int, dtype: str) -> None:
    """Make five models of one architecture as artifacts `0` to `4`; the first is theta_0."""
    depth = max(1, round(megabytes * UNIT / BLOCK_BYTES))
    for number in range(5):
        out = folder / str(number)
        whole = folder / "float32" if dtype == "bfloat16" else out
        sizes = ["--model", "dit-b", "--depth", str(depth), "--data", "digits"]
        finectl("init", "--method", "he", *sizes, "--seed", str(number), "--out", str(whole))
        if whole != out:
            halved = ["--method", "linear", "--weights", "1", "--output-dtype", dtype]
            finectl("merge", str(whole), *halved, "--out", str(out))
            shutil.rmtree(whole)


def finectl(*arguments: str) -> None:
    """Run finectl."""
    subprocess.run([*FINECTL, *arguments, "--quiet"], check=True, stdout=subprocess.DEVNULL)


def weights_of(artifact: Path) -> str:
    """Return the one file of weights."""
    return str(artifact / "model.safetensors")


def contestants(folder: Path, mergekit: str | None, dtype: str) -> dict[str, tuple[list[str], Path]]:
    """Return the command of each contestant and what it writes."""
    artifacts = [str(folder / str(number)) for number in range(5)]
    inputs = [weights_of(folder / str(number)) for number in range(5)]
    weights = ",".join(map(str, WEIGHTS))
    outs = {name: folder / f"out-{name}" for name in (FIRST, MINE, "floor", "mergekit")}
    merge = [*FINECTL, "merge", *artifacts[1:], "--base", artifacts[0], "--weights", weights, "--quiet", "--out"]
    found = {name: ([*merge, str(outs[name])], outs[name]) for name in (FIRST, MINE)}
    found["floor"] = ([sys.executable, "-c", FLOOR, *inputs, str(outs["floor"])], outs["floor"])
    if mergekit:
        recipe = folder / "mergekit.json"  # which is YAML, too
        models = [{"model": path, "parameters": {"weight": w}} for path, w in zip(inputs[1:], WEIGHTS, strict=True)]
        plan = {"merge_method": "task_arithmetic", "base_model": inputs[0], "models": models, "dtype": dtype}
        recipe.write_text(json.dumps(plan))
        found["mergekit"] = ([mergekit, "--quiet", str(recipe), str(outs["mergekit"])], outs["mergekit"])
    return found


def evict(folder: Path) -> None:
    """Drop the inputs from the system's cache."""
    for path in folder.glob("?/model.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def warm(folder: Path) -> None:
    """Read the inputs, so that the system has them in its cache."""
    buffer = bytearray(1 << 24)
    for path in folder.glob("?/model.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def measure(command: list[str], log: Path, cache: Path) -> dict[str, float]:
    """Run a command; return its wall and processor seconds, and the peak of its resident memory in MB."""
    os.sync()  # nobody pays for what another left to be written
    with log.open("wb") as stream:
        start_s = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | {"HF_HUB_OFFLINE": "1", "FINECTL_CACHE": str(cache)}
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start_s
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{shlex.join(command)[:200]}: exit code {child.returncode}\n{log.read_text()[-2000:]}")
    return {"s": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "mb": usage.ru_maxrss * 1024 / UNIT}


def difference(folder: Path, out: Path) -> float:
    """Return the largest difference of a result from the sum in float64, over the first tensors."""
    path = next(iter(sorted(out.glob("*.safetensors"))))
    inputs = [weights_of(folder / str(number)) for number in range(5)]
    command = [sys.executable, "-c", COMPARE, *inputs, ",".join(map(str, WEIGHTS)), str(path)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def remove(path: Path) -> None:
    """Remove a contestant's output."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    """Measure and print; exit code 1 when an aim is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("megabytes", type=int, nargs="?", default=500, help="Size of each checkpoint.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-pytorch"), help="Its mergekit-pytorch.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="Write the figures there, too.")
    options = parser.parse_args()
    needed, free = 8 * options.megabytes * UNIT, shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise SystemExit(
            f"{free / UNIT:,.0f} MB are free in {tempfile.gettempdir()}, and {needed / UNIT:,.0f} are needed"
        )
    with tempfile.TemporaryDirectory(prefix="finectl-merge-") as place:
        folder = Path(place)
        make(folder, options.megabytes, options.dtype)
        size = os.path.getsize(weights_of(folder / "0")) / UNIT
        results = race(folder, options.mergekit, options.dtype, options.rounds)
    say(f"five checkpoints of {size:,.0f} MB in {options.dtype}; median of {options.rounds} rounds")
    if not options.mergekit:
        say("mergekit is not there: see merge.sh for how to get it")
    missed = report(results)
    if options.json:
        options.json.write_text(json.dumps({"megabytes": size, "dtype": options.dtype} | results, indent=2) + "\n")
    return 1 if missed else 0


def race(folder: Path, mergekit: str | None, dtype: str, rounds: int) -> dict[str, Any]:
    """Return seconds and peaks of every contestant by state of the cache, and how far each is from the exact sum."""
    runners = contestants(folder, mergekit, dtype)
    results: dict[str, Any] = {state: {name: {"s": [], "cpu_s": [], "mb": []} for name in runners} for state in AIMS}
    results["difference"] = {}
    command, out = runners[MINE]
    measure(command, folder / "log", folder / "cache")  # the digests of the inputs are known from now on
    remove(out)
    for number in range(rounds):
        for state in AIMS:
            order = list(runners) if number % 2 == 0 else list(reversed(runners))
            for name in order:
                command, out = runners[name]
                cache = folder / ("cache" if name == MINE else "empty")
                shutil.rmtree(folder / "empty", ignore_errors=True)
                warm(folder) if state == "warm" else evict(folder)
                for what, value in measure(command, folder / "log", cache).items():
                    results[state][name][what].append(value)
                if name != "floor" and name not in results["difference"]:
                    results["difference"][name] = difference(folder, out)
                remove(out)
    return results


def report(results: dict[str, Any]) -> bool:
    """Print the table; return whether an aim is missed."""
    say()
    say("| contestant | cache | s | finectl takes of it | aim | processor, s | peak, MB | from the exact sum |")
    say("|---|---|--:|--:|--:|--:|--:|--:|")
    missed = False
    for state, aims in AIMS.items():
        mine = results[state][MINE]
        missed |= max(mine["mb"]) > MOST_MB
        for name, one in results[state].items():
            ratio, aim = paired_ratio(mine["s"], one["s"]), aims.get(name)
            missed |= aim is not None and ratio > aim
            away = results["difference"].get(name)
            exact = "" if away is None else f"{away:.1e}"
            say(
                f"| {name} | {state} | {statistics.median(one['s']):.2f} "
                f"| {'' if aim is None else f'{ratio:.2f}'} | {'' if aim is None else aim} "
                f"| {statistics.median(one['cpu_s']):.2f} | {max(one['mb']):,.0f} | {exact} |"
            )
    say()
    say(f"finectl and the floor sync what they write; aim for finectl's peak: under {MOST_MB} MB")
    say("finectl works in several threads: on a busy machine, processor seconds say more than the ratio to the floor")
    return missed


if __name__ == "__main__":
    sys.exit(main())
