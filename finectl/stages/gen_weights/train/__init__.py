"""Train: a diffusion model of the LoRAs' blocks, told by a text which concept is meant.

Blocks are the items of the one training loop. Mean, scale and basis come from the training concepts; the validation
concepts choose the checkpoint and the timestep t* of the one denoising step.

Reference: Gong et al., Efficient Training with Denoised Neural Weights, arXiv 2407.11966, sections 4.2 and 4.3.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from finectl.adapters.weight_dataset import KIND
from finectl.artifacts.files import write_json
from finectl.artifacts.job import Job, Outcome, Reads, Stage
from finectl.artifacts.tensors import load_tensors
from finectl.data.concepts import words
from finectl.stages.gen_weights.train.config import Config, network_of, plan, settings_of, text_of
from finectl.training.weights.files import TRAIN, VAL, concepts_of
from finectl.training.weights.targets import Target, target

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from finectl.models.weights.unet import WeightUNet
    from finectl.training.run import Loss
    from finectl.training.weights.blocks import BlockLoss, LabelledBlocks
    from finectl.training.weights.collection import Collection
    from finectl.training.weights.fitting import Choice, Judge, Scored
    from finectl.training.weights.generate import Codec

CHECKPOINTS = "checkpoints"
METRICS = "metrics.json"
TIMES, IMAGE_TIMES = 7, 3
UNSWEPT = {"epsilon": 500, "v": 800, "x0": 800}
"""t* where no concept is there to choose it by."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What training reads, before its first step.

    Args:
        target: The collection.
        splits: The weights of every split.
        text: The record of the text encoder.
        codec: Between weights and what the network sees.
        network: With its first weights.
        model: The same as a denoiser of labelled blocks.
        linear: How the linear path was started.
    """

    target: Target
    splits: Mapping[str, Collection]
    text: dict[str, Any]
    codec: Codec
    network: WeightUNet
    model: LabelledBlocks
    linear: dict[str, Any]


def prepare(config: Config, found: Target, device: torch.device) -> Setting:
    """Read weights and texts, measure mean, scale and basis, and make the network."""
    from finectl.models.text import load_text
    from finectl.models.weights.unet import initialise_, pool
    from finectl.training.weights.blocks import LabelledBlocks, Texts
    from finectl.training.weights.collection import read_collections
    from finectl.training.weights.fitting import set_linear_path_

    dataset, layout = found.dataset, found.layout
    text = text_of(config, dataset)
    splits, written = read_collections(dataset, layout)
    texts = Texts.of(*load_text(text, device).encode(written)).to("cpu")
    train = splits[TRAIN]
    codec = found.fit_codec(layout.pack(dataset.initial), train.blocks, config.basis)
    network = found.network(network_of(config, found.network_blocks, int(text["width"])))
    initialise_(network, config.seed)
    rows = [row for concept in train.texts_of for row in concept]
    network.centre_texts_(pool(texts.tokens[rows], texts.mask[rows]))
    linear = {}
    if config.linear_start == "ridge":
        linear = set_linear_path_(network, texts, found.linear_codec(codec), train, splits.get(VAL))
    return Setting(found, splits, text, codec, network, LabelledBlocks(network, texts), linear)


def run(job: Job[Config]) -> Outcome:
    """Train the network, choose checkpoint and timestep, and measure what one step explains."""
    from finectl.diffusion.schedule import NoiseSchedule
    from finectl.training.device import resolve_device
    from finectl.training.loop import fit
    from finectl.training.timesteps import RangeTimesteps
    from finectl.training.weights.blocks import BlockLoss, block_set
    from finectl.training.weights.fitting import Judge

    config = job.config
    device = resolve_device(job.execution.device, job.world.local_rank)
    setting = prepare(config, target(job.parents[0], config.rule, config.block_size), device)
    codec, train = setting.codec, setting.splits[TRAIN]
    moved, schedule = codec.to(device), NoiseSchedule.of(setting.network.config, device)
    judges = {
        split: Judge(codec, schedule, found.prompts, codec.normaliser.normalise(found.means))
        for split, found in setting.splits.items()
    }
    blocks = BlockLoss(moved.mask, moved.normaliser.scale if config.loss == "decoded" else None, moved.basis)
    loss: Loss = blocks
    held: Scored | None = judges.get(VAL)
    if config.image_weight:
        loss, held = with_images(config, setting, blocks, judges.get(VAL), moved, device)
    times = _times(config)
    start = {name: value.detach().clone() for name, value in setting.model.named_parameters()}
    trained = fit(
        job,
        setting.model,
        block_set(codec.encode(train.blocks), train.texts_of, job.parents[0].manifest.digest),
        settings_of(config),
        heldout=(lambda denoiser: 1 - held.score(denoiser, times[len(times) // 2])) if held else None,
        loss=loss,
        timesteps=RangeTimesteps(config.t_min, config.t_max, 0.0),
    )
    if not job.world.leads:
        return Outcome()
    choice = _choose(job, setting.model, start, trained.ema, held, times)
    _save(job, setting, choice, trained.state)
    found = _measure(setting, choice, judges)
    write_json(job.directory / METRICS, {"sweep": choice.table, "linear_start": setting.linear, **found})
    if (job.directory / CHECKPOINTS).is_dir():
        shutil.rmtree(job.directory / CHECKPOINTS)
    r2 = {split: values["r2"] for split, values in found.items()}
    job.console.note(
        f"t* {choice.t_star}, update {choice.update}; R^2 " + ", ".join(f"{k} {v:.3f}" for k, v in r2.items())
    )
    metrics = {"t_star": choice.t_star, "update": choice.update, "r2": r2, "linear_start": setting.linear}
    metrics["distances"] = {split: values["distances"] for split, values in found.items()}
    return Outcome(metrics=metrics, cost=trained.cost)


def _choose(
    job: Job[Config],
    model: LabelledBlocks,
    start: Mapping[str, Tensor],
    last: Mapping[str, Tensor],
    judge: Scored | None,
    times: Sequence[int],
) -> Choice:
    """Choose averaged weights and t*: without validation concepts the last ones and a usual timestep."""
    from finectl.training.weights.fitting import Choice, choose

    config = job.config
    if judge is None:
        return Choice(last, config.steps, UNSWEPT[config.prediction] if config.t_star is None else config.t_star, {})
    states: dict[int, Callable[[], Mapping[str, Tensor]]] = {config.steps: partial(dict, last)}
    if config.select == "best":
        for path in (job.directory / CHECKPOINTS).glob("*.safetensors"):
            states[int(path.stem)] = partial(load_tensors, path)
        states[0] = partial(dict, start)  # a ridge start that training only spoils is kept
    return choose(job, model, states, judge, times)


def _save(job: Job[Config], setting: Setting, choice: Choice, raw: Mapping[str, Tensor]) -> None:
    """Write the generator."""
    concepts = concepts_of(setting.target.dataset.concepts, TRAIN)
    known = sorted({word for concept in concepts for given in concept.texts for word in words(given)})
    generator = setting.target.generator(setting.network, setting.codec, setting.text, choice.t_star, known)
    generator.save(job.directory, _without_prefix(raw), _without_prefix(choice.state))


def with_images(
    config: Config, setting: Setting, blocks: BlockLoss, judge: Judge | None, codec: Codec, device: torch.device
) -> tuple[Loss, Scored | None]:
    """Return the loss of blocks and images, and what judges by the images of validation concepts, if there are any."""
    from finectl.training.weights.images import ImageJudge, ImageLoss, Studio

    studio = Studio.of(setting.target.dataset, device, config.seed)  # type: ignore[arg-type]
    times = (config.t_min, config.t_max)
    train = setting.splits[TRAIN]
    concepts = min(config.image_concepts, len(train.names))
    loss = ImageLoss(blocks, studio, codec, train, config.image_weight, concepts, times, config.seed)
    return loss, ImageJudge(judge, studio, setting.splits[VAL].names) if judge else None


def _times(config: Config) -> list[int]:
    """Return the timesteps among which t* is chosen: fewer where each has to make images."""
    from finectl.metrics.generated_weights import spread

    count = IMAGE_TIMES if config.image_weight else TIMES
    return [config.t_star] if config.t_star is not None else list(spread(config.t_min, config.t_max, count))


def _measure(setting: Setting, choice: Choice, judges: Mapping[str, Judge]) -> dict[str, Any]:
    """Return R^2, norms and distances of every split."""
    from finectl.metrics.generated_weights import health
    from finectl.training.weights.fitting import with_weights

    denoiser, normaliser = with_weights(setting.model, choice.state), setting.codec.normaliser
    predicted = {
        split: normaliser.restore(judge.predicted(denoiser, choice.t_star)) - normaliser.initial
        for split, judge in judges.items()
    }
    wanted = {split: found.means - normaliser.initial for split, found in setting.splits.items()}
    return health(setting.codec.layout, predicted, wanted, normaliser.mean, normaliser.scale, wanted[TRAIN])


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in state.items()}


STAGE = Stage(
    name="gen-weights-train",
    version=1,
    makes="weight-generator",
    config=Config,
    reads=lambda config: Reads(KIND, (KIND,)),
    plan=plan,
    run=run,
    locations=("text_encoder",),
    shares_work=True,
)
