"""What training a model takes: parameters, memory of a device, disk, and the time of a step measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import Execution
from finectl.models.io import ModelConfig, total_parameters
from finectl.models.presets import FREQUENCIES, DiTConfig
from finectl.models.unet_config import is_text_model
from finectl.training.settings import PAPER, TrainSettings
from finectl.world import World

if TYPE_CHECKING:
    from finectl.training.run import Run

BYTES = 4
COPIES = 5
"""Weights, gradients, two moments and the moving average, all in float32."""
ARTIFACT_COPIES, STATE_COPIES = 2, 4
SAVED_COPIES = ARTIFACT_COPIES + STATE_COPIES
"""Raw and averaged weights of the artifact; the same and two moments in the resume state."""
MEASURED_IMAGES = {"cpu": (1, 3), "cuda": (8, 32)}


def training_estimate(
    config: ModelConfig,
    settings: TrainSettings,
    execution: Execution | None = None,
    *,
    teacher: ModelConfig | None = None,
    trained: int | None = None,
) -> dict[str, Any]:
    """Estimate what training a model takes, for `--dry-run`, without torch.

    Memory counts weights, gradients, two moments and the moving average in float32, and the activations that the
    backward pass needs: about 20 of the model's width for each token and layer of a DiT. Disk counts raw and averaged
    weights, the averages that are kept of earlier updates, and the resume state.

    Args:
        config: The architecture.
        settings: The training.
        execution: How it will run; of it, processes, parts and checkpointing count.
        teacher: The frozen model that is computed beside it, if any.
        trained: Parameters that are not frozen; all by default. Frozen ones are held once.
    """
    execution = execution or Execution()
    world = World.from_environment()
    parameters = total_parameters(config)
    trained = parameters if trained is None else trained
    held = BYTES * (parameters + (COPIES - 1) * trained) // (world.size if execution.fsdp else 1)
    estimate = {"parameters": parameters, "processes": world.size, "steps": settings.steps}
    images = -(-settings.batch_size // (world.size * execution.accumulate))
    if isinstance(config, DiTConfig):
        narrow = execution.dtype == "bfloat16"
        image = activation_bytes(config, narrow, checkpointed=execution.grad_checkpointing)
    else:
        image = BYTES * config.activations
    taught = BYTES * total_parameters(teacher) if teacher else 0
    memory = held + taught + images * image
    return {
        **estimate,
        "memory_bytes": memory,
        "memory_per": "device" if world.size > 1 else "process",
        "disk_bytes": BYTES * ((ARTIFACT_COPIES + settings.kept) * parameters + STATE_COPIES * trained),
    }


def activation_bytes(config: DiTConfig, narrow: bool, *, checkpointed: bool) -> int:
    """Return the bytes that the backward pass keeps of one image.

    A block keeps about 20 activations of the model's width a token; under bfloat16 autocast the inputs and outputs of
    matrix products take half, the residual stream and its norms do not. A projection keeps its input. Checkpointing
    keeps a block's input, and all of the one block that is being computed again.
    """
    one = config.tokens * config.width
    block = 20 * one * (3 if narrow else 4) + (one * BYTES if config.places else 0)
    return config.depth * one * BYTES + block if checkpointed else config.depth * block


def forward_flops(config: DiTConfig) -> int:
    """Return the floating-point operations of one image's forward pass in a dense DiT.

    Counted are its matrix products, a multiplication and an addition each; norms, activations and sums are not.
    `finectl.training.flops` counts factorised models, where the way decides, and other networks.
    """
    d, tokens = config.width, config.tokens
    linear = (4 + 2 * config.mlp_ratio) * d * d * tokens
    attention = 2 * tokens * tokens * d
    block = linear + attention + 6 * d * d + _extra_operations(config)
    patch = config.patch_size**2
    ends = tokens * d * patch * (config.channels + config.out_channels) + 3 * d * d + FREQUENCIES * d
    projections = sum(place.channels**2 * place.positions for place in config.places)
    return 2 * (config.depth * block + ends + projections)


def _extra_operations(config: DiTConfig) -> int:
    """Return the multiplications of a block's bottleneck, and those that its prompts add to its attention."""
    d, tokens, extras = config.width, config.tokens, config.extras
    return 2 * d * extras.bottleneck * tokens + extras.prompts * (3 * d * d + 2 * tokens * d)


