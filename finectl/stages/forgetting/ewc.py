"""How far fine-tuning moved the weights that the old task needs: sum_i F_i (theta_i - theta_0,i)^2.

F is the diagonal of the empirical Fisher information at theta_0: the mean, over images of the source, timesteps and
noise, of the squared gradient of one image's loss. Gradients are taken image by image, so that none are averaged before
they are squared, and no more than one is in memory.

Reference: Kirkpatrick et al., arXiv 1612.00796, Eq. 3; Diff-Tuning, arXiv 2406.00773, for its use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from finectl.data.dataset import ImageSet
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.random import generator_for
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import ComputationError
from finectl.models.io import load_weights
from finectl.models.parts import block_of
from finectl.stages.forgetting.setting import SOURCE, Setting, unlabelled
from finectl.stages.forgetting.subjects import BANK, FINETUNED, LABEL_TABLES, PRETRAINED
from finectl.training.device import arithmetic

PURPOSE = "forgetting-fisher"
# A UNet lists its middle block after those of its way up.
LAST = ("conv_norm_out", "conv_out")
LATE = ("up_blocks", *LAST)


def ewc(setting: Setting) -> dict[str, Any]:
    """Estimate the Fisher information at theta_0, and weigh the distance of the fine-tuned weights by it.

    Returns:
        `total`, its `mean` over parameters and, by block, the same; `images`, `draws` and what they were of; and the
        rows of label tables that count (`rows`).
    """
    config, subjects = setting.job.config, setting.subjects
    network = setting.network(PRETRAINED, SOURCE)
    data = _source_images(setting, network)
    theta = load_weights(subjects.finetuned, config.weights)
    with (
        setting.job.console.progress(
            "Fisher information", len(data) * config.fisher_draws, unit="gradient"
        ) as progress,
        arithmetic(setting.device, "float32"),
    ):
        found = fisher(
            network,
            data,
            draws=config.fisher_draws,
            seed=config.seed,
            device=setting.device,
            check=setting.check,
            advance=lambda: progress.advance(samples=1),
        )
    theta_0 = {name: value.detach().cpu() for name, value in network.named_parameters()}
    same_labels = subjects.source is not None and all(
        subjects.knows(model, subjects.source) for model in (PRETRAINED, FINETUNED)
    )
    rows = label_rows(theta_0, theta, same_labels=same_labels)
    return {
        **distance(found, theta_0, theta, rows),
        "rows": {name: len(kept) for name, kept in rows.items()},
        "left_out": {
            name: len(theta_0[name]) - len(kept) for name, kept in rows.items() if len(kept) < len(theta_0[name])
        },
        "images": len(data),
        "draws": config.fisher_draws,
        "of": BANK if subjects.bank is not None else "data",
        "source": data.info.name,
    }


def _source_images(setting: Setting, network: Any) -> ImageSet:
    """Return the images of the Fisher information: the bank's, of no class, else training images of the source.

    Args:
        setting: The models and images.
        network: theta_0.
    """
    config, subjects = setting.job.config, setting.subjects
    if subjects.bank is not None:
        images = setting.bank()
        return unlabelled(images.subset(min(config.fisher_images, len(images)), config.seed), network)
    images = setting.images(SOURCE, "train", config.fisher_images)
    known = subjects.source is not None and subjects.knows(PRETRAINED, subjects.source)
    return images if known else unlabelled(images, network)


def draw(data: ImageSet, place: int, number: int, draws: int, seed: int, timesteps: int) -> tuple[int, Tensor, Tensor]:
    """Return timestep, noise and image of one term, a function of the seed, the draw and the image's place alone.

    Args:
        data: The images.
        place: Of the image.
        number: Of the draw; its timesteps are uniform over the number-th of `draws` equal parts, so that all draws
            together are uniform.
        draws: Draws an image.
        seed: Seed of the run.
        timesteps: T.

    Returns:
        The timestep, the noise (1, C, H, W) and the image (1, C, H, W).
    """
    random = generator_for(PURPOSE, seed, number, place)
    t = min(timesteps - 1, int((number + float(torch.rand((), generator=random))) / draws * timesteps))
    noise = torch.randn((1, *data.shape), generator=random)
    sampling = torch.randn(noise.shape, generator=random) if data.sampled else None
    return t, noise, data.transform(data.read(torch.tensor([place])), sampling)


def fisher(
    network: Any,
    data: ImageSet,
    *,
    draws: int,
    seed: int,
    device: torch.device,
    check: Callable[[], None] = lambda: None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Return the mean squared gradient of one image's loss, the bound of a learned variance included.

    Args:
        network: theta_0 on `device`, in evaluation mode.
        data: The images, and the labels that it is given with them.
        draws: Timesteps and noises of each image.
        seed: Their seed.
        device: Where to compute.
        check: Called before each gradient; it ends the work by raising.
        advance: Called after each.

    Returns:
        Parameter name to (shape of the parameter), float64, on the CPU.

    Raises:
        ComputationError: a gradient is not finite.
    """
    schedule = NoiseSchedule.of(network.config, device)
    parameters = dict(network.requires_grad_(True).named_parameters())
    sums = {name: torch.zeros(value.shape, dtype=torch.float64, device=device) for name, value in parameters.items()}
    for number in range(draws):
        for place in range(len(data)):
            check()
            step, noise, image = draw(data, place, number, draws, seed, len(schedule))
            t, y = torch.tensor([step], device=device), data.labels[place : place + 1].to(device)
            loss = denoising_loss(network, schedule, image.to(device), y, t, noise.to(device)).sum()
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    sums[name] += grad.double().square_()
            advance()
    network.requires_grad_(False)
    found = {name: (value / (draws * len(data))).cpu() for name, value in sums.items()}
    for name, value in found.items():
        if not bool(torch.isfinite(value).all()):
            raise ComputationError(
                f"the gradient of the loss with respect to {name} is not finite", fix="--weights raw"
            )
    return found


