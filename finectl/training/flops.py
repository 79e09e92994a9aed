"""Floating-point operations of training: what making a model took, whatever the machine.

Counted are matrix products and convolutions, a multiplication and an addition each. A backward pass counts as two
forward ones; what is computed again to save memory does not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from finectl.models.io import ModelConfig, build_model
from finectl.models.unet_config import UNetConfig, is_text_model
from finectl.training.batches import Batches, share_of
from finectl.training.consistency import Consistency
from finectl.training.distill import Distillation
from finectl.training.estimate import forward_flops
from finectl.training.multitask.tasks import Tasks
from finectl.training.retention import ChainLoss

TEXT_LENGTH = 77
"""Vectors a text where no encoder says it: CLIP's."""
PASSES = 3
"""Forward passes that an update is worth: its own, and a backward pass of two."""


def training_flops(model: Any, loss: Any, batches: Batches, updates: int, tasks: Tasks | None = None) -> int | None:
    """Return the floating-point operations of a model's training, over all processes.

    They are three times those of a forward pass, for every image seen; an update with a teacher adds a forward pass of
    it, of the images that it sees, and has no more layers than it runs. Held-out losses and samples are not counted.
    Timestep clusters whose gradients are taken apart add the inner products and the sum of these.

    Args:
        model: What is trained: which of its parameters are frozen decides how a factorised layer computes.
        loss: What it is trained with.
        batches: How a batch is shared by processes and parts: where a layer builds its weight, it does so once a part.
        updates: Optimiser updates, from the first.
        tasks: Clusters of timesteps, which some of the updates may compute one by one.

    Returns:
        The number, or None for a network whose operations cannot be followed.
    """
    count = getattr(model, "forward_operations", None)
    if count is not None:  # a network that is none of a configuration in the table of architectures
        return int(PASSES * updates * batches.batch_size * count())
    config = model.config
    sizes = part_sizes(batches)
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    distilling = min(loss.steps, updates) if isinstance(loss, Distillation) else 0
    depths = Counter(len(loss.layers(update)) for update in range(distilling))
    depths[config.depth] += updates - distilling
    operations = 0
    for images, parts in sizes.items():
        forward = _by_depth(config, depths, images, trained)
        if forward is None:
            return None
        operations += PASSES * parts * sum(count * forward[depth] for depth, count in depths.items())
    if tasks is not None and tasks.separated(updates):
        apart = _apart(model, batches, trained, tasks.clusters)
        if apart is None:
            return None
        operations += tasks.separated(updates) * apart
    taught = updates if isinstance(loss, Consistency | ChainLoss) else distilling
    images = loss.chain.retained if isinstance(loss, ChainLoss) else batches.batch_size
    if taught and loss.teacher is not None:
        one = count_forward(loss.teacher.config, images, frozenset())
        if one is None:
            return None
        operations += taught * one
    return operations


def _apart(model: Any, batches: Batches, trained: Collection[str], clusters: int) -> int | None:
    """Return what an update takes in addition where the gradient of each timestep cluster is computed by itself."""
    difference = part_sizes(batches, clusters)
    difference.subtract(part_sizes(batches))
    operations = 0
    for images, parts in difference.items():
        forward = count_forward(model.config, images, trained)
        if forward is None:
            return None
        operations += PASSES * parts * forward
    weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return operations + 2 * clusters * (clusters + 1) * weights  # inner products of all pairs, and a weighted sum


def part_sizes(batches: Batches, clusters: int = 1) -> Counter[int]:
    """Return into how many parts of which number of images all processes together cut a batch.

    Args:
        batches: How it is shared.
        clusters: Timestep clusters, of which each part's images are computed one after another.
    """
    parts: Counter[int] = Counter()
    for rank in range(batches.world.size):
        mine = share_of(batches.batch_size, rank, batches.world.size)
        for index in range(len(batches.slots)):
            part = share_of(mine.stop - mine.start, index, len(batches.slots))
            slots = range(mine.start + part.start, mine.start + part.stop)
            parts.update(sum(slot % clusters == cluster for slot in slots) for cluster in range(clusters))
    return parts


def count_forward(config: ModelConfig, images: int, trained: Collection[str] | None = None) -> int | None:
    """Return the floating-point operations of one forward pass, in training, of so many images.

    Args:
        config: The architecture; a dense DiT is counted by its formula.
        images: Images that are computed at once, at least 1.
        trained: Names of the parameters that are not frozen; all by default.

    Returns:
        The number, or None for a network whose operations cannot be followed.
    """
    counted = _by_depth(config, (config.depth,), images, trained)
    return None if counted is None else counted[config.depth]


def _by_depth(
    config: ModelConfig, depths: Collection[int], images: int, trained: Collection[str] | None
) -> dict[int, int] | None:
    """Return what `count_forward` does, for so many layers of a transformer."""
    if isinstance(config, UNetConfig):
        # The preconditioning that is left out holds no product of matrices. Every image takes the same.
        one = _trace(replace(config, sigma_data=None), 1, trained)
        return None if one is None else dict.fromkeys(depths, images * one)
    if config.factorized is None:
        return {depth: images * forward_flops(replace(config, depth=depth)) for depth in depths}
    # All layers after the first take the same, so that two tell of any number.
    one = _trace(replace(config, depth=1), images, trained)
    two = _trace(replace(config, depth=2), images, trained)
    if one is None or two is None:
        return None
    return {depth: one + (depth - 1) * (two - one) for depth in depths}


def _trace(config: ModelConfig, images: int, trained: Collection[str] | None) -> int | None:
    """Run a model on tensors that have shapes and no values, and count."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            model = build_model(config).eval()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained is None or name in trained)
            x = torch.zeros(images, config.channels, config.image_size, config.image_size)
            zeros = torch.zeros(images, dtype=torch.int64)
            y = zeros
            if isinstance(config, UNetConfig) and is_text_model(config):
                y = torch.zeros(images, config.text_length or TEXT_LENGTH, config.network["cross_attention_dim"])
            # The counter does not know the fused attention of a CPU.
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                model(x, zeros, y)
    except RuntimeError:  # an operation that needs values
        return None
    return int(counter.get_total_flops())
