"""Two processes that run finectl together, command after command: a launcher's environment without its start-up time.

As a script this module is such a process: it reads commands as lines of JSON and answers each with one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import Ran, child_environment, command_line, run_cli

from finectl.artifacts.tensors import load_tensors, read_metadata
from finectl.errors import FinectlError
from finectl.training.log import read_log

SIZE = 2
TOLERANCE = 1e-5
DEADLINE_S = 180.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(rank: int, port: int) -> dict[str, str]:
    """Return what torchrun would say to a process, but for its own store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Pair:
    """Two processes that wait for commands."""

    def __init__(self) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=child_environment(),
            )
            for _ in range(SIZE)
        ]  # fmt: skip

    def __call__(self, *arguments: object, workspace: Path, second: tuple[object, ...] | None = None) -> list[Ran]:
        """Run a command line in both processes; `second` is another one for rank 1."""
        port = free_port()
        for rank, process in enumerate(self.processes):
            chosen = second if rank and second is not None else arguments
            environment = {**launcher_environment(rank, port), "FINECTL_WORKSPACE": str(workspace)}
            request = {"arguments": [str(argument) for argument in chosen], "environment": environment}
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            answers.append(Ran(**json.loads(line)))
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.communicate()


def torchrun(*arguments: object) -> list[str]:
    """Return the command line that starts finectl in two processes, as a user does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(SIZE), "-m", "finectl"]
    return [sys.executable, *launcher, *map(str, arguments)]


@contextmanager
def started(command: list[str], environment: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start a command in a session of its own, all of which is ended at last."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=child_environment(**(environment or {})),
    )  # fmt: skip
    children: set[int] = set()
    try:
        yield process
        children = set(ranks_of(process.pid))
    finally:
        for pid in {*ranks_of(process.pid), *children, process.pid} if process.poll() is None else set():
            os.kill(pid, signal.SIGKILL)
        process.wait()


def start_both(*arguments: object) -> list[subprocess.Popen[str]]:
    """Start finectl in two processes of a launcher that does not look after them."""
    port = free_port()
    return [
        subprocess.Popen(
            command_line(*arguments),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=child_environment(**launcher_environment(rank, port), PYTHONFAULTHANDLER="1"),
        )
        for rank in range(SIZE)
    ]  # fmt: skip


def ranks_of(launcher: int) -> list[int]:
    """Return the processes that a launcher started, by rank."""
    found = {}
    for pid in _children(launcher):
        try:
            raw = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        variables = dict(item.split(b"=", 1) for item in raw if b"=" in item)
        if b"LOCAL_RANK" in variables:
            found[int(variables[b"LOCAL_RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def wait_until(reached: Callable[[], Any], *processes: subprocess.Popen[str]) -> None:
    """Wait until something came about; no process may end before."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not reached():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, f"ended too early: {ended[0].communicate()}"
        assert time.monotonic() < deadline_s, "it never came about"
        time.sleep(0.005)


def saved_step(workspace: Path) -> int:
    """Return the step of the resume state that lies in the workspace, 0 without one."""
    for state in workspace.glob("*/.*.partial/state/training.safetensors"):
        try:
            return int(read_metadata(state)["step"])
        except (FinectlError, OSError):  # replaced at this very moment
            return 0
    return 0


def curves(path: Path) -> dict[tuple[int, str], float]:
    """Return the losses of an artifact's log, by step and name; each may be there once."""
    found: dict[tuple[int, str], float] = {}
    for entry in read_log(path / "log.jsonl"):
        for name in ("loss", "heldout_loss"):
            if name in entry:
                assert (entry["step"], name) not in found, "logged twice"
                found[entry["step"], name] = entry[name]
    return found


def assert_agree(one: Path, two: Path) -> None:
    """Assert that two runs have equal loss curves, averages and weights, but for rounding."""
    first, second = curves(one), curves(two)
    assert first and first.keys() == second.keys()
    worst = max(abs(first[key] - second[key]) for key in first)
    assert worst <= TOLERANCE, f"the curves differ by {worst}"
    kept = sorted(str(file.relative_to(two)) for file in two.glob("checkpoints/*"))
    assert kept == sorted(str(file.relative_to(one)) for file in one.glob("checkpoints/*"))
    for name in ("ema.safetensors", "model.safetensors", *kept):
        if name == "ema.safetensors" and not (one / name).exists() and not (two / name).exists():
            continue
        left, right = load_tensors(one / name), load_tensors(two / name)
        assert left.keys() == right.keys()
        worst = max(float((left[key] - right[key]).abs().max()) for key in left)
        assert worst <= TOLERANCE, f"{name} differs by {worst}"


def serve() -> None:
    """Run commands as they come, each with its environment."""
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        os.environ.update(request["environment"])
        ran = run_cli(*request["arguments"])
        answers.write(json.dumps({"code": ran.code, "out": ran.out, "err": ran.err}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