def measure_training(
    config: ModelConfig,
    settings: TrainSettings,
    execution: Execution,
    *,
    teacher: ModelConfig | None = None,
    adapt: Callable[[Any], Any] | None = None,
    trained: int | None = None,
) -> dict[str, Any]:
    """Time a training step of this model on the device at hand, for `--dry-run`; with a teacher, that of both.

    Two small batches are computed, and the time is drawn out to the share of one process; reading data, saving and
    measuring come on top.

    Args:
        config: The architecture.
        settings: The training.
        execution: How it will run.
        teacher: As of `training_estimate`, and so `trained`.
        adapt: What is done with the model before it is trained, such as freezing most of it.

    Returns:
        The estimate for this execution, seconds of a step and of all steps, and what was measured.
    """
    from finectl.models.io import build_model
    from finectl.training.batches import Batches
    from finectl.training.consistency import Consistency
    from finectl.training.device import resolve_device
    from finectl.training.run import train_step

    device = resolve_device(execution.device)
    share = -(-settings.batch_size // World.from_environment().size)
    few, more = MEASURED_IMAGES.get(device.type, MEASURED_IMAGES["cpu"])
    run = trial_run(config, execution, more, adapt)
    if teacher is not None:
        run.loss = Consistency(_with_trial_texts(build_model(teacher)).to(device))
    seconds = {}
    for images in (few, few, more):  # the first one warms up
        run.batches = Batches(run.batches.data, images, 0, device, World())
        run.settings = replace(run.settings, batch_size=images)
        start_s = time.perf_counter()
        float(train_step(run, 0))  # reading the loss waits for the device
        seconds[images] = time.perf_counter() - start_s
    # What an image costs, and what a step costs beside its images: optimiser and average.
    image_s = max(seconds[more] - seconds[few], 0.0) / (more - few)
    step_s = max(seconds[more] + image_s * (share - more), seconds[few])
    arithmetic = "bfloat16" if run.arithmetic.autocast else "float32"
    return {
        **training_estimate(run.model.config, settings, execution, teacher=teacher, trained=trained),
        "step_s": round(step_s, 4),
        "training_s": round(step_s * settings.steps),
        "measured": f"steps of {few} and {more} images in {arithmetic} on {device}",
    }


def trial_run(config: ModelConfig, execution: Execution, images: int, adapt: Callable[[Any], Any] | None = None) -> Run:
    """Return a run on a batch of random images in memory, whose steps are those of training.

    Args:
        config: The architecture.
        execution: Device, arithmetic, compilation and checkpointing.
        images: Images of a batch.
        adapt: As of `measure_training`.
    """
    import torch

    from finectl.data.dataset import ImageSet
    from finectl.data.sources import DataInfo
    from finectl.diffusion.random import generator_for
    from finectl.diffusion.schedule import NoiseSchedule
    from finectl.models.dit import DiT, initialize_
    from finectl.models.io import build_model
    from finectl.training.batches import Batches
    from finectl.training.device import Arithmetic, resolve_device
    from finectl.training.memory import checkpoint_activations
    from finectl.training.run import Run
    from finectl.training.step import Ema, make_optimizer

    device = resolve_device(execution.device)
    random = generator_for("trial", 0)
    classes = max(config.num_classes, 1)
    info = DataInfo("trial", "", images, images, 0, config.image_size, config.channels, classes, (), False)
    x0 = torch.randn(images, config.channels, config.image_size, config.image_size, generator=random)
    data = ImageSet.in_memory(info, "train", x0, torch.randint(classes, (images,), generator=random))
    model = _with_trial_texts(build_model(config))
    if isinstance(model, DiT):
        initialize_(model, random)
    if adapt is not None:
        model = adapt(model)
    model.to(device).train()
    if execution.grad_checkpointing:
        checkpoint_activations(model)
    if execution.compile:
        model.compile()
    settings = TrainSettings(
        steps=1,
        batch_size=images,
        lr=PAPER["lr"],
        lr_schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        ema=PAPER["ema"],
        eval_every=0,
        seed=0,
    )
    return Run(
        model=model,
        forward=model,
        batches=Batches(data, images, 0, device, World()),
        settings=settings,
        schedule=NoiseSchedule.of(config, device),
        optimizer=make_optimizer(model.parameters(), settings.lr),
        ema=Ema(model.named_parameters(), settings.ema),
        arithmetic=Arithmetic.of(device, execution.dtype),
    )


def _with_trial_texts(model: Any) -> Any:
    """Give a model of text a random table, whose first row is the one that the trial's labels name."""
    if is_text_model(model.config):
        from finectl.models.unet import condition
        from finectl.training.flops import TEXT_LENGTH
        from finectl.training.texts import TrialTexts

        condition(model, TrialTexts(2, TEXT_LENGTH, model.config.network["cross_attention_dim"]), 0.0)
    return model
