"""The few updates that some methods make before their weights are written out: data, settings and learning rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from finectl.data.captions import NONE
from finectl.data.dataset import load
from finectl.diffusion.losses import Denoiser
from finectl.initializers.base import Request
from finectl.models.dit import DiT
from finectl.models.presets import DiTConfig
from finectl.training.loop import Trained, fit
from finectl.training.run import Loss, plain_loss
from finectl.training.settings import PAPER, SMALL, TrainSettings, data_options

BLOCKS = "blocks."
WIDTH_POWER = 1.5
"""How the usual rate falls with the width that a model gains."""


def tune(
    request: Request,
    model: DiT,
    *,
    block_lr: float | None = None,
    loss: Loss = plain_loss,
    source: DiTConfig | None = None,
    heldout: Callable[[Denoiser], float] | None = None,
    keep_at: str | None = None,
) -> Trained:
    """Tune what is trainable for `--tune-steps` updates, on `--tune-samples` images of the target's training data.

    Args:
        request: What is to be made.
        model: The target, or what its weights are made of.
        block_lr: Rate of the blocks' parameters, where they are not weights; all others keep the usual rate. Rates fall
            to 0 along a cosine.
        loss: Each image's loss.
        source: What the model's channels were taken from or repeated of; it decides the usual rate (`width_factor`).
        heldout: The held-out loss of a model, logged at both ends.
        keep_at: Updates whose weights are kept beside the last ones, as `--keep-at` names them.

    Raises:
        ComputationError: the loss is not finite.
        Interrupted: a signal came; the state is saved.
    """
    config = request.job.config
    # A text encoder, where there is one, is of the generator of sigma: these models take classes.
    options = replace(data_options(config, request.job), captions=NONE)
    data = load(config.data, "train", config.image_size, options)
    if config.tune_samples < len(data):
        data = data.subset(config.tune_samples, config.seed)
    usual = (SMALL if request.data.bundled else PAPER)["lr"] * width_factor(source, request.target)
    settings = TrainSettings(
        steps=config.tune_steps,
        batch_size=config.batch_size,
        lr=usual,
        lr_schedule="cosine",
        warmup_steps=0,
        weight_decay=0.0,
        ema=0.0,
        eval_every=config.tune_steps if heldout is not None else 0,
        seed=config.seed,
        keep_at=keep_at,
    )
    groups: list[dict[str, Any]] | None = None
    if block_lr is not None:
        named = list(model.named_parameters())
        groups = [
            {"params": [parameter for name, parameter in named if name.startswith(BLOCKS)], "lr": block_lr},
            {"params": [parameter for name, parameter in named if not name.startswith(BLOCKS)], "lr": usual},
        ]
    return fit(request.job, model, data, settings, groups=groups, heldout=heldout, loss=loss, shardable=False)


def width_factor(source: DiTConfig | None, target: DiTConfig) -> float:
    """Return what the usual rate of weights is multiplied by in a model that was made wider by repeating channels.

    Copies of a channel get like gradients and move together, while their columns are divided among them: at the usual
    rate a few updates undo the start. (m / m')^1.5 is measured, on digits, six times as wide (dit-nano to dit-s, 4
    layers, pruned-kd, batches of 32): from a held-out loss of 0.136, 20 updates lead to 0.36 at the usual rate, to 0.18
    at m / m' of it, to 0.13 at a half of that and below. FINE's learned maps do well with it, too: from 0.134 to 0.126
    where the usual rate gives 0.137. Sigma, scalers and biases, at `block_lr`, need no other rate.

    Args:
        source: What was widened; None for a model that was not, or whose channels are no copies.
        target: The model.
    """
    return min(1.0, source.width / target.width) ** WIDTH_POWER if source is not None else 1.0
