"""What a stored weight generator says of itself, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finectl.adapters.sigma_dataset import SIGMA
from finectl.adapters.weight_dataset import LORA
from finectl.artifacts.ancestors import find_ancestor
from finectl.artifacts.files import read_json_object
from finectl.artifacts.store import Artifact
from finectl.data.concepts import TRAINABLE, Concept, select, words
from finectl.errors import InputError, UsageError
from finectl.models.io import CONFIG
from finectl.models.text.hashed import NAME as HASH
from finectl.models.weights.config import WeightUNetConfig

NORMALISER = "normaliser.safetensors"
ENTRIES = ("layout", "layers", "basis", "text", "base", "t_star", "words")
"""Of config.json, beside those of the network."""
SIGMA_ENTRIES = (
    *("layout", "grid", "basis", "text", "base", "t_star", "words"),
    *("source", "depths", "sigma", "depth_scale"),
)
"""The same of a generator of sigma."""
TRAIN, VAL = "train", "val"
SPLITS = (TRAIN, VAL, "test", "unseen")


def concepts_of(concepts: Sequence[Concept], split: str) -> tuple[Concept, ...]:
    """Return the concepts of a split; those of the base GAN alone are for training, too."""
    return select(concepts, *(TRAINABLE if split == TRAIN else (split,)))


def read_generator(artifact: Artifact) -> tuple[WeightUNetConfig, dict[str, Any]]:
    """Return the network's configuration and the other entries of a generator's config.json.

    Raises:
        InputError: it is damaged.
    """
    values = read_json_object(artifact.file(CONFIG))
    if values.get("target", LORA) != LORA:
        raise InputError(
            f"{artifact.path} generates {values['target']} of models, no low-rank weights",
            expected="a generator that was trained on low-rank weights",
            fix=f'finectl init LEARNGENE --sigma-from {artifact.path} --prompt "..." --depth 4',
        )
    missing = [name for name in ENTRIES if name not in values]
    if missing:
        raise InputError(f"{artifact.path} says nothing of its {missing[0]}", fix="make it again with --force")
    others = {name: values.pop(name) for name in ENTRIES}
    return WeightUNetConfig.from_dict(values), others


def read_sigma_generator(artifact: Artifact) -> dict[str, Any]:
    """Return all of config.json of a generator of sigma, beside those of the network.

    Raises:
        InputError: it generates something else, or is damaged.
    """
    values = read_json_object(artifact.file(CONFIG))
    if values.get("target", LORA) != SIGMA:
        raise InputError(
            f"{artifact.path} generates low-rank weights of a GAN, no sigma",
            expected="a generator that was trained on a collection of sigma",
            fix="finectl gen-weights collect --target sigma LEARNGENE | finectl gen-weights train -",
        )
    missing = [name for name in SIGMA_ENTRIES if name not in values]
    if missing:
        raise InputError(f"{artifact.path} says nothing of its {missing[0]}", fix="make it again with --force")
    return values


def unknown_words(prompt: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return a note of the words that no training text has, for an encoder that knows no synonyms.

    Args:
        prompt: What is wanted.
        known: The words of the training texts.

    Raises:
        UsageError: none of the words is known.
    """
    found = words(prompt)
    unknown = [word for word in found if word not in set(known)]
    if len(unknown) == len(found):
        raise UsageError(
            f"no word of {prompt!r} is in the texts that the generator was trained on, and --text-encoder {HASH} knows "
            "no synonyms",
            expected=f"some of its {len(known)} words: {', '.join(sorted(known)[:40])}",
            fix="use these words, or train the generator with a CLIP text encoder",
        )
    return (f"not in the training texts, so without meaning: {', '.join(unknown)}",) if unknown else ()


def require_timestep(t: int, config: WeightUNetConfig) -> int:
    """Check `--t-star` and return it.

    Raises:
        UsageError: there is no such timestep.
    """
    if not 0 <= t < config.diffusion.timesteps:
        raise UsageError(f"--t-star {t}", expected=f"a timestep from 0 to {config.diffusion.timesteps - 1}")
    return t


def require_images(collection: Artifact) -> tuple[Artifact, Artifact]:
    """Return the base generator and the pairs that a collection was made from.

    Raises:
        InputError: one of them is gone.
    """
    found = [find_ancestor(collection, kind) for kind in ("gan", "pairs")]
    for artifact, kind in zip(found, ("base generator", "pairs"), strict=True):
        if artifact is None:
            raise InputError(
                f"the {kind} that {collection.path} was made from are not in its workspace, or were made anew",
                expected="what --image-weight learns from",
                fix="--image-weight 0",
            )
    base, pairs = (artifact for artifact in found if artifact is not None)
    return base, pairs
