"""Tune: a short fine-tuning of the base to one concept, from predicted weights or from any other start.

Only low-rank adapters and the normalisations behind the layers are trained, and the base's discriminator with them.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, section 4.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finectl.adapters.lora import LoraLayer, lora_shapes, merge_lora, require_lora
from finectl.adapters.weight_dataset import KIND as DATASET
from finectl.adapters.weight_dataset import open_weights
from finectl.artifacts.files import read_json_object, staged, write_json
from finectl.artifacts.job import InheritedData, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors, save_tensors, tensor_shapes
from finectl.data.concepts import Concept, read_concepts, words
from finectl.data.pairs import IMAGES, INDEX, SOURCES, read_index
from finectl.errors import InputError, UsageError
from finectl.metrics.representatives import subset_clip_digest
from finectl.models.gan.io import read_gan, save_gan
from finectl.models.text import find_recorded_text, require_same_text
from finectl.registry import nearest
from finectl.training.gan.settings import GanFields, describe_gan, gan_settings, resolve_gan
from finectl.training.weights.names import STARTS

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.training.gan.adapting import Adapted, Adapter

KIND = "tuned-gan"
SMALL: dict[str, Any] = {"steps": 40, "batch_size": 16, "lr": 5e-3, "lr_discriminator": 2e-4, "gan_from": 2 / 3}
PAPER: dict[str, Any] = {"epochs": 20, "batch_size": 16, "lr": 1.5e-3, "lr_discriminator": 2e-4, "gan_from": 0.0}
PREDICTION, E2GAN = "prediction", "e2gan"
KNOWN = ("lora", E2GAN, "mean", "nearest", "ridge", "noised", "oracle")
"""Starts that a collection gives; `prediction` is what predict made."""
LORA, ADAPTER, SHEET = "lora.safetensors", "lora.json", "samples.png"
SHEET_IMAGES = 8


@dataclass(frozen=True)
class Config(GanFields):
    """The options of `finectl gen-weights tune`."""

    base: str | None
    pairs: str | None
    concept: str | None
    start: str
    weights: str
    subset: int
    subset_clip: str | None
    subset_clip_digest: str = ""


def reads(config: Config) -> Reads:
    """Return what is read: a start, the base that it belongs to, and pairs."""
    base, pairs = ((name,) if name else () for name in (config.base, config.pairs))
    kinds = ("lora",) if config.start == PREDICTION else (DATASET,)
    return Reads("start", kinds, also=(Reads("base", ("gan",), named=base), Reads("pairs", ("pairs",), named=pairs)))


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Find the concept, and check that start, base and pairs belong together.

    Raises:
        UsageError: the concept is not named and cannot be told from the start.
        InputError: the start is of another base, or the images are of another size.
    """
    start, base, pairs = parents
    layers, digest, text = adapters_of(start)
    gan, concept = read_gan(base), concept_of(config, start, pairs)
    if digest != base.manifest.digest:
        raise InputError(
            f"{start.path} belongs to a base with the digest {digest[:12]}, and {base.path} has "
            f"{base.manifest.digest[:12]}",
            expected="the base that the weights were made for",
            fix="--base with that one",
        )
    if gan.text is not None and text is not None:
        require_same_text(gan.text, text, str(base.path))
        find_recorded_text(gan.text, str(base.path))
    size = tensor_shapes(pairs.file(SOURCES))[IMAGES][-1]
    if size != gan.generator.image_size:
        raise InputError(
            f"{pairs.path} has images of {size} pixels", expected=f"{gan.generator.image_size}, as {base.path} takes"
        )
    count = sum(source.split == "train" for source in read_index(pairs.file(INDEX)))
    count = min(count, config.subset) if config.subset else count
    defaults = SMALL if gan.preset == "nano" else PAPER
    clip = subset_clip_digest(config.subset, config.subset_clip)
    resolved = replace(config, concept=concept.name, subset_clip_digest=clip)
    resolved = replace(resolved, **resolve_gan(config, count, defaults))
    settings = gan_settings(resolved)
    return Plan(
        resolved,
        slug=f"{concept.name}-{config.start}-t{settings.steps}",
        data=InheritedData.of(pairs),
        summary={"concept": concept.name, "training_pairs": count, "adapted_layers": len(layers)},
        notes=(f"tuning to {concept.name!r} from the {STARTS[config.start]}, {count} pairs: {describe_gan(settings)}",),
    )


