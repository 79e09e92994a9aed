"""What a configuration of `evaluate` means, found out without torch: metrics, networks, reference, images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finectl.artifacts.lineage import INITIALISING
from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.bank import KIND as BANK
from finectl.data.bank import LATENTS, bank_info
from finectl.data.captions import ALL, NONE
from finectl.data.classes import chosen_labels, parse_labels
from finectl.data.files import FilesInfo, describe_files
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import InputError, UsageError
from finectl.metrics import METRICS
from finectl.metrics.features import DIGITS, EXTRACTORS, TORCHVISION, ExtractorInfo, FeatureOptions
from finectl.metrics.paired import describe_lpips
from finectl.metrics.reference import ReferenceInfo, describe_reference, require_extractor
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import checkpoints, read_config, require_null_class
from finectl.models.unet_config import is_text_model
from finectl.stages.evaluate.config import MADE, Config, parse_metrics
from finectl.training.settings import require_fit, resolve_data
from finectl.training.text_settings import resolve_text

SAMPLES = "samples.safetensors"
DIGITS_SHAPE = (1, 8)
ON_DIGITS = ["frechet", "accuracy"]


@dataclass(frozen=True)
class Setup:
    """The resolved work.

    Args:
        metrics: Their names, in the order in which they were given.
        data: The data set whose held-out part gives the loss, and whose training part is the usual reference.
        fields: The fields of `DataFields`, resolved.
        shape: Channels and side of the measured images in pixels; None for files as they are.
        extractors: The networks by their keys.
        outputs: The outputs that are wanted of each.
        lpips: The network of LPIPS; None when that is not wanted.
        options: What the user says of the networks.
        reference: What the images are compared with; None when no metric needs it.
        vae: What decodes the models' latents.
        files: What `--images` names.
        notes: What was decided by itself.
        labels: The classes that are drawn in turn; None for all of them.
    """

    metrics: tuple[str, ...]
    data: DataInfo | None
    fields: dict[str, Any]
    shape: tuple[int, int] | None
    extractors: dict[str, ExtractorInfo]
    outputs: dict[str, tuple[str, ...]]
    lpips: ExtractorInfo | None
    options: FeatureOptions
    reference: ReferenceInfo | None
    vae: dict[str, Any] | None
    files: FilesInfo | None = None
    notes: tuple[str, ...] = field(default=())
    labels: tuple[int, ...] | None = None

    @property
    def networks(self) -> dict[str, ExtractorInfo]:
        """All networks whose weights decide values, by name."""
        return {**self.extractors, **({"lpips": self.lpips} if self.lpips else {})}

    def network_of(self, metric: str) -> ExtractorInfo | None:
        """Return the network in which a metric is measured; None where it needs none."""
        return self.lpips if metric == "lpips" else self.extractors.get(extractor_key(metric, self.options))

    @classmethod
    def of(cls, config: Config, parents: Sequence[Artifact]) -> Setup:
        """Find out what a configuration means for these inputs.

        Raises:
            UsageError: the options contradict each other, or a metric is not possible with them.
            InputError: a file, a data set or an artifact is missing, damaged, or does not fit.
        """
        models = [parent for parent in parents if parent.kind not in MADE]
        files = describe_images(config)
        text, text_fields = _text(config, models)
        decoder = _decoder(config, parents)
        data, fields = _data(config, parents, ALL if text else NONE, decoder)
        data, fields = replace(data, text=text) if data and text else data, {**fields, **text_fields}
        vae = _models(config, models, data) or decoder
        shape = _shape(parents, vae)
        metrics, notes = _metrics(config, models, shape, with_prompts=text is not None)
        options = FeatureOptions.of(config)
        extractors, outputs = _extractors(metrics, options)
        lpips = describe_lpips(config.lpips) if "lpips" in metrics else None
        sampled = [name for name in metrics if METRICS[name].sampled]
        reference = None
        if any(needs_reference(name) for name in sampled):
            size, raw = shape[1] if shape else None, config.images is not None
            reads = DataOptions(resize_filter=fields["resize_filter"], skip_bad=fields["skip_bad"])
            reference = describe_reference(config.reference, data, size, reads, as_stored=raw)
            for name, info in extractors.items():
                require_extractor(reference, name, info.digest, info.resize, options.dtype)
        elif config.reference is not None:
            raise UsageError(
                f"--reference {config.reference}: none of the metrics {', '.join(metrics)} is measured against one",
                fix="leave --reference out, or name such a metric: --metrics fid",
            )
        labels, said = _labels(config, models, data) if sampled else (None, ())
        return cls(
            *(metrics, data, fields, shape, extractors, outputs, lpips, options, reference, vae, files),
            notes=(*notes, *said),
            labels=labels,
        )


def needs_reference(name: str) -> bool:
    """Tell whether a metric compares images with a reference."""
    return METRICS[name].sampled and name not in ("is", "accuracy", "clip-score")


def extractor_key(name: str, options: FeatureOptions) -> str:
    """Return the network of a metric; empty for none."""
    wanted = METRICS[name].features
    return (TORCHVISION if options.network else DIGITS) if wanted == "chosen" else wanted


def describe_images(config: Config) -> FilesInfo | None:
    """Return what `--images` names; None without it.

    Raises:
        UsageError: it is no folder.
        InputError: there are no images in it.
    """
    if config.images is None:
        return None
    kind, _, argument = config.images.partition(":")
    if kind != "folder" or not argument:
        raise UsageError(f"--images {config.images!r}", expected="folder:PATH, of a folder or a .zip file")
    if config.image_size is not None:
        raise UsageError("--images are measured at their own sizes", fix="leave --image-size out")
    return describe_files(argument, DataOptions(skip_bad=bool(config.skip_bad)))


def _text(config: Config, models: Sequence[Artifact]) -> tuple[Any, dict[str, Any]]:
    """Return the one text encoder of all models, None where they take no text, and the fields of `TextFields`.

    Raises:
        UsageError: an encoder is named, and no model takes text.
        InputError: the encoder is missing, or the models differ in what conditions them.
    """
    if not models:
        if config.text_encoder is not None:
            raise UsageError("--text-encoder is of models, and there are none", fix="leave --text-encoder out")
        return None, {}
    found = [resolve_text(config, artifact, read_config(artifact)) for artifact in models]
    for artifact, (record, _) in zip(models, found, strict=True):
        if (record or {}).get("digest") != (found[0][0] or {}).get("digest"):
            raise InputError(
                f"{models[0].path} and {artifact.path} are not conditioned on the same: one takes no text, or that of "
                "another encoder",
                expected="models of one kind",
                fix="evaluate them one by one",
            )
    return found[0]


def _decoder(config: Config, parents: Sequence[Artifact]) -> dict[str, Any] | None:
    """Return the autoencoder of banks of latents; None where there are none.

    Raises:
        InputError: it is not at hand.
    """
    banks = [(parent, bank_info(parent)) for parent in parents if parent.kind == BANK]
    found = [find_autoencoder(config.vae, bank, info.channels) for bank, info in banks if info.space == LATENTS]
    return found[0] if found else None


def _data(
    config: Config, parents: Sequence[Artifact], captions: str, decoder: dict[str, Any] | None
) -> tuple[DataInfo | None, dict[str, Any]]:
    """Return the data set of the models; None where nothing needs one."""
    loose = {"data": config.data, "image_size": config.image_size}
    loose |= {"resize_filter": config.resize_filter or "bicubic", "skip_bad": bool(config.skip_bad)}
    if config.images is not None and (config.data is None or config.reference is not None):
        return None, loose
    only_samples = all(parent.kind in MADE for parent in parents)
    if only_samples and config.reference is not None:
        return None, loose
    size = None
    if only_samples and parents and not parents[0].manifest.data.get("vae"):
        size = _made_shape(parents[0], decoder)[1]
    elif not only_samples:
        size = read_config(next(parent for parent in parents if parent.kind not in MADE)).image_size
    data, fields = resolve_data(config, parents, size, captions)
    return data, fields if config.images is None else {**fields, "image_size": None}


def _models(config: Config, models: Sequence[Artifact], data: DataInfo | None) -> dict[str, Any] | None:
    """Check that the models can be sampled and take the data; return the autoencoder of their latents."""
    found: list[dict[str, Any] | None] = []
    for artifact in models:
        model = read_config(artifact)
        if config.domain_guidance is None:  # else the second model has the null class
            require_null_class(model, config.guidance)
        if data is not None:
            require_fit(artifact, data)
        trained = artifact.manifest.stage != INITIALISING  # what is not has its last weights only, and they are a point
        if config.steps_every and trained and not any(step % config.steps_every == 0 for step in checkpoints(artifact)):
            raise InputError(
                f"{artifact.path} keeps no checkpoint of an update that {config.steps_every} divides",
                expected=f"checkpoints, such as {', '.join(map(str, checkpoints(artifact)[:5])) or 'none that it has'}",
                fix="train it with --keep-every N or --keep-at LIST; --steps-every 1 measures all that it keeps",
            )
        wants_images = config.metrics is None or any(METRICS[m].sampled for m in parse_metrics(config.metrics))
        of_latents = bool(artifact.manifest.data.get("vae")) or config.vae is not None
        if wants_images and (config.metrics is not None or not of_latents):
            found.append(find_autoencoder(config.vae, artifact, model.channels))
    return found[0] if found else None


def _labels(
    config: Config, models: Sequence[Artifact], data: DataInfo | None
) -> tuple[tuple[int, ...] | None, tuple[str, ...]]:
    """Return the classes that models draw in turn, None for all of them, and a note where the data decided it.

    Raises:
        UsageError: `--labels` names no class, or no model draws any.
    """
    classes = [read_config(artifact).num_classes for artifact in models]
    if config.labels is not None and (not models or config.text_digest or is_text_model(read_config(models[0]))):
        raise UsageError(f"--labels {config.labels}: no model draws classes", fix="leave --labels out")
    if not classes or not min(classes):
        return None, ()
    if config.labels is not None:
        labels = tuple(parse_labels(config.labels, min(classes)))
        return (None if labels == tuple(range(max(classes))) else labels), ()
    if data is None or not data.whole:
        return None, ()
    labels = chosen_labels(data)
    shown = ",".join(map(str, labels))
    return labels, (f"the classes of {data.name} are drawn, labels {shown}; --labels names others",)


def _made_shape(artifact: Artifact, decoder: dict[str, Any] | None) -> tuple[int, int]:
    """Return channels and side of images that are there already, those of a bank of latents as they are decoded."""
    if artifact.kind == BANK:
        info = bank_info(artifact)
        if decoder is None or info.space != LATENTS:
            return info.channels, info.image_size
        return int(decoder["channels"]), info.image_size * int(decoder["downscale"])
    shape = tensor_shapes(artifact.file(SAMPLES)).get("images", ())
    if len(shape) != 4 or shape[2] != shape[3]:
        raise InputError(f"{artifact.path} has images of shape {shape}", expected="(N, C, H, H)")
    return shape[1], shape[2]


def _shape(parents: Sequence[Artifact], vae: dict[str, Any] | None) -> tuple[int, int] | None:
    """Return channels and side of the images of all inputs.

    Raises:
        InputError: they differ, so that no one reference goes with all of them.
    """
    shapes = {}
    for artifact in parents:
        if artifact.kind in MADE:
            shapes[artifact.path] = _made_shape(artifact, vae)
        else:
            model = read_config(artifact)
            scale = int(vae["downscale"]) if vae else 1
            shapes[artifact.path] = (int(vae["channels"]) if vae else model.channels, model.image_size * scale)
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{path} {c}x{size}x{size}" for path, (c, size) in shapes.items())
        raise InputError(
            f"the inputs have images of several shapes: {shown}",
            expected="one shape, so that one reference goes with all",
            fix="evaluate them one by one",
        )
    return next(iter(shapes.values()), None)


def _metrics(
    config: Config, models: Sequence[Artifact], shape: tuple[int, int] | None, *, with_prompts: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the metrics, by default those that need no file of weights, and a note on what was left out."""
    fits = shape == DIGITS_SHAPE or config.features is not None
    if config.metrics is None:
        names = (["loss"] if models else []) + (ON_DIGITS if fits else [])
        if not names:
            raise UsageError(
                "no metric is measured on such images unless it is named",
                expected=f"--metrics with some of: {', '.join(name for name in METRICS if name != 'loss')}",
                fix="--metrics fid, with --inception FILE",
            )
        left = f"{' and '.join(ON_DIGITS)} left out: the bundled features are made for digits"
        return tuple(names), () if fits else (f"{left}; --metrics names others",)
    names = parse_metrics(config.metrics)
    if "loss" in names and not models:
        raise UsageError("the held-out loss is of a model, and INPUT names none", fix="--metrics without loss")
    chosen = [name for name in names if METRICS[name].features == "chosen"]
    if chosen and not fits:
        raise UsageError(
            f"--metrics {','.join(chosen)}: the bundled features are made for digits, which these images are not",
            expected="other features: --features torchvision:NAME --features-weights FILE",
            fix="--metrics fid,kid, with --inception FILE",
        )
    paired = [name for name in names if METRICS[name].paired or (name == "clip-score" and not with_prompts)]
    if paired and models:
        raise UsageError(
            f"--metrics {','.join(paired)} are of images with a pair or a prompt, and {models[0].path} makes neither",
            expected="a samples artifact, or --images folder:PATH",
        )
    return tuple(names), ()


def _extractors(
    metrics: Sequence[str], options: FeatureOptions
) -> tuple[dict[str, ExtractorInfo], dict[str, tuple[str, ...]]]:
    """Return the networks that the metrics need, and their outputs."""
    outputs: dict[str, tuple[str, ...]] = {}
    for name in metrics:
        key, output = extractor_key(name, options), METRICS[name].output
        if key and output not in outputs.get(key, ()):
            outputs[key] = tuple(sorted((*outputs.get(key, ()), output)))
    return {key: EXTRACTORS.load(key).describe(options) for key in outputs}, outputs
