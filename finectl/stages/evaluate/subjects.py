"""What is measured: models, checkpoints of them, generated images, image files; and what each of them cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import Job
from finectl.artifacts.lineage import Ancestry, ancestor_cost, model_chain, stored_bytes, total_cost, trace
from finectl.artifacts.store import Artifact, Workspace, open_artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.bank import KIND as BANK
from finectl.data.bank import LATENTS, bank_info, open_bank
from finectl.data.captions import PROMPTS
from finectl.data.files import open_files
from finectl.data.sources import DataOptions
from finectl.errors import FinectlError, InputError
from finectl.metrics.report import row_names
from finectl.models.io import checkpoints, read_config, total_parameters
from finectl.stages.evaluate.config import MADE, Config
from finectl.stages.evaluate.setup import SAMPLES, Setup
from finectl.training.log import NAME as LOG
from finectl.training.log import read_log
from finectl.training.pretrained import GUIDE, HANDOVER

if TYPE_CHECKING:
    import torch

    from finectl.metrics.sources import Source
    from finectl.training.generate import Generator
    from finectl.training.texts import Prompts

# What decides the images of a `samples` artifact, of those fields that `evaluate` has as well.
SAMPLING = ("weights", "scheduler", "sampling_steps", "guidance", "seed", "vae_digest")


@dataclass(frozen=True)
class Subject:
    """A row of the comparison.

    Args:
        name: How the table names it.
        artifact: The model or the generated images; None for image files.
        checkpoint: Optimiser updates of the artifact's own training, for a checkpoint of it.
        updates: Optimiser updates in all, with `--steps-every`.
    """

    name: str
    artifact: Artifact | None = None
    checkpoint: int | None = None
    updates: int | None = None

    @property
    def is_model(self) -> bool:
        """Whether it makes images when it is asked to."""
        return self.artifact is not None and self.artifact.kind not in MADE


def list_subjects(workspace: Workspace, config: Config, parents: Sequence[Artifact]) -> list[Subject]:
    """Return the rows of the comparison, in the order of the inputs."""
    if config.images is not None:
        return [Subject(config.images.partition(":")[2].rstrip("/").rpartition("/")[2])]
    found: list[Subject] = []
    for name, artifact in zip(row_names([parent.name for parent in parents]), parents, strict=True):
        if not config.steps_every or artifact.kind in MADE:
            found.append(Subject(name, artifact))
            continue
        total = int(total_cost(model_chain(trace(workspace, artifact)))["steps"])
        before = total - int(artifact.manifest.cost.get("steps", 0))
        kept = [step for step in checkpoints(artifact) if step % config.steps_every == 0]
        found += [Subject(name, artifact, step, before + step) for step in kept]
        found.append(Subject(name, artifact, None, total))
    return found


def count_images(config: Config, setup: Setup, subject: Subject) -> int:
    """Return how many images of a row are measured."""
    if setup.files is not None:
        return setup.files.count
    if subject.artifact is None or subject.is_model:
        return config.samples
    if subject.artifact.kind == BANK:
        return min(bank_info(subject.artifact).count, config.samples)
    return min(int(tensor_shapes(subject.artifact.file(SAMPLES))["images"][0]), config.samples)


def open_images(
    config: Config, setup: Setup, subject: Subject, made: Artifact | None, device: torch.device
) -> Source | None:
    """Return the images of a row that are there already; None when its model has to make them.

    Args:
        config: The options.
        setup: What they mean.
        subject: The row.
        made: What `find_samples` found.
        device: Where the latents of a bank are decoded.
    """
    from finectl.metrics.sources import DataImages, FileImages, SampledImages

    if subject.artifact is None:
        argument = (config.images or "").partition(":")[2]
        return FileImages(open_files(argument, DataOptions(skip_bad=bool(config.skip_bad))))
    if made is None:
        return None
    prompts = tuple(json.loads(made.file(PROMPTS).read_text())) if made.has(PROMPTS) else None
    if made.kind != BANK:
        return SampledImages(made.file(SAMPLES), count_images(config, setup, subject), prompts)
    from finectl.models.vae import load_vae

    images = open_bank(made)
    images = replace(images, indices=images.indices[: count_images(config, setup, subject)])
    decoded = setup.vae if bank_info(made).space == LATENTS else None
    return DataImages(images, load_vae(decoded["name"], device) if decoded else None, prompts)


def drawn(config: Config, subject: Subject) -> str | None:
    """Return the classes of which the images of a row are, where they are some of all, as `--labels` names them."""
    if subject.artifact is None or subject.is_model:
        return config.labels if subject.is_model else None
    manifest = subject.artifact.manifest
    labels = manifest.config.get("labels")
    return labels if labels == config.labels or manifest.data.get("whole") else None


def find_samples(
    workspace: Workspace, subject: Subject, config: Config, pretrained: Artifact | None = None
) -> Artifact | None:
    """Return the images of a row that `finectl sample` made: those that it is, or those of its model.

    Of a model they are made under the same options, all that are wanted or more.

    Image k depends on the seed and on k alone, up to the rounding of another `--batch-size`.
    """
    if subject.artifact is None or subject.checkpoint is not None:
        return None
    if not subject.is_model:
        return subject.artifact
    classes = max(read_config(subject.artifact).num_classes, 1)
    role = HANDOVER if config.handover is not None else GUIDE
    second = {role: pretrained.manifest.digest} if pretrained is not None else {}
    for path in workspace.paths("samples"):
        try:
            made = open_artifact(path, ["samples"])
        except FinectlError:
            continue
        given = made.manifest.config
        parents = {parent.role: parent.digest for parent in made.manifest.parents}
        of_this = parents == {"model": subject.artifact.manifest.digest, **second}
        same = all(given.get(key, "") == getattr(config, key) for key in SAMPLING)
        same = same and given.get("fraction") == config.fraction
        in_turn = given.get("labels") == (config.labels or ",".join(map(str, range(classes))))
        if config.text_digest:  # the held-out captions in turn
            same = same and given.get("text_digest") == config.text_digest
            in_turn = not given.get("prompt") and not given.get("prompts") and made.manifest.data["name"] == config.data
        if of_this and same and in_turn and int(given.get("samples", 0)) >= config.samples:
            return made
    return None


def load_generator(
    job: Job[Config],
    setup: Setup,
    subject: Subject,
    device: torch.device,
    prompts: Prompts | None = None,
    pretrained: Artifact | None = None,
) -> Generator:
    """Load the model of a row.

    Raises:
        InputError: it has none.
    """
    if subject.artifact is None or not subject.is_model:
        raise InputError(f"{subject.name} has neither images nor a model")
    from finectl.training.generate import Generator

    config = job.config
    return Generator.of(
        subject.artifact,
        config.weights,
        setup.vae["name"] if setup.vae else None,
        device,
        checkpoint=subject.checkpoint,
        scheduler=config.scheduler,
        sampling_steps=config.sampling_steps,
        guidance=config.guidance,
        seed=config.seed,
        dtype=job.execution.dtype,
        prompts=prompts,
        pretrained=pretrained,
        fraction=config.fraction,
    )


def describe(workspace: Workspace, subject: Subject) -> dict[str, Any]:
    """Return what manifests say of a row: method, size, what was transferred and stored, and what making it cost."""
    row: dict[str, Any] = {"name": subject.name, "checkpoint": subject.updates}
    if subject.artifact is None:
        return row
    row["digest"] = subject.artifact.manifest.digest
    ancestry: Any = trace(workspace, subject.artifact)
    if subject.artifact.kind in MADE:
        ancestry = ancestry.parents[0] if ancestry.parents else None
        if not isinstance(ancestry, Ancestry):  # the model is gone
            return row
    chain = model_chain(ancestry)
    first, cost = chain[0].manifest.metrics, total_cost(chain)
    # Time and operations of a checkpoint are not kept apart; they are taken to grow with the updates.
    share = 1.0 if subject.updates is None or not cost["steps"] else subject.updates / cost["steps"]
    model = read_config(ancestry.artifact)
    return {
        **row,
        "method": first.get("method", ancestry.artifact.kind),
        "depth": model.depth,
        "parameters": total_parameters(model),
        "transferred": first.get("parameters_transferred"),
        "transferred_with_embedders": first.get("parameters_transferred_with_embedders"),
        "stored_bytes": stored_bytes(ancestry),
        "steps": cost["steps"] if subject.updates is None else subject.updates,
        "seconds": round(cost["wall_s"] * share, 1),
        "flops": None if cost["flops"] is None else round(cost["flops"] * share),
        "shared_cost": ancestor_cost(ancestry),
    }


def logged_losses(workspace: Workspace, artifact: Artifact) -> list[tuple[int, float]]:
    """Return (optimiser updates, held-out loss) of the logs of a model's whole training, tuning counted."""
    points, before = [], 0
    for link in model_chain(trace(workspace, artifact)):
        entries = read_log(link.file(LOG)) if link.has(LOG) else []
        points += [(before + entry["step"], entry["heldout_loss"]) for entry in entries if "heldout_loss" in entry]
        before += link.manifest.cost.get("steps", 0)
    return points
