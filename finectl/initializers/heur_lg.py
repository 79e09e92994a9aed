"""Heur-LG: three blocks of the ancestor become the target's last three; below them all is DiT's own start.

Embedders and final layer are copied. A target, or an ancestor, of fewer blocks gives fewer; `--set layers=N` takes
another number than three.

- `last`: the ancestor's last blocks, the fixed rule that learngene papers report as a baseline.
- `gradients`: the paper's criterion. The blocks are those in which the share of large gradients changes least over the
  ancestor's training. For each kept checkpoint, and the last weights, it is the share of the entries of the gradient of
  a block's matrices with |g| > tau, averaged over `--set batches=8` fixed batches of 64 of the ancestor's training
  images; a block's score is the mean absolute change of that share from one checkpoint to the next. The blocks of the
  lowest scores keep their order. Checkpoints hold averaged weights only (EMA), so the gradient is taken at those.
  Gradients are computed, no update is made: cost is counted in samples.

Ours: the paper watches convolutions over a sequence of tasks, and an ancestor here was trained on one, so checkpoints
of that one training stand in for tasks. The paper's tau is 5e-10. Entries of a DiT's gradient are far above it, so that
all shares are 1 and no score differs from 0: in a dit-nano of six blocks on digits, kept every 60 of 600 updates, their
medians are 2e-6 to 8e-4. The default, 1e-4, lies among them, with mean shares of 0.23 to 0.63 by block. Other models
have gradients of other sizes; the note on the shares says when another `--set tau=VALUE` is due.

Reference: Wang et al., Learngene: From Open-World to Your Learning Task, AAAI 2022, arXiv 2106.06788.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from finectl.artifacts.store import Artifact
from finectl.data.dataset import ImageSet, load
from finectl.data.sources import DEFAULT_RESIZE_FILTER, DataOptions
from finectl.diffusion.losses import denoising_loss
from finectl.diffusion.schedule import NoiseSchedule
from finectl.errors import InputError
from finectl.initializers.base import Initialized, Request
from finectl.initializers.transfer import copy_layers
from finectl.models.dit import Block, DiT, dense_state_dict
from finectl.models.io import checkpoints, load_weights, read_dit_config
from finectl.models.learngene import dense_config
from finectl.models.presets import LAYER_TYPES, DiTConfig
from finectl.training.device import resolve_device
from finectl.training.probe import probes

BATCH_SIZE = 64
LEAST_CHECKPOINTS = 2
BLIND = 0.01


def initialize(request: Request) -> Initialized:
    """Copy the chosen blocks, the embedders and the final layer.

    Raises:
        UsageError: `--set layers` or `batches` is no whole number.
        InputError: the ancestor is no Diffusion Transformer, or a file is damaged; for `gradients`, it keeps too few
            checkpoints, or its training data is not known or has changed.
        Interrupted: a signal came.
    """
    kept = request.count("layers")
    if request.job.config.variant == "last":
        return copy_layers(request, lambda layers, depth: placement(layers, depth, kept))
    start = time.perf_counter()
    source = cast(Artifact, request.source)
    series = checkpoints_of(source)
    shares = gradient_shares(request, source, series)  # (checkpoints, L)
    scores = changes(shares)
    made = copy_layers(request, lambda layers, depth: on_top(scores, depth, kept))
    report(request, shares, scores, on_top(scores, request.target.depth, kept))
    samples = len(series) * request.count("batches") * BATCH_SIZE
    return replace(made, cost={"steps": 0, "samples": samples, "wall_s": round(time.perf_counter() - start, 3)})


def placement(layers: int, depth: int, kept: int) -> dict[int, int]:
    """Return which layer of the ancestor each filled layer of the target comes from, both counted from 0.

    Args:
        layers: Layers of the ancestor, L.
        depth: Layers of the target, L'.
        kept: Layers to take, from the last.
    """
    return {depth - back: layers - back for back in range(min(kept, layers, depth), 0, -1)}


def on_top(scores: Sequence[float], depth: int, kept: int) -> dict[int, int]:
    """Return `placement` for the layers of the lowest scores, in order, at the top; of equal ones the first.

    Args:
        scores: One for each layer of the ancestor.
        depth: Layers of the target, L'.
        kept: Layers to take.
    """
    lowest = sorted(range(len(scores)), key=lambda layer: scores[layer])[: min(kept, depth)]
    return {depth - len(lowest) + index: layer for index, layer in enumerate(sorted(lowest))}


def changes(shares: Tensor) -> list[float]:
    """Return each layer's mean absolute change of its share, (checkpoints, L) to L numbers.

    Reference: arXiv 2106.06788, its choice of layers by the change of their gradients.
    """
    found: list[float] = shares.diff(dim=0).abs().mean(0).tolist()
    return found


def checkpoints_of(source: Artifact) -> list[int | None]:
    """Return the updates whose averaged weights an ancestor keeps, and None for its last weights.

    Raises:
        InputError: it keeps fewer than two.
    """
    kept = checkpoints(source)
    if len(kept) < LEAST_CHECKPOINTS:
        trained = source.manifest.stage in ("train", "condense")
        again = " ".join(source.manifest.command) if trained else f"finectl train {source.path}"
        raise InputError(
            f"--variant gradients compares checkpoints, and {source.path} keeps {len(kept)}",
            expected=f"a model that was trained with --keep-every, with at least {LEAST_CHECKPOINTS} checkpoints",
            fix=f"{again} --keep-every N",
        )
    return [*kept, None]


def gradient_shares(request: Request, source: Artifact, series: Sequence[int | None]) -> Tensor:
    """Return the share of large entries of each block's gradient at each checkpoint, (checkpoints, L) float64."""
    execution, world = request.job.execution, request.job.world
    device = resolve_device(execution.device, world.local_rank)
    data = training_data(request, source)
    config = read_dit_config(source)
    model = DiT(dense_config(config, config.depth)).to(device).eval()
    rows = []
    with request.job.console.progress("gradients", len(series), unit="checkpoint") as progress:
        for checkpoint in series:
            model.load_state_dict(dense_weights(source, config, checkpoint))
            rows.append(shares_of(request, model, data, device))
            progress.advance()
    return torch.stack(rows)


