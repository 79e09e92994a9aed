"""Several processes, one model: joining, wrapping, agreeing, and whole tensors out of sharded ones."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from finectl.errors import UsageError
from finectl.world import PATIENCE, World, lost

# A process that died is noticed at once, by its closed connections; this is for one that hangs. The leader writes
# states and measures while the others wait, so it cannot be short.
TIMEOUT = datetime.timedelta(minutes=30)
LOST_PEER = ("closed by peer", "connection reset", "connection refused", "broken pipe", "timed out", "socket", "nccl")


def join(world: World, device: torch.device) -> None:
    """Make the process group of a run: gloo for what lies on the CPU, NCCL for what lies on CUDA devices."""
    if world.size == 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = PrefixStore("group", world.store)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=TIMEOUT)
    world.store.set_timeout(PATIENCE)


@contextmanager
def lost_peers_as_errors(world: World) -> Iterator[None]:
    """Turn what a collective raises when a process died into the one error that says so.

    Raises:
        ComputationError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size > 1 and any(sign in str(error).lower() for sign in LOST_PEER):
            raise lost(error) from error
        raise


def wrap(model: nn.Module, world: World, device: torch.device, *, fsdp: bool) -> nn.Module:
    """Return the module whose backward pass averages gradients over the processes; the parameters stay the model's.

    Args:
        model: With the same weights in every process; on `device`, or on the CPU where it is to be sharded.
        world: The processes.
        device: Where the model is.
        fsdp: Spread weights, gradients and what is derived from them over the processes, block by block
            (`torch.distributed.fsdp.fully_shard`).

    Raises:
        UsageError: FSDP was asked for and there is one process only.
    """
    if fsdp:
        if world.size == 1:
            raise UsageError(
                "--fsdp spreads a model over processes, and this is a single one",
                fix="torchrun --nproc-per-node N -m finectl ... --fsdp",
            )
        mesh = init_device_mesh(device.type, (world.size,))
        for block in getattr(model, "blocks", ()):
            fully_shard(block, mesh=mesh)
        return cast(nn.Module, fully_shard(model, mesh=mesh))
    if world.size == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # views of conv weights, which cost nothing at these sizes
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_sync(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Return the context in which a backward pass adds to the gradients without averaging them yet."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    return nullcontext()


def agree(world: World, *flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether any process raised it; all processes get the same answer."""
    if world.size == 1:
        return flags
    values = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return tuple(bool(value) for value in values)


def total(world: World, values: Tensor) -> Tensor:
    """Return the sums of numbers over the processes, float64 on the CPU."""
    values = values.double().cpu()
    if world.size > 1:
        dist.all_reduce(values)
    return values


def all_sum(world: World, values: Tensor) -> Tensor:
    """Return the sums of numbers over the processes, where they are."""
    if world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the sharded ones put together, on the CPU; every process has to call it."""
    return {name: value.full_tensor().cpu() if isinstance(value, DTensor) else value for name, value in tensors.items()}


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Put a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value.to(target.device), target.device_mesh, target.placements))
    else:
        target.copy_(value)


def like(target: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor on the target's device, sharded and laid out in memory as the target is."""
    if value.shape != target.shape:
        return value.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    # The fused optimiser takes the elements in the order in which memory holds them, and not by their indices: the
    # moments of a weight that is channels last have to be so too.
    return torch.empty_like(target, dtype=value.dtype).copy_(value)


def local(value: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it, unless it is sharded."""
    return value.to_local() if isinstance(value, DTensor) else value
