"""Trains the `digits` extractor and writes its weights: `python -m finectl.metrics.features.train_digits [--out FILE]`.

Only the digits' training split is used; the held-out split gives the accuracy that is written into the file.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from finectl.data.dataset import ImageSet, load
from finectl.data.order import batch_indices
from finectl.errors import FinectlError, OutputError, UsageError
from finectl.metrics.accuracy import class_accuracy
from finectl.metrics.features.digits import METADATA_KEY, WEIGHTS
from finectl.metrics.features.digits_network import DigitsNet

BATCH_SIZE = 128
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
EMA_DECAY = 0.998
DROPOUT = 0.2
WARMUP_STEPS = 100
LARGEST_SHIFT = 1  # pixels
LARGEST_ANGLE = math.radians(10)
LARGEST_SCALING = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure, write the file, and say so on stderr.

    Args:
        arguments: Command line without the program's name; None for the process's own.

    Returns:
        Exit code: 0, or that of the error.
    """
    parser = argparse.ArgumentParser(prog="python -m finectl.metrics.features.train_digits", description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write (default: the one in the package)")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser updates (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads changes the last bits, and so the file's digest
    try:
        train_set, heldout_set = load("digits", "train"), load("digits", "heldout")
        net = train(train_set, steps=options.steps, seed=options.seed)
        accuracy = write(net, options.out, train_set, heldout_set, steps=options.steps, seed=options.seed)
    except FinectlError as error:
        sys.stderr.write(f"{error.what}; expected {error.expected}. {error.fix}\n")
        return error.exit_code
    finally:
        torch.set_num_threads(threads)
    sys.stderr.write(
        f"{options.out}: {accuracy:.4f} of the {len(heldout_set)} held-out digits are classified rightly\n"
    )
    return 0


def train(data: ImageSet, *, steps: int, seed: int) -> DigitsNet:
    """Train the classifier.

    Args:
        data: The digits' training split.
        steps: Optimiser updates.
        seed: Seed of initialisation, order, augmentation and dropout.

    Returns:
        The exponential moving average of the network's weights.

    Raises:
        UsageError: `steps` is below 1.
    """
    if steps < 1:
        raise UsageError(f"{steps} steps", expected="at least 1 step")
    net = DigitsNet()
    _initialize(net, torch.Generator().manual_seed(seed))
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        generator = torch.Generator().manual_seed((seed << 32) + step + 1)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        chosen = batch_indices(len(data), BATCH_SIZE, step, seed)
        features = net.features(augment(data.images[chosen], generator))
        kept = torch.rand(features.shape, generator=generator) >= DROPOUT
        logits = net.classifier(features * kept / (1 - DROPOUT))
        loss = functional.cross_entropy(logits, data.labels[chosen], label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        # A short memory at first, so that the average forgets the initial weights.
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), net.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
    return average


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, turn and scale each image a little; what comes in from outside is background.

    Args:
        images: float32 (B, 1, 8, 8) in [-1, 1].
        generator: Source of all random numbers.

    Returns:
        Images of the same shape and range.
    """
    count, size = images.shape[0], images.shape[-1]
    draws = torch.rand(count, 4, generator=generator) * 2 - 1  # (B, 4) in [-1, 1)
    angle, scale = draws[:, 0] * LARGEST_ANGLE, 1 + draws[:, 1] * LARGEST_SCALING
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = draws[:, 2:] * (2 * LARGEST_SHIFT / size)  # grid_sample's coordinates span 2 over the image
    transform = torch.stack([cosine, -sine, shift[:, 0], sine, cosine, shift[:, 1]], dim=1).reshape(count, 2, 3)
    grid = functional.affine_grid(transform, list(images.shape), align_corners=False)
    # Zeros come in from outside, so the background is moved to 0 and back.
    return functional.grid_sample(images + 1, grid, padding_mode="zeros", align_corners=False) - 1


def write(net: DigitsNet, out: Path, train_set: ImageSet, heldout_set: ImageSet, *, steps: int, seed: int) -> float:
    """Write weights with their provenance.

    Args:
        net: The trained network.
        out: File to write; missing folders are made.
        train_set: What it was trained on.
        heldout_set: What it is measured on.
        steps: Optimiser updates made.
        seed: Seed used.

    Returns:
        Held-out accuracy, 0..1.

    Raises:
        OutputError: the file cannot be written.
    """
    with torch.inference_mode():
        accuracy = class_accuracy(net(heldout_set.images)[1], heldout_set.labels)
    metadata = {
        "accuracy": accuracy.value,
        "heldout_count": accuracy.details["n"],
        "train_count": len(train_set),
        "data": train_set.info.name,
        "data_fingerprint": train_set.info.fingerprint,
        "seed": seed,
        "steps": steps,
        "command": f"python -m finectl.metrics.features.train_digits --steps {steps} --seed {seed}",
    }
    # One metadata entry: safetensors writes several in an order that changes from run to run, and so would the digest.
    header = {METADATA_KEY: json.dumps(metadata, sort_keys=True)}
    content = save({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, header)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}", expected="the path of a file") from error
    return accuracy.value


def _initialize(net: DigitsNet, generator: torch.Generator) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _learning_rate(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


if __name__ == "__main__":
    sys.exit(main())
