"""The processes that work on one run: as torchrun or SLURM started them, or this one alone (no torch import).

A launcher tells every process its rank through the environment. Rank 0 leads: it holds the staging directory, decides
what is to be done and writes; the others wait for its word, compute their share and leave.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finectl.errors import ComputationError, PeerLostError, UsageError

# A leader may look through a large data set before it gives its word; a process that died is noticed at once.
PATIENCE = datetime.timedelta(hours=24)
# How long the store is kept for processes that have not yet read the last word in it.
FAREWELL = datetime.timedelta(seconds=10)
FIRST_PORT, PORTS = 20_000, 20_000


@dataclass
class World:
    """The processes of a run.

    Args:
        rank: This process, 0..size-1.
        size: How many there are.
        local_rank: This process among those of its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    _store: Any = field(default=None, repr=False)
    _barriers: int = field(default=0, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process holds the staging directory and writes."""
        return self.rank == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """Read what torchrun (RANK, WORLD_SIZE, LOCAL_RANK) or SLURM's srun (SLURM_PROCID, ...) says.

        Under SLURM the meeting point is the first machine of the job and a port derived from the job's number, unless
        MASTER_ADDR and MASTER_PORT are set.

        Raises:
            UsageError: the variables do not fit together.
        """
        given = os.environ if environment is None else environment
        if "WORLD_SIZE" in given and "RANK" in given:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
            rank, size, local = _numbers(given, {"LOCAL_RANK": "0", **given}, names)
        elif given.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
            rank, size, local = _numbers(given, given, names)
            if environment is None:
                os.environ.setdefault("MASTER_ADDR", first_host(given.get("SLURM_STEP_NODELIST", "127.0.0.1")))
                job = int(given.get("SLURM_JOB_ID", "0")) + int(given.get("SLURM_STEP_ID", "0"))
                os.environ.setdefault("MASTER_PORT", str(FIRST_PORT + job % PORTS))
        else:
            return cls()
        if not 0 <= rank < size:
            raise UsageError(f"{names[0]}={rank} and {names[1]}={size} in the environment", expected="0 <= rank < size")
        return cls(rank, size, local)

    @property
    def store(self) -> Any:
        """The key-value store through which the processes meet (imports torch)."""
        if self._store is None:
            from torch.distributed.distributed_c10d import PrefixStore
            from torch.distributed.rendezvous import rendezvous

            os.environ["RANK"], os.environ["WORLD_SIZE"] = str(self.rank), str(self.size)
            try:
                store, _, _ = next(iter(rendezvous("env://", self.rank, self.size)))
            except (RuntimeError, ValueError) as error:
                raise UsageError(
                    f"the {self.size} processes of this run cannot meet: {' '.join(str(error).split())[:300]}",
                    expected="MASTER_ADDR and MASTER_PORT of a machine that all of them reach",
                    fix="start them with torchrun --nproc-per-node N -m finectl ..., or with srun",
                ) from error
            store.set_timeout(PATIENCE)
            self._store = PrefixStore("finectl", store)
        return self._store

    def tell(self, key: str, value: Any) -> None:
        """Give the other processes a JSON value under a key; nothing happens when there are none."""
        if self.size > 1:
            self.store.set(key, json.dumps(value))

    def hear(self, key: str) -> Any:
        """Wait for a value that another process tells.

        Raises:
            ComputationError: the process that holds the store is gone.
        """
        try:
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise lost(error) from error

    def barrier(self) -> None:
        """Wait until every process has come here as often as this one.

        Raises:
            ComputationError: another process is gone.
        """
        if self.size == 1:
            return
        self._barriers += 1
        key = f"barrier/{self._barriers}"
        try:
            if self.store.add(key, 1) == self.size:
                self.store.set(f"{key}/open", "1")
            self.store.wait([f"{key}/open"])
        except RuntimeError as error:
            raise lost(error) from error

    def part(self, name: str) -> World:
        """Return the same processes with words and barriers of their own, for one of several runs in a row."""
        if self.size == 1:
            return self
        from torch.distributed.distributed_c10d import PrefixStore

        return replace(self, _store=PrefixStore(name, self.store), _barriers=0)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Take the process group down, if one was made; the process that may hold the store leaves last."""
        if self._store is None or isinstance(error, PeerLostError):
            return
        distributed = sys.modules["torch"].distributed
        if distributed.is_initialized():
            distributed.destroy_process_group()
        if isinstance(error, ComputationError):  # another process may be gone
            self._store = None
            return
        with contextlib.suppress(RuntimeError):  # whoever is gone needs no farewell
            if self.leads:
                self._store.wait([f"left/{rank}" for rank in range(1, self.size)], FAREWELL)
            else:
                self._store.set(f"left/{self.rank}", "1")
        self._store = None


def lost(error: BaseException) -> PeerLostError:
    """Return the error of a process whose peer is gone."""
    return PeerLostError(
        f"another process of this run is gone: {' '.join(str(error).split())[:200]}",
        expected="all processes alive until the end; the first error of the others says what happened",
        fix="run the same command again: it goes on from the last saved state",
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list such as `gpu[03-06,11],login1`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\d*)[^\]]*\]", r"\1", first.group() if first else nodes)


def _numbers(given: Mapping[str, str], values: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, ...]:
    try:
        return tuple(int(values[name]) for name in names)
    except (KeyError, ValueError) as error:
        shown = ", ".join(f"{name}={given.get(name, '(not set)')}" for name in names)
        raise UsageError(f"the environment says {shown}", expected="three integers, as torchrun or srun set") from error
