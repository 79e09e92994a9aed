"""Base: a generator of edited images and its discriminator, trained on a mixture of concepts.

All low-rank adapters of the steps that follow are of this generator. `--preset pix2pix` is the baseline without text:
a larger generator of one concept.

Reference: E2GAN, arXiv 2401.06127, section 3; Gong et al., ECCV 2024, arXiv 2407.11966, section 4.1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.files import staged
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.concepts import TRAINABLE, Concept, read_concepts, select
from finectl.data.pairs import IMAGES, INDEX, SOURCES, read_index
from finectl.errors import InputError, UsageError
from finectl.models.gan.config import PRESETS, discriminator_for, preset
from finectl.models.gan.io import GanConfig, save_gan
from finectl.models.text import describe_text
from finectl.models.text.hashed import NAME as HASH
from finectl.registry import nearest
from finectl.training.gan.settings import GanFields, describe_gan, gan_settings, resolve_gan

if TYPE_CHECKING:
    from torch import nn

    from finectl.data.pairs import Pairs
    from finectl.training.gan.pairs import Texts

SMALL = {"steps": 1500, "batch_size": 16, "lr": 2e-3, "lr_discriminator": 2e-4, "gan_from": 2 / 3}
PAPER = {"epochs": 100, "batch_size": 16, "lr": 2e-4, "lr_discriminator": 2e-4, "gan_from": 0.0}
SHEET, SHEET_CONCEPTS, SHEET_IMAGES = "samples.png", 6, 8


@dataclass(frozen=True)
class Config(GanFields):
    """The options of `finectl gen-weights base`."""

    preset: str
    norm: str | None
    concept: str | None
    text_encoder: str | None
    ema: float
    text_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Choose concepts and text encoder, and resolve the options.

    Raises:
        UsageError: the preset does not go with the concepts, or does not work on such images.
        InputError: the pairs hold no concept to train on, or the text encoder is missing.
    """
    pairs = parents[0]
    concepts = concepts_of(config, pairs)
    gan = gan_of(config, pairs)
    count = sum(source.split == "train" for source in read_index(pairs.file(INDEX))) * len(concepts)
    defaults = SMALL if config.preset == "nano" else PAPER
    text = gan.text
    resolved = replace(
        config,
        **resolve_gan(config, count, defaults),
        norm=gan.generator.norm,
        text_encoder=str(text["name"]) if text else None,
        text_digest=str(text["digest"]) if text else "",
    )
    settings = gan_settings(resolved)
    kind = f"{config.preset}-{config.concept or len(concepts)}"
    data = InheritedData.of(pairs)
    return Plan(
        resolved,
        slug=f"{kind}-t{settings.steps}",
        data=replace(data, text=text) if data else None,
        summary={
            "concepts": len(concepts),
            "training_pairs": count,
            "epochs": round(settings.steps * settings.batch_size / count, 1),
            "parameters": gan.generator.parameters,
            "discriminator_parameters": gan.discriminator.parameters,
        },
        notes=(f"training {config.preset} on {len(concepts)} concepts, {count:,} pairs: {describe_gan(settings)}",),
    )


def concepts_of(config: Config, pairs: Artifact) -> tuple[Concept, ...]:
    """Return the concepts that the generator is trained on.

    Raises:
        UsageError: a generator without text is asked for several, or there is no such concept.
        InputError: the pairs hold none that training may see.
    """
    concepts = read_concepts(pairs)
    if config.concept is not None:
        found = tuple(concept for concept in concepts if concept.name == config.concept)
        if not found:
            names = [concept.name for concept in concepts]
            raise UsageError(
                f"{pairs.path} has no concept {config.concept!r}{nearest(config.concept, names)}",
                expected=f"one of its {len(names)} concepts, such as {names[0]}",
            )
        return found
    found = select(concepts, "base") or select(concepts, *TRAINABLE)
    if not found:
        raise InputError(
            f"{pairs.path} has no concept that training may see", expected="concepts of role base or train"
        )
    if not PRESETS[config.preset].text_width and len(found) > 1:
        raise UsageError(
            f"--preset {config.preset} has no text, and {pairs.path} has {len(found)} concepts for it",
            expected="one concept",
            fix=f"--concept {found[0].name}",
        )
    return found


