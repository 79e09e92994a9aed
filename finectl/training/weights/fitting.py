"""What training a weight generator needs beside the training loop: codec, texts, network, and the choice at its end.

Only training concepts decide mean, scale and basis; validation concepts decide the timestep t* of the one step and the
checkpoint that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from finectl.artifacts.files import read_json_object, write_json
from finectl.artifacts.job import Job
from finectl.artifacts.tensors import load_tensors, save_tensors
from finectl.diffusion.losses import Denoiser
from finectl.diffusion.schedule import NoiseSchedule
from finectl.models.weights.basis import Basis
from finectl.models.weights.config import coefficients_of
from finectl.models.weights.layout import Layout
from finectl.models.weights.normalise import Normaliser
from finectl.models.weights.unet import WeightUNet, pool
from finectl.training.weights.blocks import LabelledBlocks, Texts
from finectl.training.weights.collection import Collection
from finectl.training.weights.generate import Codec, Sampling, draw_values
from finectl.training.weights.starts import RIDGES, USUAL_RIDGE, ridge

CHOSEN = "chosen"


def fit_codec(layout: Layout, initial: Tensor, train: Tensor, basis: str) -> Codec:
    """Measure mean, scales and components of training weights.

    Args:
        layout: Of the blocks.
        initial: (N, b), the packed shared start.
        train: (C, K, N, b), packed training LoRAs.
        basis: `none` or `pcaN`.
    """
    every = train.flatten(0, 1)
    normaliser = Normaliser.fit(layout, every, initial)
    count = coefficients_of(basis)
    return Codec(layout, normaliser, None if count is None else Basis.fit(normaliser.normalise(every), count))


@dataclass(frozen=True, eq=False)
class Judge:
    """Tells how much of some concepts' weights one step explains.

    Args:
        codec: Between weights and what the network sees.
        schedule: The forward process, on the device of the work.
        rows: The rows of the concepts' prompts.
        wanted: (C, N, b), normalised, on the CPU.
        seed: Of the noise.
    """

    codec: Codec
    schedule: NoiseSchedule
    rows: Sequence[int]
    wanted: Tensor
    seed: int = 0

    def predicted(self, denoiser: Denoiser, t: int) -> Tensor:
        """Return the normalised weights of all concepts, (C, N, b), on the CPU.

        Args:
            denoiser: Of (x_t (M, 1, 1, L), t, y), as `LabelledBlocks`.
            t: The timestep.
        """
        blocks, found = self.codec.layout.blocks, []
        for row in self.rows:

            def predict(x: Tensor, times: Tensor, n: Tensor, row: int = row) -> Tensor:
                return denoiser(x[:, None], times, row * blocks + n)[:, 0]

            found.append(draw_values(predict, blocks, self.schedule, Sampling(t, seed=self.seed), self.codec.length))
        values = torch.stack(found).cpu()
        return values * self.codec.mask if self.codec.basis is None else self.codec.basis.expand(values)

    def score(self, denoiser: Denoiser, t: int) -> float:
        """Return R^2: 1 - |z_hat - z|^2 / |z|^2 over all concepts."""
        error = (self.predicted(denoiser, t) - self.wanted).double().square().sum()
        return float(1 - error / self.wanted.double().square().sum().clamp(min=1e-30))


def with_weights(model: LabelledBlocks, state: Mapping[str, Tensor]) -> Denoiser:
    """Return a model as a denoiser with other weights, such as those of a checkpoint."""
    device = model.tokens.device
    moved = {name: value.to(device) for name, value in state.items()}

    def denoiser(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, moved, (x, t, y))
        return output

    return denoiser


def set_linear_path_(
    network: WeightUNet, texts: Texts, codec: Codec, train: Collection, val: Collection | None
) -> dict[str, Any]:
    """Set the network's linear path to a ridge regression of the training weights on their texts, and hold it there.

    The rest of the network learns what the regression leaves. Where the path goes on learning, the noise of its
    gradients spoils it sooner than it gains: R^2 of validation concepts fell from 0.741 to 0.732 in 120 updates on a
    synthetic linear task, and of training concepts with it.

    Args:
        network: With a linear path, its texts centred.
        texts: All of them.
        codec: Of the weights.
        train: The concepts that it is fitted on, with all their texts.
        val: The concepts that choose the regulariser; None takes the usual one.

    Returns:
        `regulariser`, and R^2 of the validation concepts.
    """
    features = (pool(texts.tokens, texts.mask) - network.text_mean) / network.text_unit  # (V, E)
    values = codec.encode(train.means)  # (C, N, L)
    most = max(len(rows) for rows in train.texts_of)
    places = torch.tensor([[rows[index % len(rows)] for index in range(most)] for rows in train.texts_of])
    solved = partial(ridge, features[places], values.flatten(1).double())  # (E, N L) of a regulariser
    chosen, r2 = USUAL_RIDGE, None
    if val is not None:
        wanted = codec.encode(val.means).flatten(1).double()
        given = features[list(val.prompts)].double()
        errors = {one: float((given @ solved(one) - wanted).square().sum()) for one in RIDGES}
        chosen = min(RIDGES, key=lambda one: errors[one])
        r2 = 1 - errors[chosen] / float(wanted.square().sum())
    shape = (network.config.text_width, network.config.blocks, network.config.length)
    network.set_linear_(solved(chosen).float().reshape(shape))
    for path in (network.linear_in, network.linear_out):
        if path is not None:
            path.requires_grad_(False)
    return {"regulariser": chosen, "r2_of_coefficients": r2}


class Scored(Protocol):
    """What chooses a checkpoint: a judge of weights, or of the images that they make."""

    def score(self, denoiser: Denoiser, t: int) -> float:
        """Return how much of what the mean weights lack is there: 1 is all, 0 what the mean itself has."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The averaged weights that are kept.

    Args:
        state: Name -> weight.
        update: Their update.
        t_star: The timestep of the one step.
        table: Update -> timestep -> score of the validation concepts, of all that were tried.
    """

    state: Mapping[str, Tensor]
    update: int
    t_star: int
    table: Mapping[Any, Mapping[Any, float]]


def choose(
    job: Job[Any],
    model: LabelledBlocks,
    states: Mapping[int, Callable[[], Mapping[str, Tensor]]],
    judge: Scored,
    times: Sequence[int],
) -> Choice:
    """Choose the checkpoint and the timestep with the highest score on validation concepts; of equal ones the earliest.

    The choice is kept in the job's state: a run that is killed while checkpoints are removed would else choose among
    those that are left.

    Args:
        job: The run.
        model: The network, on its device.
        states: Update -> how its averaged weights are read.
        judge: Of the validation concepts.
        times: Timesteps to try.
    """
    kept, said = job.state / f"{CHOSEN}.safetensors", job.state / f"{CHOSEN}.json"
    if not kept.exists():
        table: dict[int, dict[int, float]] = {}
        for update in sorted(states):
            denoiser = with_weights(model, states[update]())
            table[update] = {}
            for t in times:
                job.stop_if_requested(_nothing_to_save)
                table[update][t] = judge.score(denoiser, t)
        update, t_star = max(((u, t) for u in table for t in times), key=lambda place: table[place[0]][place[1]])
        write_json(said, {"update": update, "t_star": t_star, "table": table})
        save_tensors(kept, states[update]())
    found = read_json_object(said)
    return Choice(load_tensors(kept), int(found["update"]), int(found["t_star"]), found["table"])


def _nothing_to_save() -> None:
    """The state of the last update is saved already."""
