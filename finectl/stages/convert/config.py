"""The options of convert, which its two directions share."""

from __future__ import annotations

from dataclasses import dataclass

from finectl.errors import InputError


@dataclass(frozen=True)
class Config:
    """The options of `finectl convert`; None is a default that depends on the source."""

    source: str | None
    to: str | None
    format: str | None
    weights: str
    components: str | None
    vae: str | None
    heads: int | None
    image_size: int | None
    num_classes: int | None
    source_digest: str | None
    process: str | None = None


def checked_digest(config: Config, found: str | None) -> str | None:
    """Return the digest of what lies at the source.

    Raises:
        InputError: it is not the one that was asked for.
    """
    if config.source_digest is not None and found is not None and config.source_digest != found:
        raise InputError(
            f"{config.source} has the digest {found[:16]}...",
            expected=f"{config.source_digest[:16]}..., as --source-digest says",
            fix="restore the content, or leave --source-digest out to take what is there",
        )
    return found