def gan_of(config: Config, pairs: Artifact) -> GanConfig:
    """Return the sizes of both networks, for the images of the pairs and the vectors of the text encoder.

    Raises:
        UsageError: a text encoder is named for a generator without text, or the images do not fit the preset.
        InputError: the text encoder is missing, or the pairs are damaged.
    """
    size = tensor_shapes(pairs.file(SOURCES))[IMAGES][-1]
    width = PRESETS[config.preset].text_width
    if not width and config.text_encoder is not None:
        raise UsageError(
            f"--text-encoder {config.text_encoder}: --preset {config.preset} has no text",
            fix="leave --text-encoder out",
        )
    text = describe_text(config.text_encoder or HASH, width) if width else None
    generator = preset(config.preset, size, text_width=int(text["width"]) if text else None, norm=config.norm)
    return GanConfig(generator, discriminator_for(config.preset, size, norm=generator.norm), text, config.preset)


def run(job: Job[Config]) -> Outcome:
    """Train both networks and write them, with a sheet of what the generator makes of held-out images."""
    from finectl.data.pairs import open_pairs
    from finectl.diffusion.random import generator_for
    from finectl.models.gan.discriminator import PatchDiscriminator
    from finectl.models.gan.generator import Generator, initialize_
    from finectl.models.text import load_text
    from finectl.training.device import resolve_device
    from finectl.training.gan.loop import Place, fit_gan
    from finectl.training.gan.pairs import PairStream, Texts, heldout_l1, recompute_on

    config, device = job.config, resolve_device(job.execution.device)
    gan, concepts, pairs = (
        gan_of(config, job.parents[0]),
        concepts_of(config, job.parents[0]),
        open_pairs(job.parents[0]),
    )
    names = tuple(concept.name for concept in concepts)
    texts = Texts.of(load_text(gan.text, device), [concept.texts for concept in concepts]) if gan.text else None
    networks: list[Any] = [Generator(gan.generator), PatchDiscriminator(gan.discriminator)]
    for number, network in enumerate(networks):
        initialize_(network, generator_for("gan", config.seed, number))
        network.to(device)
    settings, held = gan_settings(config), heldout_rows(pairs)
    measure = heldout_l1(pairs, held, names, texts, device)
    stream = PairStream(pairs, pairs.rows("train"), names, texts, settings.batch_size, config.seed, device)
    trained = fit_gan(
        Place.of(job),
        networks[0],
        networks[1],
        stream,
        settings,
        heldout=measure if len(held) else None,
    )
    recompute_on(trained.generator, stream)
    raw, averaged = copy.deepcopy(trained.generator.state_dict()), None
    if trained.ema is not None:
        trained.generator.load_state_dict(trained.ema, strict=False)
        recompute_on(trained.generator, stream)
        averaged = trained.generator.state_dict()
    save_gan(job.directory, gan, raw, trained.discriminator.state_dict(), averaged)
    draw_sheet(job, trained.generator, pairs, names, texts)
    metrics = {
        "concepts": len(names),
        "parameters": gan.generator.parameters,
        "heldout_l1": measure(trained.generator) if len(held) else None,
        "heldout_images": len(held),
    }
    return Outcome(metrics=metrics, cost=trained.cost)


def heldout_rows(pairs: Pairs) -> Any:
    """Return the images that training does not see and choices are made on: those of the split `val`."""
    return pairs.rows("val")


def draw_sheet(job: Job[Config], generator: nn.Module, pairs: Pairs, names: Sequence[str], texts: Texts | None) -> None:
    """Write source, target and what the generator makes, for a few held-out images and concepts."""
    from finectl.data.images import make_rows
    from finectl.training.gan.pairs import edit_rows

    rows = heldout_rows(pairs) if len(heldout_rows(pairs)) else pairs.rows("train")
    rows = rows[:: max(1, len(rows) // SHEET_IMAGES)][:SHEET_IMAGES]
    device = next(generator.parameters()).device
    pictures, labels = [pairs.source_rows(rows)], ["source"]
    for place, name in enumerate(names[:SHEET_CONCEPTS]):
        pictures += [pairs.target_rows(name, rows), edit_rows(generator, pairs, rows, texts, place, device)]
        labels += [f"{name} target", f"{name} made"]
    with staged(job.directory / SHEET) as temporary:
        make_rows(pictures, labels).save(temporary, format="png")


STAGE = Stage(
    name="gen-weights-base",
    version=1,
    makes="gan",
    config=Config,
    reads=lambda config: Reads("pairs", ("pairs",)),
    plan=plan,
    run=run,
    locations=("text_encoder",),
)