def adapters_of(start: Artifact) -> tuple[tuple[LoraLayer, ...], str, Any]:
    """Return the layers to adapt, the digest of the base that they are of, and its text encoder.

    Raises:
        InputError: the start is damaged.
    """
    if start.kind == DATASET:
        dataset = open_weights(start)
        return dataset.layers, dataset.base, dataset.text
    values = read_json_object(start.file("config.json"))
    try:
        return tuple(LoraLayer.from_dict(layer) for layer in values["layers"]), str(values["base"]), values["text"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{start.path} is damaged: {error!r}", fix="make it again with --force") from error


def concept_of(config: Config, start: Artifact, pairs: Artifact) -> Concept:
    """Return the concept of `--concept`, or the one that the weights were predicted for.

    Raises:
        UsageError: there is none.
    """
    concepts = read_concepts(pairs)
    if config.concept is not None:
        for concept in concepts:
            if concept.name == config.concept:
                return concept
        names = [concept.name for concept in concepts]
        raise UsageError(f"{pairs.path} has no concept {config.concept!r}{nearest(config.concept, names)}")
    prompt = str(read_json_object(start.file("config.json")).get("prompt", "")) if config.start == PREDICTION else ""
    for concept in concepts:
        if prompt and words(prompt) in [words(text) for text in concept.texts]:
            return concept
    said = f"none of {pairs.path} is called {prompt!r}" if prompt else f"--start {config.start} does not say which"
    raise UsageError(f"the concept is not known: {said}", expected="a concept of the pairs", fix="--concept NAME")


def run(job: Job[Config]) -> Outcome:
    """Fine-tune, and write the whole generator, its discriminator, and the adapters apart."""
    from finectl.training.gan.adapted import crucial_layers
    from finectl.training.gan.adapting import Adapter, Task
    from finectl.training.gan.loop import Place
    from finectl.training.gan.pairs import recompute_on

    config, (start, base, pairs) = job.config, job.parents
    layers, digest, _ = adapters_of(start)
    if config.start == E2GAN:
        layers = crucial_layers(layers)
    concept, settings = concept_of(config, start, pairs), gan_settings(config)
    task = Task(
        base=base.path,
        pairs=pairs.path,
        layers=layers,
        settings=settings,
        rows=chosen_rows(job),
        device=job.execution.device,
        weights=config.weights,
    )
    adapter, values = Adapter(task), start_of(config, start, concept, layers)
    adapted = adapter.train(concept, values, Place.of(job))
    recompute_on(adapted.trained.generator, adapter.stream(concept))
    lora, state = adapted.kept[-1], adapted.trained.generator.state_dict()
    dense = merge_lora({name: state[name] for name in adapter.generator.state_dict()}, lora)
    save_gan(job.directory, read_gan(base), dense, adapted.trained.discriminator.state_dict())
    save_tensors(job.directory / LORA, lora)
    described = {"base": digest, "layers": [layer.to_dict() for layer in layers], "prompt": concept.prompt}
    write_json(job.directory / ADAPTER, described)
    draw_sheet(job, adapter, adapted, concept)
    return Outcome(metrics=measured(adapter, adapted, values, concept), cost=adapted.trained.cost)


def chosen_rows(job: Job[Config]) -> tuple[int, ...]:
    """Return the training images: all, or the `--subset` that stands for them."""
    from finectl.data.pairs import open_pairs
    from finectl.metrics.representatives import representative_pairs
    from finectl.training.device import resolve_device

    config, device = job.config, resolve_device(job.execution.device)
    rows = representative_pairs(open_pairs(job.parents[2]), config.subset, config.seed, config.subset_clip, device)
    return tuple(rows.tolist())


def start_of(config: Config, start: Artifact, concept: Concept, layers: Sequence[LoraLayer]) -> dict[str, Tensor]:
    """Return what the adapters hold at the beginning.

    Raises:
        InputError: the weights do not fit the layers, or the collection has nothing to make such a start of.
    """
    if config.start == PREDICTION:
        found = load_tensors(start.file(LORA))
        require_lora(layers, found, str(start.path))
        return found
    from finectl.models.text import load_text
    from finectl.training.weights.starts import StartMaker

    dataset = open_weights(start)
    if config.start in ("lora", E2GAN):
        return {name: dataset.initial[name] for name in lora_shapes(layers)}
    if dataset.text is None:
        raise InputError(f"{start.path} has no text encoder", expected="--start lora or e2gan")
    made, _ = StartMaker(dataset, load_text(dataset.text)).make(config.start, concept, config.seed)
    return made


def measured(adapter: Adapter, adapted: Adapted, start: dict[str, Tensor], concept: Concept) -> dict[str, Any]:
    """Return the L1 on test images before and after, and the course on validation images."""
    from finectl.training.gan.pairs import heldout_l1, recompute_on

    rows, found = adapter.pairs.rows("test"), {}
    if len(rows):
        measure = heldout_l1(adapter.pairs, rows, (concept.name,), adapter.texts(concept), adapter.device)
        untuned = adapter.networks(start)[0]
        recompute_on(untuned, adapter.stream(concept))
        found = {
            "test_l1_at_start": measure(untuned),
            "test_l1": measure(adapted.trained.generator),
        }
    return {"concept": concept.name, "role": concept.role, **found, "test_images": len(rows), **_course(adapted)}


def _course(adapted: Adapted) -> dict[str, float]:
    course = adapted.record.get("heldout_l1", [])
    return {"heldout_l1_at_start": course[0][1], "heldout_l1": course[-1][1]} if course else {}


def draw_sheet(job: Job[Config], adapter: Adapter, adapted: Adapted, concept: Concept) -> None:
    """Write source, target, what the base makes and what the tuned generator makes, for a few test images."""
    from finectl.data.images import make_rows
    from finectl.training.gan.pairs import edit_rows

    rows = adapter.pairs.rows("test")
    if not len(rows):
        return
    rows = rows[:: max(1, len(rows) // SHEET_IMAGES)][:SHEET_IMAGES]
    texts, device = adapter.texts(concept), adapter.device
    networks = [adapter.generator.to(device), adapted.trained.generator]
    made = [edit_rows(network, adapter.pairs, rows, texts, 0, device) for network in networks]
    pictures = [adapter.pairs.source_rows(rows), adapter.pairs.target_rows(concept, rows), *made]
    with staged(job.directory / SHEET) as temporary:
        make_rows(pictures, ["source", "target", "base", "tuned"]).save(temporary, format="png")


STAGE = Stage(
    name="gen-weights-tune",
    version=1,
    makes=KIND,
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("base", "pairs", "subset_clip"),
)
