"""The text encoder that belongs to a model. No torch."""

from __future__ import annotations

from typing import Any

from finectl.artifacts.store import Artifact
from finectl.errors import InputError, UsageError
from finectl.models.foreign import components
from finectl.models.io import ModelConfig
from finectl.models.text import describe_text, find_recorded_text, require_same_text
from finectl.models.text.clip import ENCODER, MENDING, TOKENIZER
from finectl.models.unet_config import is_text_model


def find_text_encoder(given: str | None, artifact: Artifact, model: ModelConfig) -> dict[str, Any] | None:
    """Return what encodes the texts of a model; None for a model that is not conditioned on text.

    Args:
        given: What `--text-encoder` names.
        artifact: The model.
        model: Its architecture.

    Raises:
        UsageError: an encoder is named, and the model takes no text.
        InputError: it is not the one that the model was trained with, does not fit it, or is nowhere to be found.
    """
    if not is_text_model(model):
        if given is not None:
            raise UsageError(
                f"--text-encoder {given}: {artifact.path} is not conditioned on text", fix="leave --text-encoder out"
            )
        return None
    recorded = artifact.manifest.data.get("text")
    width = int(model.network.get("cross_attention_dim", 0))  # type: ignore[union-attr]
    if given is not None:
        found = describe_text(given, width)
        if recorded is not None:
            require_same_text(recorded, found, str(artifact.path))
    elif recorded is not None:
        found = find_recorded_text(recorded, str(artifact.path))
    else:
        found = _of_pipeline(artifact)
    if found["width"] != width:
        raise InputError(
            f"{artifact.path} takes vectors of {width} numbers, those of {found['name']} have {found['width']}",
            expected="the text encoder that the model was trained with",
        )
    return found


def _of_pipeline(artifact: Artifact) -> dict[str, Any]:
    """Return the encoder of the pipeline that a model was imported from.

    Raises:
        InputError: there is none, or it has changed.
    """
    kept = components.read_parts(artifact).parts if artifact.has(components.NAME) else {}
    if ENCODER not in kept or TOKENIZER not in kept:
        raise InputError(
            f"{artifact.path} is conditioned on text, and no text encoder is recorded for it",
            expected="the one that it was trained with",
            fix=MENDING,
        )
    components.locate(artifact, TOKENIZER, kept[TOKENIZER])  # unchanged
    folder = components.locate(artifact, ENCODER, kept[ENCODER])
    return describe_text(str(folder))
