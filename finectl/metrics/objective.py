"""The one number by which a search compares models: which metric, in which features, against what (no torch import)."""

from __future__ import annotations

from dataclasses import dataclass

from finectl.data.classes import chosen_labels
from finectl.data.sources import DataInfo, DataOptions
from finectl.errors import UsageError
from finectl.metrics import ALIASES, METRICS
from finectl.metrics.features import EXTRACTORS, ExtractorInfo, FeatureOptions
from finectl.metrics.reference import ReferenceInfo, describe_reference, require_extractor
from finectl.models.io import ModelConfig
from finectl.registry import nearest

LOSS, FRECHET = "loss", "frechet"
DIGITS, DIGITS_SHAPE = "digits", (1, 8)


@dataclass(frozen=True)
class Objective:
    """What is measured, found out without torch.

    Args:
        metric: A key of `METRICS`.
        extractor: The network in whose features it is measured; None for the held-out loss.
        reference: What images are compared with; None where nothing is.
        labels: The classes that are drawn in turn; None for all that the model has.
    """

    metric: str
    extractor: ExtractorInfo | None
    reference: ReferenceInfo | None
    labels: tuple[int, ...] | None = None

    @property
    def sign(self) -> float:
        """1 where lower values are better, -1 where higher ones are."""
        return 1.0 if METRICS[self.metric].better == "lower" else -1.0

    @property
    def digest(self) -> str:
        """What decides its values beside the options: the network's weights and the reference."""
        parts = [self.extractor.digest if self.extractor else "", self.reference.fingerprint if self.reference else ""]
        drawn = f"labels {','.join(map(str, self.labels))}" if self.labels else ""
        return "-".join([*(part[:16] for part in parts if part), *([drawn] if drawn else [])])

    @classmethod
    def of(
        cls,
        name: str | None,
        model: ModelConfig,
        data: DataInfo,
        features: FeatureOptions,
        reference: str | None,
        options: DataOptions,
    ) -> Objective:
        """Find out what an objective means.

        Args:
            name: A metric of models; by default the Fréchet distance where the bundled features or a named network
                can tell the images, else the held-out loss.
            model: The candidates' architecture.
            data: The data set whose training part is the usual reference, and whose held-out part gives the loss.
            features: What the user says of the networks.
            reference: `--reference`.
            options: How images are read.

        Raises:
            UsageError: there is no such metric, or it cannot be measured of a model alone.
            InputError: a file is missing or does not fit.
        """
        told_apart = (model.channels, model.image_size) == DIGITS_SHAPE or bool(features.network)
        metric = ALIASES.get(name or "", name) or (FRECHET if told_apart else LOSS)
        if metric not in METRICS:
            raise UsageError(f"there is no objective {metric!r}{nearest(metric, METRICS)}", expected=_known())
        entry = METRICS[metric]
        if entry.paired or metric == "clip-score":
            raise UsageError(f"--objective {metric} is of images with a pair or a prompt", expected=_known())
        if metric == LOSS:
            return cls(metric, None, None)
        if entry.features == "chosen" and not told_apart:
            raise UsageError(
                f"--objective {metric}: the bundled features are made for digits, which these images are not",
                expected="other features: --features torchvision:NAME --features-weights FILE",
                fix="--objective loss",
            )
        labels = chosen_labels(data) if data.whole and model.num_classes else None
        key = ("torchvision" if features.network else DIGITS) if entry.features == "chosen" else entry.features
        extractor = EXTRACTORS.load(key).describe(features)
        if metric in ("is", "accuracy"):
            return cls(metric, extractor, None, labels)
        size = model.image_size * (int(data.vae["downscale"]) if data.vae else 1)
        found = describe_reference(reference, data, size, options)
        if found.form == "files" or (found.part == "all" and found.form == "data"):
            raise UsageError(
                f"--reference {reference}: images other than the training data are measured once, not in every search",
                fix="finectl evaluate keeps their statistics: --reference statistics/NAME",
            )
        require_extractor(found, extractor.name, extractor.digest, extractor.resize, features.dtype)
        return cls(metric, extractor, found, labels)


def _known() -> str:
    single = [name for name, entry in METRICS.items() if not entry.paired and name != "clip-score"]
    return f"one of: {', '.join(single)}"
