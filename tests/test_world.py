"""The processes of a run: what launchers say, and how the processes talk."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import child_environment

from finectl.errors import UsageError
from finectl.world import World, first_host

SRUN = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "gpu[03-06]"}
TALK = """
import os, sys
from finectl.world import World
world = World.from_environment()
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


def test_alone() -> None:
    world = World.from_environment({})
    assert (world.rank, world.size, world.leads) == (0, 1, True)
    world.tell("nobody", 1)
    world.barrier()


def test_torchrun_and_srun() -> None:
    torchrun = World.from_environment({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"})
    assert (torchrun.rank, torchrun.size, torchrun.local_rank, torchrun.leads) == (3, 4, 1, False)
    srun = World.from_environment(SRUN)
    assert (srun.rank, srun.size, srun.local_rank) == (9, 16, 1)


def test_a_batch_script_without_srun_is_one_process() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert World.from_environment(batch).size == 1
    assert World.from_environment({**batch, "SLURM_STEP_NUM_TASKS": "1"}).size == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "4", "WORLD_SIZE": "4"},
        {"RANK": "-1", "WORLD_SIZE": "4"},
        {"RANK": "one", "WORLD_SIZE": "4"},
        {"SLURM_STEP_NUM_TASKS": "2"},
    ],
)
def test_what_does_not_fit_together(environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="environment"):
        World.from_environment(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("gpu[03-06,11],login1", "gpu03"),
        ("a1,a2", "a1"),
        ("rack2-n[7]", "rack2-n7"),
        ("n[01-02].cluster,m1", "n01.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_two_processes_talk_and_wait_for_each_other(tmp_path: object) -> None:
    from socket import socket

    with socket() as probe:
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
