"""Floating-point operations of training: what making a model took, whatever the machine.

Counted are matrix products and convolutions, a multiplication and an addition each. A backward pass counts as two
forward ones, or as what it takes where some of the parameters are frozen; what is computed again to save memory does
not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from finectl.models.io import ModelConfig, build_model
from finectl.models.operations import Call, count_operations
from finectl.models.presets import DiTConfig
from finectl.models.unet_config import UNetConfig, is_text_model
from finectl.training.batches import Batches, share_of
from finectl.training.consistency import Consistency
from finectl.training.controls import WithoutTexts
from finectl.training.distill import Distillation
from finectl.training.estimate import forward_flops
from finectl.training.multitask.tasks import Tasks
from finectl.training.retention import ChainLoss

TEXT_LENGTH = 77
"""Vectors a text where no encoder says it: CLIP's."""
PASSES = 3
"""Forward passes that an update of all parameters is worth: its own, and a backward pass of two."""


def update_operations(model: Any) -> int | None:
    """Return the operations of an update on one image, where they are not three times those of the architecture.

    That is where some parameters are frozen, and for a network that is none of a configuration in the table of
    architectures. The network itself is followed, with all that was put into it, so before it is compiled or sharded.

    Returns:
        The number; None if nothing is frozen, for a factorised network, whose layers take another way with another
        number of images, and for one whose operations cannot be followed.
    """
    own = getattr(model, "update_operations", None)
    if own is not None:
        return cast("int | None", own())
    config, parameters = model.config, list(model.parameters())
    if all(parameter.requires_grad for parameter in parameters) or _is_factorized(config):
        return None
    with _evaluating(model):
        return count_operations(lambda: (model, _inputs(config, 1, parameters[0].device), parameters))


def training_flops(
    model: Any, loss: Any, batches: Batches, updates: int, tasks: Tasks | None = None, one: int | None = None
) -> int | None:
    """Return the floating-point operations of a model's training, over all processes.

    They are three times those of a forward pass, for every image seen, or what forward and backward pass take where
    some of the parameters are frozen; an update with a teacher adds a forward pass of it, of the images that it sees,
    and has no more layers than it runs. Held-out losses and samples are not counted. Timestep clusters whose gradients
    are taken apart add the inner products and the sum of these.

    Args:
        model: What is trained: which of its parameters are frozen decides how a factorised layer computes.
        loss: What it is trained with.
        batches: How a batch is shared by processes and parts: where a layer builds its weight, it does so once a part.
        updates: Optimiser updates, from the first.
        tasks: Clusters of timesteps, which some of the updates may compute one by one.
        one: What `update_operations` found of the model before it was compiled or sharded.

    Returns:
        The number, or None for a network whose operations cannot be followed.
    """
    if isinstance(loss, WithoutTexts):
        loss = loss.loss
    distilling = min(loss.steps, updates) if isinstance(loss, Distillation) else 0
    operations = 0
    if one is not None:
        operations = updates * batches.batch_size * one
    elif hasattr(model, "update_operations"):
        return None
    else:
        depths = Counter(len(loss.layers(update)) for update in range(distilling))
        depths[model.config.depth] += updates - distilling
        for images, parts in part_sizes(batches).items():
            found = _updates(model, depths, images)
            if found is None:
                return None
            operations += parts * sum(count * found[depth] for depth, count in depths.items())
    if tasks is not None and tasks.separated(updates):
        apart = _apart(model, batches, tasks.clusters, one)
        if apart is None:
            return None
        operations += tasks.separated(updates) * apart
    taught = updates if isinstance(loss, Consistency | ChainLoss) else distilling
    images = loss.chain.retained if isinstance(loss, ChainLoss) else batches.batch_size
    if taught and loss.teacher is not None:
        taken = count_forward(loss.teacher.config, images, frozenset())
        if taken is None:
            return None
        operations += taught * taken
    return operations


def _updates(model: Any, depths: Collection[int], images: int) -> dict[int, int] | None:
    """Return what an update on so many images takes in one part, for so many layers of a transformer."""
    config = model.config
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if _is_factorized(config) and len(trained) < sum(1 for _ in model.parameters()):
        return _traced_by_depth(config, depths, images, trained, backward=True)
    forward = _by_depth(config, depths, images, trained)
    return None if forward is None else {depth: PASSES * count for depth, count in forward.items()}


def _apart(model: Any, batches: Batches, clusters: int, one: int | None) -> int | None:
    """Return what an update takes in addition where the gradient of each timestep cluster is computed by itself."""
    operations = 0
    if one is None:  # what is counted by the image takes the same in any parts
        difference = part_sizes(batches, clusters)
        difference.subtract(part_sizes(batches))
        depth = model.config.depth
        for images, parts in difference.items():
            found = _updates(model, (depth,), images)
            if found is None:
                return None
            operations += parts * found[depth]
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
    return _traced_by_depth(config, depths, images, trained)


def _traced_by_depth(
    config: DiTConfig,
    depths: Collection[int],
    images: int,
    trained: Collection[str] | None,
    *,
    backward: bool = False,
) -> dict[int, int] | None:
    """Return the operations of a transformer with so many layers: those after the first take the same."""
    one = _trace(replace(config, depth=1), images, trained, backward=backward)
    two = _trace(replace(config, depth=2), images, trained, backward=backward)
    if one is None or two is None:
        return None
    return {depth: one + (depth - 1) * (two - one) for depth in depths}


def _trace(config: ModelConfig, images: int, trained: Collection[str] | None, *, backward: bool = False) -> int | None:
    """Count the operations of an architecture's forward pass, and of its backward pass if asked for."""

    def make() -> Call:
        model = build_model(config).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
        return model, _inputs(config, images), list(model.parameters()) if backward else []

    return count_operations(make)


def _is_factorized(config: Any) -> bool:
    return getattr(config, "factorized", None) is not None


def _inputs(config: ModelConfig, images: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy images, timesteps and labels or texts of their shapes."""
    x = torch.zeros(images, config.channels, config.image_size, config.image_size, device=device)
    zeros = torch.zeros(images, dtype=torch.int64, device=device)
    if isinstance(config, UNetConfig) and is_text_model(config):
        length = config.text_length or TEXT_LENGTH
        return x, zeros, torch.zeros(images, length, config.network["cross_attention_dim"], device=device)
    return x, zeros, zeros


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have nothing dropped at random inside, and the mode as it was behind."""
    before = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(before)