def dense_weights(source: Artifact, config: DiTConfig, checkpoint: int | None) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint; those of a condensed model written out."""
    state = load_weights(source, "ema", checkpoint)
    return state if config.factorized is None else dense_state_dict(state, config)


def shares_of(request: Request, model: DiT, data: ImageSet, device: torch.device) -> Tensor:
    """Return the share of large entries of each block's gradient, averaged over the fixed batches, (L,) float64."""
    batches, tau = request.count("batches"), request.constants["tau"]
    schedule = NoiseSchedule.of(model.config, device)
    found = torch.zeros(model.config.depth, dtype=torch.float64)
    fixed = probes(
        data,
        "init-heur-lg",
        batches=batches,
        batch_size=BATCH_SIZE,
        timesteps=len(schedule),
        seed=request.job.config.seed,
        device=device,
    )
    for x0, y, t, noise in fixed:
        request.job.stop_if_requested()
        model.zero_grad(set_to_none=True)
        denoising_loss(model, schedule, x0, y, t, noise).mean().backward()
        found += torch.tensor([large_share(cast(Block, block), tau) for block in model.blocks], dtype=torch.float64)
    return found / batches


def large_share(block: Block, tau: float) -> float:
    """Return the share of entries with |g| > tau in the gradients of a block's matrices.

    Reference: arXiv 2106.06788, its count of gradients above a threshold.
    """
    gradients = [cast(Tensor, block.get_submodule(path).weight.grad) for path in LAYER_TYPES.values()]
    large = sum(int((gradient.abs() > tau).sum()) for gradient in gradients)
    return large / sum(gradient.numel() for gradient in gradients)


def training_data(request: Request, source: Artifact) -> ImageSet:
    """Return the images that the ancestor was trained on.

    Raises:
        InputError: its manifest does not name them, they are gone, or they are not the same any more.
    """
    recorded, config = source.manifest.data, source.manifest.config
    if not recorded:
        raise InputError(
            f"{source.path} does not say what it was trained on",
            expected="a model whose training data is known, for its gradients",
            fix=f"finectl train {source.path} --keep-every N",
        )
    options = DataOptions(
        resize_filter=config.get("resize_filter") or DEFAULT_RESIZE_FILTER,
        skip_bad=bool(config.get("skip_bad")),
        console=request.job.console,
        check=request.job.stop_if_requested,
    )
    data = load(recorded["name"], "train", read_dit_config(source).image_size, options)
    if data.info.fingerprint != recorded["fingerprint"]:
        raise InputError(
            f"{recorded['name']} is not what {source.path} was trained on: its fingerprint is {data.info.fingerprint}",
            expected=f"{recorded['fingerprint']}, as the manifest says",
            fix=f"train it anew: finectl train {source.path} --keep-every N",
        )
    return data


def report(request: Request, shares: Tensor, scores: Sequence[float], chosen: dict[int, int]) -> None:
    """Say how the shares changed and what was chosen, and when tau tells no layers apart."""
    console, tau = request.job.console, request.constants["tau"]
    change, taken = (
        ", ".join(words) for words in (map("{:.4f}".format, scores), (str(n + 1) for n in chosen.values()))
    )
    console.note(
        f"shares of gradients above {tau:g}: {shares.min():.3f} to {shares.max():.3f}; mean change by layer {change}; "
        f"layers {taken} are taken"
    )
    if float(shares.min()) > 1 - BLIND or float(shares.max()) < BLIND:
        console.note(
            f"tau={tau:g} is far from all gradients and hardly tells layers apart: try another --set tau=VALUE"
        )
