"""What the options of text come to: data with captions, and the encoder that reads them. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finectl.artifacts.store import Artifact
from finectl.data.captions import ALL, NONE
from finectl.data.sources import DataInfo
from finectl.errors import UsageError
from finectl.models.io import ModelConfig
from finectl.models.text.finding import find_text_encoder
from finectl.training.settings import DataFields, resolve_data

CAPTION_DROPOUT = 0.1
"""As Stable Diffusion, and as labels of our own models."""
UNCHANGED: Mapping[str, object] = {"text_digest": "", "caption_dropout": None}
"""The fields below for a model that takes no text: `Stage.unchanged_at`."""


@dataclass(frozen=True, kw_only=True)
class TextFields:
    """The options of every stage that reads a model which may be conditioned on text."""

    text_encoder: str | None = None
    text_digest: str = ""


@dataclass(frozen=True, kw_only=True)
class CaptionFields(TextFields):
    """The same of a stage that trains one."""

    caption_dropout: float | None = None


def unchanged(*names: str) -> dict[str, object]:
    """Return `Stage.unchanged_at` of fields of this module."""
    return {name: UNCHANGED[name] for name in names}


def resolve_text(config: TextFields, artifact: Artifact, model: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """Find the text encoder of a model.

    Returns:
        What `describe_text` says of it, None for a model that takes no text; and the resolved fields.

    Raises:
        UsageError: an option of text is given, and the model takes none.
        InputError: the encoder is not there, does not fit, or is not the one that the model was trained with.
    """
    record = find_text_encoder(config.text_encoder, artifact, model)
    fields: dict[str, Any] = {
        "text_encoder": record["name"] if record else None,
        "text_digest": record["digest"] if record else "",
    }
    if isinstance(config, CaptionFields):
        dropout = config.caption_dropout
        if dropout is not None and record is None:
            raise UsageError(
                f"--caption-dropout {dropout:g}: {artifact.path} is not conditioned on text",
                fix="leave --caption-dropout out",
            )
        fields["caption_dropout"] = (CAPTION_DROPOUT if dropout is None else dropout) if record else None
    return record, fields


def resolve_captioned(
    config: Any, parents: Sequence[Artifact], model: ModelConfig, image_size: int | None = None
) -> tuple[DataInfo, dict[str, Any]]:
    """Describe the data of a model, with captions and their encoder where it is conditioned on text.

    Args:
        config: With the fields of `DataFields` and of `TextFields`.
        parents: The input artifacts; the first one is the model.
        model: Its architecture.
        image_size: The size to load at where the options name none.

    Raises:
        UsageError: an option does not go with the model.
        InputError: the data, their captions or the encoder are missing, or do not fit.
    """
    record, text = resolve_text(config, parents[0], model)
    data, fields = resolve_data(config, parents, image_size, ALL if record else NONE)
    return replace(data, text=record), {**fields, **text}


def inherited_fields() -> DataFields:
    """Return the options of data that were all left out: those of the input artifact hold."""
    return DataFields(None, None, None, None)