def label_rows(
    theta_0: Mapping[str, Tensor], theta: Mapping[str, Tensor], *, same_labels: bool
) -> dict[str, list[int]]:
    """Return the rows of label tables that mean the same in both models: all of them, or the null class alone.

    Args:
        theta_0: The pre-trained weights.
        theta: The fine-tuned ones.
        same_labels: Whether a label means the same to both.
    """
    found = {}
    for name in LABEL_TABLES:
        if name in theta_0 and name in theta:
            rows = len(theta_0[name])
            whole = same_labels and theta[name].shape == theta_0[name].shape
            found[name] = list(range(rows)) if whole else [rows - 1]
    return found


def distance(
    found: Mapping[str, Tensor],
    theta_0: Mapping[str, Tensor],
    theta: Mapping[str, Tensor],
    rows: Mapping[str, list[int]],
) -> dict[str, Any]:
    """Return the EWC distance, in total, as the mean over parameters, and by block, from input to output.

    Args:
        found: F, of each parameter of theta_0.
        theta_0: The pre-trained weights.
        theta: The fine-tuned ones, with all of these parameters.
        rows: Of label tables, the rows that are compared; the null class is the last row of either table.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for name, information in found.items():
        weight, before, after = information, theta_0[name].double(), theta[name].double()
        if name in rows:
            ends = rows[name]
            from_end = [row - len(before) for row in ends] if before.shape != after.shape else ends
            weight, before, after = weight[ends], before[ends], after[from_end]
        moved = (after - before).square()
        block = block_of(name)
        sums = blocks.setdefault(block, {"name": block, "total": 0.0, "parameters": 0, "fisher": 0.0, "moved": 0.0})
        sums["total"] += float((weight * moved).sum())
        sums["parameters"] += moved.numel()
        sums["fisher"] += float(weight.sum())
        sums["moved"] += float(moved.sum())
    total, parameters = sum(one["total"] for one in blocks.values()), sum(one["parameters"] for one in blocks.values())
    for one in blocks.values():
        one["mean"] = one["total"] / one["parameters"]
    ordered = sorted(blocks.values(), key=lambda one: one["name"].startswith(LATE) + one["name"].startswith(LAST))
    return {"total": total, "parameters": parameters, "mean": total / parameters, "blocks": ordered}
