"""Pairs: the images before and after the edit of every concept, made by an editor or imported.

All concepts share their source images, which are split by picture. The targets of a concept are one file, so that a
run that stops goes on with those that are missing. Of several edits of an image the one whose CLIP embedding is
closest to the prompt's stays.

Reference: Gong et al., ECCV 2024, arXiv 2407.11966, section 5.1; Hessel et al., arXiv 2104.08718 (CLIP score).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finectl.artifacts.job import DataRecord, Execution, Job, Outcome, Plan, Reads, Stage
from finectl.artifacts.store import Artifact
from finectl.data.concepts import FILE, Concept, read_concepts, slug, write_concepts
from finectl.data.editors import FOLDER, EditOptions, EditorSpec, load_editor, parse_editor
from finectl.data.editors.cost import cost_note, cost_of, seconds_of
from finectl.data.pair_folders import PairFolders, describe_folders, read_folder
from finectl.data.pair_sources import DEFAULT_CROPS, DEFAULT_SIZE, describe_sources, most_images, read_sources
from finectl.data.pairs import (
    INDEX,
    KIND,
    SOURCES,
    SPLITS,
    Pairs,
    Source,
    read_index,
    target_file,
    write_images,
    write_sources,
)
from finectl.data.sources import DataInfo
from finectl.errors import ComputationError, InputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.data.editors import ImageEditor
    from finectl.metrics.choosing import ClipChooser

MARK = "editing"
SHEET = "contact_sheet.png"
SHOWN_NAMES = 3


@dataclass(frozen=True)
class Config:
    """The options of `finectl gen-weights pairs`."""

    editor: str
    data: str
    image_size: int | None
    images: int | None
    layout: str
    prompt: str | None
    best_of: int
    clip: str | None
    sampling_steps: int
    guidance: float
    image_guidance: float
    strength: float
    edit_size: int | None
    batch_size: int
    seed: int
    editor_digest: str = ""
    clip_digest: str = ""


def plan(config: Config, parents: Sequence[Artifact]) -> Plan[Config]:
    """Check that every concept can be edited, and count what it costs.

    Raises:
        UsageError: there is no such editor, or options do not go together.
        InputError: images, pipelines or CLIP are missing, pairs do not match, or the editor does not know a concept.
    """
    editors = [parse_editor(text) for text in config.editor.split(",")]
    concepts = concepts_of(config, parents)
    data: Any
    if editors[0].name == FOLDER:
        if len(editors) > 1 or config.best_of > 1 or config.images is not None or config.data != "photos":
            raise UsageError(
                "--editor folder:PATH takes pairs as they are", fix="leave --data, --images and --best-of out"
            )
        data = describe_folders(Path(editors[0].path), concepts, config.layout)
        size = config.image_size or min(data.folders[0].size)
        count = data.count
    else:
        require_edits(config, editors, concepts)
        size = config.image_size or DEFAULT_SIZE
        data = describe_sources(config.data, size)
        config = replace(config, images=config.images or (DEFAULT_CROPS if data.name == "photos" else None))
        count = most_images(config.data, data, size, config.images)
    resolved = replace(
        config,
        editor=",".join(str(editor) for editor in editors),
        data=data.name if isinstance(data, DataInfo) else config.data,
        image_size=size,
        editor_digest=",".join(editor.digest or editor.name for editor in editors),
        clip_digest=clip_digest(config, editors),
    )
    cost = cost_of(editors, options_of(config), len(concepts), count, config.best_of, size)
    short = slug(f"{editors[0].name}-{Path(editors[0].path).name}" if editors[0].path else editors[0].name)
    return Plan(
        resolved, slug=f"{short}-{len(concepts)}x{count}", data=data, summary=cost, notes=(cost_note(cost, editors),)
    )


def concepts_of(config: Config, parents: Sequence[Artifact]) -> tuple[Concept, ...]:
    """Return the concepts of INPUT, or the one that `--prompt` names."""
    if parents:
        return read_concepts(parents[0])
    prompt = config.prompt or ""
    return (Concept(slug(prompt), prompt, atoms=(slug(prompt),)),)


def reads(config: Config) -> Reads | None:
    """Return what is read: prompts, or nothing where `--prompt` names the concept of a folder.

    Raises:
        UsageError: `--prompt` is given for another editor.
    """
    if config.prompt is None:
        return Reads("prompts", ("prompts",))
    if not config.editor.startswith(f"{FOLDER}:"):
        raise UsageError("--prompt names the concept of --editor folder:PATH alone", fix="finectl gen-weights prompts")
    return None


def require_edits(config: Config, editors: Sequence[EditorSpec], concepts: Sequence[Concept]) -> None:
    """Check that the editors are of one sort and know the concepts.

    Raises:
        UsageError: folder:PATH is one of several, or a diffusion editor would make no step.
        InputError: the builtin editor does not know a concept.
    """
    if any(editor.name == FOLDER for editor in editors):
        raise UsageError("--editor folder:PATH cannot be one of several", expected="editors that make images")
    if any(e.name in ("sd-img2img", "controlnet") for e in editors) and config.sampling_steps * config.strength < 1:
        raise UsageError(
            f"--strength {config.strength:g} of {config.sampling_steps} steps is no step", expected="at least one"
        )
    unknown = [concept.name for concept in concepts if not concept.edit]
    if unknown and any(editor.name == "builtin" for editor in editors):
        raise InputError(
            f"the builtin editor does not know {len(unknown)} of {len(concepts)} concepts, such as "
            f"{', '.join(unknown[:SHOWN_NAMES])}",
            expected="concepts of finectl gen-weights prompts --set demo",
            fix="--editor ip2p:PATH, sd-img2img:PATH, controlnet:PATH or folder:PATH",
        )


def clip_digest(config: Config, editors: Sequence[EditorSpec]) -> str:
    """Return the digest of the CLIP model that chooses; empty where there is nothing to choose.

    Raises:
        InputError: there is, and the model is not there.
        UsageError: `--clip` is given for nothing, or all edits of an image would be the same.
    """
    from finectl.metrics.features import FeatureOptions
    from finectl.metrics.features.clip import describe

    if all(editor.name == "builtin" for editor in editors) and config.best_of > 1:
        raise UsageError("--best-of: the builtin editor makes the same image each time", fix="leave --best-of out")
    if len(editors) * config.best_of == 1:
        if config.clip is not None:
            raise UsageError("--clip: there is one edit an image, and nothing to choose", fix="--best-of 4")
        return ""
    return describe(FeatureOptions(clip=config.clip)).digest


def options_of(config: Config) -> EditOptions:
    """Return how diffusion editors work."""
    return EditOptions(
        config.sampling_steps, config.guidance, config.image_guidance, config.strength, config.edit_size, config.seed
    )


def measure(plan: Plan[Config], parents: Sequence[Artifact], execution: Execution) -> dict[str, Any]:
    """Edit one image by each editor, and say how long all of them would take."""
    from finectl.training.device import resolve_device

    editors = [parse_editor(text) for text in plan.config.editor.split(",")]
    if editors[0].name == FOLDER:
        return {}
    concept, size = concepts_of(plan.config, parents)[0], plan.config.image_size or DEFAULT_SIZE
    device = resolve_device(execution.device)
    return seconds_of(editors, options_of(plan.config), plan.summary["edits"], concept, size, device, execution.dtype)


def run(job: Job[Config]) -> Outcome:
    """Write the source images, then the targets of one concept after another, then the contact sheet."""
    from finectl.data.pair_sheet import draw_sheet

    config, data = job.config, job.data
    concepts = concepts_of(config, job.parents)
    if not (job.directory / INDEX).exists():  # the last of the two files
        write_sources(job.directory, *sources_of(config, data))
    missing = [concept for concept in concepts if not target_file(job.directory, concept.name).exists()]
    index = read_index(job.directory / INDEX)
    splits = Counter(source.split for source in index)
    if empty := [split for split in SPLITS if not splits[split]]:
        raise InputError(f"there are no source images for {', '.join(empty)}", expected="images of every split")
    done = len(concepts) - len(missing)
    if done:
        mark_saved(job)
    with job.console.progress("editing", len(concepts), unit="concept", done=done) as progress:
        maker = Maker.of(job) if missing else None
        for concept in missing:
            if maker is not None:
                write_images(target_file(job.directory, concept.name), maker.targets(job, concept))
            mark_saved(job)
            progress.advance(1, samples=len(index))
    write_concepts(job.directory / FILE, concepts)
    pairs = Pairs(job.directory, concepts)
    draw_sheet(job.directory / SHEET, pairs)
    metrics = {"concepts": len(concepts), "image_size": pairs.image_size, **{s: splits[s] for s in SPLITS}}
    return Outcome(metrics=metrics, cost={"samples": len(missing) * len(index)})


def sources_of(config: Config, data: DataRecord | None) -> tuple[tuple[Source, ...], Tensor]:
    """Return the source images, and what they are called."""
    size = config.image_size or DEFAULT_SIZE
    if isinstance(data, PairFolders):
        return data.sources, read_folder(data.folders[0], size, before=True)
    if not isinstance(data, DataInfo):
        raise TypeError(f"the data are {type(data).__name__}")
    return read_sources(config.data, data, size, config.images)


@dataclass(frozen=True, eq=False)
class Maker:
    """What makes or reads the targets: the source images, and the editors with the CLIP model that chooses."""

    sources: Tensor
    editors: tuple[ImageEditor, ...]
    chooser: ClipChooser | None
    folders: PairFolders | None

    @classmethod
    def of(cls, job: Job[Config]) -> Maker:
        """Open what a job names."""
        from finectl.artifacts.tensors import load_tensors
        from finectl.metrics.choosing import ClipChooser
        from finectl.training.device import resolve_device

        sources = load_tensors(job.directory / SOURCES)["images"]
        if isinstance(job.data, PairFolders):
            return cls(sources, (), None, job.data)
        device = resolve_device(job.execution.device)
        options = options_of(job.config)
        specs = [parse_editor(text) for text in job.config.editor.split(",")]
        editors = tuple(load_editor(spec, options, device, job.execution.dtype) for spec in specs)
        chooser = ClipChooser.of(job.config.clip, device) if job.config.clip_digest else None
        return cls(sources, editors, chooser, None)

    def targets(self, job: Job[Config], concept: Concept) -> Tensor:
        """Return what a concept makes of the source images, uint8 (N, 3, H, W).

        Raises:
            Interrupted: a signal asked to stop; the concepts that are done stay.
            ComputationError: an editor returned images of another form.
        """
        import torch

        if self.folders is not None:
            job.stop_if_requested(_keep_finished_concepts if (job.state / MARK).exists() else None)
            (folder,) = (folder for folder in self.folders.folders if folder.concept == concept.name)
            return read_folder(folder, self.sources.shape[-1], before=False)
        made = []
        for first in range(0, len(self.sources), job.config.batch_size):
            job.stop_if_requested(_keep_finished_concepts if (job.state / MARK).exists() else None)
            images = self.sources[first : first + job.config.batch_size]
            rows = range(first, first + len(images))
            edits = [e.edit(images, concept, rows, draw) for e in self.editors for draw in range(job.config.best_of)]
            if any(edit.shape != images.shape or edit.dtype != torch.uint8 for edit in edits):
                raise ComputationError(f"an editor made images of another form of {concept.name!r}")
            made.append(edits[0] if self.chooser is None else self.chooser.best(edits, concept.prompt))
        return torch.cat(made)


def mark_saved(job: Job[Config]) -> None:
    """Leave something in the state directory: while it is empty, the runner holds that nothing is saved."""
    job.state.mkdir(exist_ok=True)
    (job.state / MARK).touch()


def _keep_finished_concepts() -> None:
    """Nothing is left to save: the targets of each finished concept are in their place already."""


STAGE = Stage(
    name="gen-weights-pairs",
    version=1,
    makes=KIND,
    config=Config,
    reads=reads,
    plan=plan,
    run=run,
    locations=("data", "editor", "clip"),
    presentation=("batch_size",),
    measure=measure,
)
