"""Floating-point operations of a network's call, counted on tensors that have shapes and no values.

Counted are matrix products and convolutions, a multiplication and an addition each. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Call = tuple[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]]
"""A network, what it is called with, and whose gradients are taken, of those that need one: none for the call alone."""


def count_operations(make: Callable[[], Call]) -> int | None:
    """Return the operations of a call, and of the backward pass behind it.

    Args:
        make: Makes all that has no values; tensors that it finds may have some.

    Returns:
        The number, or None where operations need values, which cannot be followed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    counter = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.enable_grad():
            network, inputs, tensors = make()
            trained = [tensor for tensor in tensors if tensor.requires_grad]
            with sdpa_kernel(SDPBackend.MATH), counter:  # it does not know the fused attention of a CPU
                output = network(*inputs)
                if trained:
                    torch.autograd.grad(output.sum(), trained, allow_unused=True)
    except RuntimeError:  # an operation that needs values
        return None
    return int(counter.get_total_flops())
