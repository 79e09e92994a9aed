"""Auto-LG: blocks of the ancestor, its first six, or those most like the blocks of a model trained for the purpose.

Embedders and final layer are copied.

- `first`: the ancestor's first six blocks become the target's first six; above them all is DiT's own start. This is the
  fixed rule that learngene papers report as a baseline. A target, or an ancestor, of fewer blocks gives fewer;
  `--set layers=N` takes another number than six.
- `similarity`: the paper's idea. A pseudo-descendant, a DiT of the target's depth, starts at random and is trained for
  `--tune-steps` updates (usually a third of those that the ancestor cost, which is what FINE's table books) on the
  target's data with the plain loss. The outputs of its blocks are compared with those of the ancestor's by linear CKA
  on fixed noisy images, tokens as rows, and of all matchings of the target's layers to layers of the ancestor that
  never go back the one of the largest sum is taken. Every layer of the target gets the layer that it is matched to, and
  one may serve several. So, unlike in the fixed rule, which leaves what lies above six layers at random, all of the
  target is filled, and nothing of the pseudo-descendant is kept.

Ours: linear CKA, the matching, and a pseudo-descendant without meta-learning and distillation. The data has to have the
ancestor's image size and channels; where its labels are others, both models are shown the null class.

Reference: Wang et al., Learngene: Inheriting Condensed Knowledge from the Ancestry Model to Descendant Models, arXiv
2305.02279; Kornblith et al., arXiv 1905.00414, for CKA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finectl.data.dataset import load
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import Ancestor, assemble, copy_layers, fresh_state
from finectl.initializers.tuning import tune
from finectl.models.dit import DiT
from finectl.training.device import resolve_device
from finectl.training.probe import Probe, probes
from finectl.training.settings import data_options
from finectl.training.similarity import linear_cka

BATCHES = 4
BATCH_SIZE = 64
ROWS = 4096


def initialize(request: Request) -> Initialized:
    """Copy the chosen blocks, the embedders and the final layer.

    Raises:
        UsageError: `--set layers` is no whole number.
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged; for `similarity`, it does not take
            the target's images.
        ComputationError: the loss of the pseudo-descendant is not finite.
        Interrupted: a signal came; the state of the pseudo-descendant is saved.
    """
    if request.job.config.variant == "first":
        kept = request.count("layers")
        return copy_layers(request, lambda layers, depth: placement(layers, depth, kept))
    ancestor = Ancestor.of(request)
    require_same_images(request, ancestor)
    pseudo, cost = pseudo_descendant(request)
    chosen = monotone_matching(similarity(request, pseudo, ancestor))
    request.job.console.note(f"layers {', '.join(str(layer + 1) for layer in chosen)} of the ancestor are taken")
    layers = ancestor.layers
    return replace(assemble(request, [layers[layer] for layer in chosen], ancestor.rest), cost=cost)


def placement(layers: int, depth: int, kept: int) -> dict[int, int]:
    """Return which layer of the ancestor each filled layer of the target comes from, both counted from 0.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'.
        kept: Layers to take, from the first.
    """
    return {index: index for index in range(min(kept, layers, depth))}


def monotone_matching(scores: Tensor) -> list[int]:
    """Return the layer of the ancestor for each of the target that makes the sum of scores largest and never goes back.

    Args:
        scores: (L', L), of each pair.

    Returns:
        L' layers, counted from 0, none below the one before it; of equal sums that with earlier layers, from the last.
    """
    rows: list[list[float]] = scores.tolist()
    sums, choices = rows[0], []
    for row in rows[1:]:
        best, choice = -1, []  # of the sums up to each layer, the place of the largest
        for layer, value in enumerate(sums):
            best = layer if best < 0 or value > sums[best] else best
            choice.append(best)
        choices.append(choice)
        sums = [sums[choice[layer]] + value for layer, value in enumerate(row)]
    path = [max(range(len(sums)), key=lambda layer: sums[layer])]
    for choice in reversed(choices):
        path.append(choice[path[-1]])
    return path[::-1]


def require_same_images(request: Request, ancestor: Ancestor) -> None:
    """Check that the ancestor can be shown the target's images.

    Raises:
        InputError: they have another size, or other channels.
    """
    own, target = ancestor.config, request.target
    if (own.channels, own.image_size) != (target.channels, target.image_size):
        raise InputError(
            f"--variant similarity shows both models the same images, and {request.data.name} has "
            f"{target.channels}x{target.image_size}x{target.image_size}",
            expected=f"the ancestor's {own.channels}x{own.image_size}x{own.image_size}",
            fix="--variant first, which shows none; or leave --data out",
        )


def pseudo_descendant(request: Request) -> tuple[DiT, dict[str, Any]]:
    """Train a model of the target's shape that starts at random; return it with what it cost."""
    model = DiT(request.target)
    model.load_state_dict(fresh_state(request))
    if not request.job.config.tune_steps:
        return model, {}
    return model, tune(request, model).cost


def similarity(request: Request, pseudo: DiT, ancestor: Ancestor) -> Tensor:
    """Return the linear CKA of each layer of the pseudo-descendant with each of the ancestor, (L', L) float64."""
    config, execution, world = request.job.config, request.job.execution, request.job.world
    device = resolve_device(execution.device, world.local_rank)
    data = load(config.data, "train", config.image_size, replace(data_options(config, request.job), flip=False))
    older = DiT(ancestor.config)
    older.load_state_dict(dict(ancestor.state))
    schedule = NoiseSchedule.of(older.config, device)
    fixed = list(
        probes(
            data,
            "init-auto-lg",
            batches=BATCHES,
            batch_size=BATCH_SIZE,
            timesteps=len(schedule),
            seed=config.seed,
            device=device,
        )
    )
    request.job.stop_if_requested()
    features = [
        block_outputs(model.to(device).eval(), fixed, schedule, request.same_labels, config.seed)
        for model in (pseudo, older)
    ]
    return linear_cka(*features)


@torch.no_grad()
def block_outputs(
    model: DiT, fixed: list[Probe], schedule: NoiseSchedule, with_labels: bool, seed: int
) -> list[Tensor]:
    """Return what each block gives on fixed noisy images, (rows, D) a block, with a fixed part of the tokens as rows.

    Args:
        model: On the device of the images.
        fixed: The images, with their noise.
        schedule: The forward process.
        with_labels: Whether the labels are the model's; otherwise it is shown the null class.
        seed: Seed of the choice of tokens, the same for models of equal tokens.
    """
    images, tokens = sum(len(probe.t) for probe in fixed), model.config.tokens
    taken = min(tokens, max(1, ROWS // images))
    places = torch.randperm(tokens, generator=generator_for("init-auto-lg-tokens", seed))[:taken].to(fixed[0].t.device)
    found: list[list[Tensor]] = [[] for _ in model.blocks]

    def keep(index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            found[index].append(output[:, places].flatten(0, 1))  # (B * taken, D)

        return hook

    hooks = [block.register_forward_hook(keep(index)) for index, block in enumerate(model.blocks)]
    try:
        for x0, y, t, noise in fixed:
            labels = y if with_labels else torch.full_like(y, model.config.num_classes)
            model(schedule.add_noise(x0, noise, t), t, labels)
    finally:
        for handle in hooks:
            handle.remove()
    return [torch.cat(parts) for parts in found]
