"""Inner products of the gradients of several losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from finectl.training.distributed import local, total
from finectl.world import World

COLUMNS = 2**20
MEMORY_BYTES = 2**30
BYTES = 4


class Gathered:
    """The gradients of several losses, each taken from the parameters after its backward pass.

    Args:
        parameters: Those that are trained.
        copied: Whether the next backward pass writes into the very tensors of this one's gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, copied: bool) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._copied = copied
        self._rows: list[list[Tensor | None]] = []

    def take(self) -> None:
        """Take the gradients of one loss off the parameters."""
        row: list[Tensor | None] = []
        for parameter in self._parameters:
            found = parameter.grad
            row.append(found.clone() if self._copied and found is not None else found)
            parameter.grad = None
        self._rows.append(row)

    def gram(self, world: World) -> Tensor:
        """Return the inner products of all pairs, (k, k), float64 on the CPU, the same in all processes.

        Args:
            world: The processes, each with the whole gradients of all of them together, or with its shard of those.
        """
        count = len(self._rows)
        gram: Tensor | None = None
        sharded = False
        for index in range(len(self._parameters)):
            column = [row[index] for row in self._rows]
            some = next((found for found in column if found is not None), None)
            if some is None:
                continue
            sharded = sharded or isinstance(some, DTensor)
            flat = [torch.zeros_like(local(some)) if found is None else local(found) for found in column]
            if gram is None:
                gram = torch.zeros(count, count, dtype=torch.float64, device=flat[0].device)
            add_products(gram, [value.flatten() for value in flat])
        if gram is None:
            gram = torch.zeros(count, count, dtype=torch.float64)
        # Whole gradients are the same everywhere; their mean makes the last bit so, too.
        return total(world, gram) / (1 if sharded else world.size)

    def put(self, weights: Sequence[float]) -> None:
        """Make the sum of the gradients under these weights the parameters' gradient; it ends the collection."""
        for index, parameter in enumerate(self._parameters):
            found = [(row[index], weight) for row, weight in zip(self._rows, weights, strict=True)]
            for gradient, weight in found:
                if gradient is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = gradient.mul_(weight)
                else:
                    parameter.grad.add_(gradient, alpha=weight)
        self._rows.clear()


@torch.no_grad()
def add_products(gram: Tensor, rows: Sequence[Tensor]) -> None:
    """Add the inner products of all pairs of vectors, computed in float64.

    Args:
        gram: (n, n), float64, on the device of the vectors.
        rows: n vectors of one length.
    """
    for columns in zip(*(row.split(COLUMNS) for row in rows), strict=True):
        block = torch.stack(columns).double()  # (n, at most COLUMNS)
        gram += block @ block.T


def gradient_gram(
    losses: Callable[[int], Iterable[Tensor]],
    count: int,
    parameters: Iterable[Tensor],
    *,
    memory_bytes: int = MEMORY_BYTES,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Return the inner products of the gradients of many losses, of which no whole gradient but one is ever kept.

    The parameters, as one long vector, are cut into blocks of which all gradients fit the memory; each block takes the
    losses anew, and backward passes that go no further than its parameters. A model small enough is one block.

    Args:
        losses: For an index, the scalars whose sum is that loss, each with a graph of its own (batches of a large
            sample); it is called once for each block and has to give the same every time.
        count: n, how many losses there are.
        parameters: What they are differentiated by, on one device; those that need no gradient are left out.
        memory_bytes: Of the gradients of one block.
        between: Called after every loss, for example to look for signals.

    Returns:
        (n, n), float64, on the CPU.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    width = max(1, memory_bytes // (BYTES * max(count, 1)))
    device = trained[0].device if trained else torch.device("cpu")
    gram = torch.zeros(count, count, dtype=torch.float64, device=device)
    for block in _blocks(trained, width):
        rows = torch.zeros(count, sum(stop - start for _, start, stop in block), device=device)
        for index in range(count):
            for loss in losses(index):
                _add_gradient(rows[index], loss, block)
            if between is not None:
                between()
        add_products(gram, list(rows))
    return gram.cpu()


def cosines(gram: Tensor) -> Tensor:
    """Return the cosines of all pairs from their inner products, (n, n), in [-1, 1]; 0 beside a vector that is 0."""
    norms = torch.diagonal(gram).clamp(min=0).sqrt()
    products = norms[:, None] * norms
    found = torch.where(products > 0, gram / products.clamp(min=torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))
    return found.clamp(-1, 1)


def _blocks(parameters: Sequence[Tensor], width: int) -> Iterator[list[tuple[Tensor, int, int]]]:
    """Yield parts of flattened parameters, (parameter, first, end), `width` entries together."""
    block: list[tuple[Tensor, int, int]] = []
    room = width
    for parameter in parameters:
        start = 0
        while start < parameter.numel():
            stop = min(parameter.numel(), start + room)
            block.append((parameter, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], width
    if block:
        yield block


def _add_gradient(row: Tensor, loss: Tensor, block: list[tuple[Tensor, int, int]]) -> None:
    """Add a loss's gradient by a block's parameters to its row."""
    found = torch.autograd.grad(loss, [parameter for parameter, _, _ in block], allow_unused=True)
    place = 0
    for gradient, (_, start, stop) in zip(found, block, strict=True):
        if gradient is not None:
            row[place : place + stop - start] += gradient.flatten()[start:stop]
        place += stop - start
