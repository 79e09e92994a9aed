"""Who takes part in a run: what launchers say, and how processes talk before any of them computes."""

from __future__ import annotations

import datetime
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import CountConfig, child_environment, count_stage, run_count

from finectl.artifacts.job import Job, Stage
from finectl.console import Console
from finectl.errors import ComputationError, InputError, UsageError
from finectl.runner import Result, RunOptions, run_stage
from finectl.world import World, first_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-04]"}


TALK = """
import os, sys
from finectl.world import World
with World.from_environment() as world:
    if world.leads:
        world.tell("word", {"rank": world.rank, "list": [1, 2]})
    heard = world.hear("word")
    world.barrier()
    world.tell(f"from/{world.rank}", world.rank)
    world.barrier()
    assert [world.hear(f"from/{rank}") for rank in range(2)] == [0, 1]
    world.barrier()
    print(world.rank, heard)
"""


def of(environment: dict[str, str]) -> tuple[int, int, int]:
    world = World.from_environment(environment)
    return world.rank, world.size, world.local_rank


def test_what_torchrun_says() -> None:
    assert of(TORCHRUN) == (3, 8, 1)
    assert of({"RANK": "0", "WORLD_SIZE": "1"}) == (0, 1, 0)
    assert of({**SRUN, **TORCHRUN}) == (3, 8, 1), "torchrun that srun started on each machine"
    assert World(rank=0, size=2).leads and not World(rank=1, size=2).leads


def test_what_srun_says() -> None:
    assert of(SRUN) == (2, 4, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1"},
        {"WORLD_SIZE": "4"},
        # A batch script without srun, on however many tasks the job has
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODELIST": "a,b"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
    ],
)
def test_a_process_alone(environment: dict[str, str]) -> None:
    assert of(environment) == (0, 1, 0) and World.from_environment(environment).leads


