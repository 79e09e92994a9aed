"""A second model in the reverse process: the one that a model was fine-tuned from. No torch.

`--handover` lets it make the last steps; `--domain-guidance` lets it stand for the unconditional model in guidance.

Reference: Diff-Tuning, arXiv 2406.00773; Domain Guidance, arXiv 2504.01521.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from finectl.artifacts.job import Reads
from finectl.artifacts.store import Artifact
from finectl.diffusion.schedulers import steps_handed_over
from finectl.errors import InputError, UsageError
from finectl.models.io import ModelConfig, read_config
from finectl.models.unet_config import is_text_model
from finectl.models.vae import is_same_space, latent_space
from finectl.training.text_settings import TextFields, resolve_text

HANDOVER, GUIDE = "handover", "guide"
"""The roles of the second model in a manifest."""
KINDS = ("model", "condensed", "experts")
DEFAULT_FRACTION = 0.1
LOCATIONS = ("handover", "domain_guidance")
"""Fields that say where the second model lies: `Stage.locations`. It is a parent, whose digest counts."""
UNCHANGED: dict[str, object] = {"fraction": None}
"""`Stage.unchanged_at`, for what was made without a second model."""


@dataclass(frozen=True, kw_only=True)
class PretrainedFields:
    """The options of every stage that generates with two models."""

    handover: str | None = None
    fraction: float | None = None
    domain_guidance: str | None = None


def pretrained_reads(config: PretrainedFields) -> tuple[Reads, ...]:
    """Return the further input of the options: the second model; none where none is named."""
    named = {HANDOVER: config.handover, GUIDE: config.domain_guidance}
    return tuple(Reads(role, KINDS, named=(path,)) for role, path in named.items() if path is not None)


def split_pretrained(
    config: PretrainedFields, parents: Sequence[Artifact]
) -> tuple[tuple[Artifact, ...], Artifact | None]:
    """Return a stage's own inputs, and the second model, which comes after them.

    Raises:
        UsageError: two second models are named.
    """
    if config.handover is not None and config.domain_guidance is not None:
        raise UsageError(
            f"--handover {config.handover} and --domain-guidance {config.domain_guidance}",
            expected="one second model, which either makes the last steps or guides",
        )
    second = config.handover is not None or config.domain_guidance is not None
    return (tuple(parents[:-1]), parents[-1]) if second else (tuple(parents), None)


def resolve_pretrained(
    config: Any, models: Sequence[Artifact], pretrained: Artifact | None, guidance: float
) -> dict[str, Any]:
    """Check the second model against each of the models that it goes with.

    Args:
        config: With the fields of `PretrainedFields` and of `TextFields`.
        models: Those that images are generated with.
        pretrained: The second model.
        guidance: Scale of guidance.

    Returns:
        The resolved fields of `PretrainedFields`.

    Raises:
        UsageError: an option lacks the other that it needs, or the second model has no null class.
        InputError: the two models differ in space, schedule or prediction.
    """
    if config.fraction is not None and config.handover is None:
        raise UsageError(
            f"--fraction {config.fraction:g} hands steps over to no model",
            fix=f"--handover PRETRAINED --fraction {config.fraction:g}",
        )
    if pretrained is None:
        return {}
    option = "--handover" if config.handover is not None else "--domain-guidance"
    if not models:
        raise UsageError(f"{option} {pretrained.path} goes with a model, and there is none", fix=f"leave {option} out")
    if config.domain_guidance is not None and guidance == 1.0:
        raise UsageError(
            "--domain-guidance moves images away from PRETRAINED's by --guidance, which is 1: none",
            expected="a scale other than 1",
            fix="--guidance 1.5",
        )
    for model in models:
        require_pair(config, model, pretrained, option)
    share = None
    if config.handover is not None:
        share = DEFAULT_FRACTION if config.fraction is None else config.fraction
    path = str(pretrained.path.resolve())
    return {
        "handover": path if config.handover is not None else None,
        "fraction": share,
        "domain_guidance": path if config.domain_guidance is not None else None,
    }


def require_pair(text: TextFields, model: Artifact, pretrained: Artifact, option: str) -> None:
    """Check that the noisy images, timesteps and predictions of two models mean the same.

    Args:
        text: The options of text.
        model: The one that was fine-tuned.
        pretrained: The other one.
        option: What names it.

    Raises:
        UsageError: the second model has no null class, the only one that it is given.
        InputError: the models differ; the message gives both values.
    """
    one, other = read_config(model), read_config(pretrained)
    for what, (left, right) in _properties(one, other, model, pretrained).items():
        if left != right:
            raise InputError(
                f"{model.path} and {pretrained.path} differ in {what}: {left} and {right}",
                expected="the model that the other one was fine-tuned from",
                fix=f"finectl show {model.path} names what it was made from; give that one: {option} MODEL",
            )
    if is_text_model(one):
        digests = [(resolve_text(text, each, read_config(each))[0] or {}).get("digest") for each in (model, pretrained)]
        if digests[0] != digests[1]:
            raise InputError(
                f"{model.path} and {pretrained.path} read text with two encoders ({str(digests[0])[:12]} and "
                f"{str(digests[1])[:12]})",
                expected="one text encoder",
                fix=f"{option} of the model that {model.path} was fine-tuned from",
            )
    if other.num_classes and not other.has_null_class:
        raise UsageError(
            f"{option} {pretrained.path}: it has {other.num_classes} classes and none that stands for no class",
            expected="an unconditional model, or one with a null class: labels of other data mean nothing to it",
            fix="if the last row of its label table is the null class, import it again with --num-classes",
        )


def _properties(
    one: ModelConfig, other: ModelConfig, model: Artifact, pretrained: Artifact
) -> dict[str, tuple[Any, Any]]:
    """Return what must be the same of two models, in words, with the value of each."""

    def both(read: Callable[[ModelConfig], Any]) -> tuple[Any, Any]:
        return read(one), read(other)

    spaces = [_space(artifact) for artifact in (model, pretrained)]
    if None in spaces:  # of an imported model nobody wrote down what it was trained on
        spaces = [None, None]
    elif spaces[0] and spaces[1] and is_same_space(spaces[0], spaces[1]):
        spaces[1] = spaces[0]
    names = [latent_space(space) if space else "pixels" for space in spaces]
    left, right = one.diffusion.to_dict(), other.diffusion.to_dict()
    return {
        "the shape of the images": both(lambda config: f"{config.channels}x{config.image_size}x{config.image_size}"),
        "the space of the images": (names[0], names[1]),
        "what conditions them": both(lambda config: "text" if is_text_model(config) else "classes or nothing"),
        **{f"the {name.replace('_', ' ')} of the diffusion": (left[name], right.get(name)) for name in left},
        "the variance": both(lambda config: "learned" if config.learn_sigma else "fixed"),
    }


def _space(artifact: Artifact) -> Any:
    """Return the autoencoder of a model's latents; {} for pixels, None where nothing is recorded."""
    data = artifact.manifest.data
    return (data.get("vae") or {}) if data else None


def network_calls(config: PretrainedFields, images: int, steps: int) -> dict[str, int]:
    """Return how often the two models are called, an image and a step at a time, for `--dry-run`."""
    if config.handover is None and config.domain_guidance is None:
        return {"network_calls": images * steps}
    others = steps if config.handover is None else steps_handed_over(config.fraction or 0.0, steps)
    own = steps if config.handover is None else steps - others
    return {"network_calls": images * own, "pretrained_network_calls": images * others}
