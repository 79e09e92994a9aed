"""What is compared: a fine-tuned model, the one that it started from, and images of both domains. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import tensor_shapes
from finectl.data.bank import bank_info, require_bank_of
from finectl.data.captions import ALL, NONE
from finectl.data.classes import chosen_labels, have_same_labels
from finectl.data.sources import DataInfo, DataOptions, split_classes
from finectl.errors import InputError, UsageError
from finectl.metrics import ALIASES, METRICS
from finectl.metrics.features import FeatureOptions
from finectl.metrics.objective import DIGITS_SHAPE, FRECHET, Objective
from finectl.models.io import read_config, weights_file
from finectl.models.label_rows import DIT_TABLE, UNET_TABLE
from finectl.models.vae import is_same_space, latent_space
from finectl.stages.forgetting.config import Config
from finectl.training.pretrained import require_pair
from finectl.training.settings import DataFields, require_fit, resolve_data
from finectl.training.text_settings import resolve_captioned

BANK = "bank"
FINETUNED, PRETRAINED = "fine-tuned", "pre-trained"
LABEL_TABLES = (DIT_TABLE, UNET_TABLE)
SHOWN = 3


@dataclass(frozen=True)
class Subjects:
    """The inputs of a run.

    Args:
        finetuned: theta.
        pretrained: theta_0, which it started from.
        bank: Images that theta_0 made.
        target: The data that theta was fine-tuned on.
        fields: Its fields of `DataFields` and `TextFields`, resolved.
        source: The data of theta_0; None where nobody knows them, or they are gone.
        source_fields: Its fields of `DataFields`, resolved.
        notes: What was decided by itself.
    """

    finetuned: Artifact
    pretrained: Artifact
    bank: Artifact | None
    target: DataInfo
    fields: dict[str, Any]
    source: DataInfo | None
    source_fields: dict[str, Any]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, parents: Sequence[Artifact]) -> Subjects:
        """Open the inputs, and check that they go together.

        Raises:
            UsageError: theta_0 has classes and no null class, or an option of text goes with models of classes.
            InputError: the models are of two spaces, the bank is of another model, or data, captions or their encoder
                are missing or do not fit.
        """
        finetuned, pretrained = parents[0], parents[1]
        bank = parents[2] if len(parents) > 2 else None
        model = read_config(finetuned)
        require_pair(config, finetuned, pretrained, "--pretrained")
        if bank is not None:
            require_bank_of(bank, pretrained)
        target, fields = resolve_captioned(config, [finetuned], model, model.image_size)
        require_fit(finetuned, target)
        source, source_fields, notes = _source(config, pretrained, target)
        return cls(finetuned, pretrained, bank, target, fields, source, source_fields, notes)

    @property
    def source_name(self) -> str:
        """What tables call the images of the source: those of the data, else of the bank."""
        if self.source is not None:
            return self.source.name
        return f"{BANK} of {bank_info(self.bank).count:,} images" if self.bank is not None else ""

    def knows(self, model: str, info: DataInfo) -> bool:
        """Tell whether a model was trained on the classes of a data set, so that their labels mean something to it.

        Captions mean something to every model of text.

        Args:
            model: `FINETUNED` or `PRETRAINED`.
            info: The data set.
        """
        if info.text is not None:
            return True
        artifact = self.finetuned if model == FINETUNED else self.pretrained
        recorded, classes = artifact.manifest.data, read_config(artifact).num_classes
        if not recorded or classes != info.num_classes or not have_same_labels(recorded, info):
            return False
        seen, wanted = (split_classes(str(name))[1] or info.class_names for name in (recorded["name"], info.name))
        return set(wanted) <= set(seen)

    @property
    def labels(self) -> tuple[int, ...] | None:
        """The classes that are drawn in turn; None for all that the fine-tuned model has."""
        classes = read_config(self.finetuned).num_classes
        return chosen_labels(self.target) if self.target.whole and classes else None


def _source(
    config: Config, pretrained: Artifact, target: DataInfo
) -> tuple[DataInfo | None, dict[str, Any], tuple[str, ...]]:
    """Return the data of theta_0, its fields of `DataFields`, and a note where it is not at hand.

    It has captions where the target has them.
    """
    if config.source_data is None and not pretrained.manifest.data.get("name"):
        return None, {}, (f"what {pretrained.path} was trained on is not recorded; --source-data names it",)
    try:
        named = DataFields(config.source_data, None, None, None)
        info, fields = resolve_data(named, [pretrained], target.image_size, ALL if target.text else NONE)
    except InputError as error:
        if config.source_data is not None:
            raise
        return None, {}, (f"without the data of {pretrained.path}: {error.what}; --source-data names others",)
    model, recorded = read_config(pretrained), pretrained.manifest.data.get("vae")
    if (info.channels, info.image_size) != (model.channels, model.image_size):
        raise InputError(
            f"{info.name} has {info.channels}x{info.image_size}x{info.image_size} images",
            expected=f"{model.channels}x{model.image_size}x{model.image_size}, as {pretrained.path} takes",
            fix="--source-data of such images",
        )
    if recorded and info.vae and not is_same_space(recorded, info.vae):
        raise InputError(
            f"{info.name} holds latents of {latent_space(info.vae)}, {pretrained.path} works on those of "
            f"{latent_space(recorded)}",
            fix=f"finectl encode --vae {recorded['name']}",
        )
    return replace(info, text=target.text), fields, ()


def require_comparable(finetuned: Artifact, pretrained: Artifact, weights: str) -> tuple[str, ...]:
    """Check that the weights of two models can be subtracted, and return those that only the fine-tuned one has.

    Raises:
        InputError: they are of two architectures; the message names the first parameters that differ.
    """
    theta, base = (tensor_shapes(weights_file(artifact, weights)) for artifact in (finetuned, pretrained))
    depths = read_config(finetuned).depth, read_config(pretrained).depth
    differing = [f"depth {depths[0]} and {depths[1]}"] if depths[0] != depths[1] else []
    for name, shape in base.items():
        if name in LABEL_TABLES:
            continue
        if name not in theta:
            differing.append(f"{name} is only in the second")
        elif tuple(theta[name]) != tuple(shape):
            differing.append(f"{name} {list(theta[name])} and {list(shape)}")
    if differing:
        raise InputError(
            f"{finetuned.path} and {pretrained.path} are of two sizes: {', '.join(differing[:SHOWN])}",
            expected="the model that the other one was fine-tuned from, whose weights moved from one to the other",
            fix="name it: --pretrained MODEL; or leave the weights out: --only chain,loss",
        )
    return tuple(name for name in theta if name not in base)


def describe_metric(config: Config, subjects: Subjects) -> tuple[Objective | None, tuple[str, ...]]:
    """Find out in what generated images are measured; None, with a note, where nothing measures them by default.

    Raises:
        UsageError: there is no such metric, or it cannot be measured of a model's images alone.
        InputError: a file is missing or does not fit.
    """
    model, features = read_config(subjects.finetuned), FeatureOptions.of(config)
    told_apart = (model.channels, model.image_size) == DIGITS_SHAPE or bool(features.network)
    if config.metric is None and not told_apart:
        note = "the bundled features are made for digits, so images are drawn and not measured"
        return None, (f"{note}; --metric fid --inception FILE, or --features torchvision:NAME",)
    name = ALIASES.get(config.metric or FRECHET, config.metric or FRECHET)
    entry = METRICS[name]
    if not entry.sampled or entry.paired or name == "clip-score":
        possible = [key for key, one in METRICS.items() if one.sampled and not one.paired and key != "clip-score"]
        raise UsageError(
            f"--metric {name} is not one of generated images alone", expected=f"one of: {', '.join(possible)}"
        )
    if entry.features == "chosen" and not told_apart:
        raise UsageError(
            f"--metric {name}: the bundled features are made for digits, which these images are not",
            expected="other features: --features torchvision:NAME --features-weights FILE",
            fix="--metric fid --inception FILE",
        )
    reads = DataOptions(resize_filter=subjects.fields["resize_filter"], skip_bad=subjects.fields["skip_bad"])
    found = Objective.of(name, model, subjects.target, features, config.reference, reads)
    return replace(found, labels=subjects.labels), ()