@pytest.mark.parametrize(
    "change",
    [
        {**TORCHRUN, "RANK": "8"},
        {**TORCHRUN, "RANK": "-1"},
        {**TORCHRUN, "WORLD_SIZE": "many"},
        {**TORCHRUN, "LOCAL_RANK": ""},
        {**SRUN, "SLURM_PROCID": "4"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "x"},
        {key: value for key, value in SRUN.items() if key != "SLURM_LOCALID"},
    ],
)
def test_an_environment_that_does_not_fit(change: dict[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        World.from_environment(change)
    wrong = next(name for name in ("RANK", "SLURM_PROCID") if name in change)
    assert wrong in caught.value.what


def test_where_processes_of_slurm_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def meeting_point(**given: str) -> tuple[str, int]:
        for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {**SRUN, **given}.items():
            monkeypatch.setenv(name, value)
        World.from_environment()
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    host, port = meeting_point(SLURM_JOB_ID="123456", SLURM_STEP_ID="0")
    assert host == "gpu03" and 1024 < port < 65536
    assert meeting_point(SLURM_JOB_ID="123456", SLURM_STEP_ID="0")[1] == port
    assert meeting_point(SLURM_JOB_ID="123456", SLURM_STEP_ID="1")[1] != port, "two steps of a job do not meet"
    assert meeting_point(SLURM_JOB_ID="123457", SLURM_STEP_ID="0")[1] != port
    assert meeting_point(MASTER_ADDR="head", MASTER_PORT="29500") == ("head", 29500)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-06,11],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("node[003]", "node003"),
        ("login1,gpu[03-06]", "login1"),
        ("rack[1-2]-ib", "rack1-ib"),
        ("rack[1-2]node[04-08],other", "rack1node04"),
        ("127.0.0.1", "127.0.0.1"),
        ("n[01-02].cluster,m1", "n01.cluster"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def worlds(size: int) -> list[World]:
    """Return processes that share a store in memory, for threads to play."""
    from torch.distributed import HashStore

    store = HashStore()
    store.set_timeout(datetime.timedelta(seconds=30))
    return [World(rank, size, rank, _store=store) for rank in range(size)]


def played(*parts: Callable[[], Any]) -> list[Any]:
    """Run each part in a thread; return what each returned or raised."""
    results: list[Any] = [None] * len(parts)

    def play(index: int) -> None:
        try:
            results[index] = parts[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=play, args=(index,), daemon=True) for index in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "it waits for ever"
    return results


def test_tell_and_hear() -> None:
    lead, follow = worlds(2)
    value = {"directory": "/tmp/ä", "parents": ["a", "b"], "step": 3, "none": None}
    assert played(lambda: follow.hear("work"), lambda: lead.tell("work", value)) == [value, None]
    World().tell("work", value)  # alone: nobody to tell, and nothing to meet through


def test_a_barrier_opens_when_the_last_one_comes() -> None:
    three = worlds(3)
    passed: list[tuple[int, int]] = []
    counts: list[int] = []
    lock = threading.Lock()

    def walk(world: World) -> None:
        for lap in range(3):
            with lock:
                passed.append((lap, world.rank))
            world.barrier()
            with lock:
                counts.append(sum(1 for one in passed if one[0] == lap))

    assert played(*(lambda world=world: walk(world) for world in three)) == [None] * 3
    assert counts == [3] * 9, "somebody went through before all were there"
    World().barrier()


def test_a_peer_that_is_gone_is_an_error() -> None:
    _, follow = worlds(2)
    follow.store.set_timeout(datetime.timedelta(milliseconds=200))
    for wait in (lambda: follow.hear("never"), follow.barrier):
        with pytest.raises(ComputationError, match="another process of this run is gone") as caught:
            wait()
        assert "run the same command again" in caught.value.fix


FAREWELL = """
import sys, time
from finectl.world import World
with World.from_environment() as world:
    world.store
    if world.leads:
        world.tell("work", "x")
    else:
        time.sleep(1)
        sys.stdout.write(str(world.hear("work")))
"""


def test_the_process_that_holds_the_store_leaves_last() -> None:
    """Without a launcher's store, as under SLURM, it is the leader's: its word is still there for who comes late."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FAREWELL],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=child_environment(RANK=str(rank), LOCAL_RANK=str(rank), **shared),
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["", "x"]


def test_processes_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match="cannot meet") as caught:
        World(rank=1, size=2).tell("work", None)
    assert "torchrun" in caught.value.fix


def shared_stage(ranks: list[int]) -> Stage[CountConfig]:
    """Return a stage that several processes share; the list holds who has worked."""
    counted = count_stage()

    def run(job: Job[CountConfig]) -> Any:
        ranks.append(job.world.rank)
        return counted.run(job) if job.world.leads else None

    return replace(counted, run=run, shares_work=True)


class Silent:
    """Signals belong to the main thread, and threads play the processes here."""

    requested = False

    def __init__(self, console: Console) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Any]]:
    """Run a stage in two processes, each with its configuration."""
    monkeypatch.setattr("finectl.runner.InterruptFlag", Silent)

    def both(stage: Stage[CountConfig], one: CountConfig, two: CountConfig, **options: Any) -> list[Any]:
        def part(world: World, config: CountConfig) -> Callable[[], Result]:
            chosen = RunOptions(workspace=tmp_path, world=world, **options)
            return lambda: run_stage(stage, config, [], chosen, Console(quiet=True))

        return played(*(part(world, config) for world, config in zip(worlds(2), (one, two), strict=True)))

    return both


def test_followers_share_the_work_and_no_more(run: Callable[..., list[Any]]) -> None:
    ranks: list[int] = []
    lead, follow = run(shared_stage(ranks), CountConfig(), CountConfig())
    assert sorted(ranks) == [0, 1]
    assert lead.artifact is not None and not lead.cached and follow.artifact is None
    lead, follow = run(shared_stage(ranks), CountConfig(), CountConfig())
    assert lead.cached and len(ranks) == 2, "nobody works on what is there"
    run(shared_stage(ranks), CountConfig("b"), CountConfig("b"), dry_run=True)
    assert len(ranks) == 2


def test_a_process_with_another_command_is_refused(run: Callable[..., list[Any]]) -> None:
    ranks: list[int] = []
    _, follow = run(shared_stage(ranks), CountConfig("a"), CountConfig("b"))
    assert isinstance(follow, UsageError) and "process 1 has the recipe" in follow.what
    assert "the same command" in follow.expected and ranks == [0]


def test_an_error_of_the_leader_before_any_work_ends_the_others(run: Callable[..., list[Any]]) -> None:
    def plan(config: CountConfig, parents: Any) -> Any:
        raise InputError("there is no such data")

    stage = replace(shared_stage([]), plan=plan)
    lead, follow = run(stage, CountConfig(), CountConfig())
    assert isinstance(lead, InputError)
    assert isinstance(follow, Result) and follow.artifact is None


def test_work_that_is_not_shared_waits_for_nobody(tmp_path: Path) -> None:
    """The leader does not even meet the others, who leave at once."""
    made = run_count(tmp_path, world=World(rank=0, size=2))
    assert made.artifact is not None and made.artifact.manifest.execution["world_size"] == 1
    assert run_count(tmp_path, world=World(rank=1, size=2)).artifact is None


def test_two_processes_talk_and_wait_for_each_other() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TALK],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=child_environment(RANK=str(rank), **meeting),
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(both):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out == f"{rank} {{'rank': 0, 'list': [1, 2]}}\n"
