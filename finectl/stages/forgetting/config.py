"""The options of `analyse forgetting`, and which analyses they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from finectl.errors import UsageError
from finectl.training.settings import DataFields
from finectl.training.text_settings import TextFields

CHAIN, EWC, LOSS = "chain", "ewc", "loss"
ANALYSES = (CHAIN, EWC, LOSS)
DEFAULTS: dict[str, Any] = {
    "fractions": "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    "samples": 250,
    "sampling_steps": 50,
    "pictures": 10,
    "fisher_images": 128,
    "fisher_draws": 4,
    "images": 500,
    "draws": 10,
    "ranges": 10,
    "batch_size": 64,
}
# What a single analysis reads; where it is not made, these fields are neutral, so that they make no other artifact.
READ_BY: dict[str, str] = {
    **dict.fromkeys(("fractions", "metric", "samples", "scheduler", "sampling_steps", "guidance", "pictures"), CHAIN),
    **dict.fromkeys(("vae", "vae_digest", "reference", "features", "features_weights", "metric_digest"), CHAIN),
    **dict.fromkeys(("inception", "clip", "dino", "allow_few"), CHAIN),
    **dict.fromkeys(("fisher_images", "fisher_draws"), EWC),
    **dict.fromkeys(("images", "draws", "ranges"), LOSS),
}
NEUTRAL: dict[str, Any] = {
    **dict.fromkeys(READ_BY),
    **DEFAULTS,
    "scheduler": "ddim",
    "guidance": 1.0,
    "allow_few": False,
    "vae_digest": "",
    "metric_digest": "",
}


@dataclass(frozen=True)
class Config(DataFields, TextFields):
    """The options of `finectl analyse forgetting`; the digests, of what others name, are found while planning."""

    pretrained: str | None
    bank: str | None
    source_data: str | None
    only: str | None
    weights: str
    fractions: str
    metric: str | None
    samples: int
    scheduler: str
    sampling_steps: int
    guidance: float
    vae: str | None
    reference: str | None
    features: str | None
    features_weights: str | None
    inception: str | None
    clip: str | None
    dino: str | None
    allow_few: bool
    pictures: int
    fisher_images: int
    fisher_draws: int
    images: int
    draws: int
    ranges: int
    batch_size: int
    seed: int
    source_digest: str = ""
    metric_digest: str = ""
    vae_digest: str = ""

    @property
    def chosen(self) -> tuple[str, ...]:
        """The analyses of a resolved configuration."""
        return tuple((self.only or "").split(","))

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the steps that are handed over, in ascending order."""
        return parse_fractions(self.fractions)


def parse_fractions(text: str) -> tuple[float, ...]:
    """Return the shares of `--fractions`, each once and in ascending order.

    Raises:
        UsageError: one is no number from 0 to 1.
    """
    try:
        shares = sorted({float(part) for part in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UsageError(
            f"--fractions {text!r}", expected="shares of the steps from 0 to 1, such as 0,0.1,0.2,0.5,1, with commas"
        )
    return tuple(shares)


def neutral(config: Config) -> Config:
    """Return a configuration in which nothing counts that no chosen analysis reads."""
    unread = {name: NEUTRAL[name] for name, reader in READ_BY.items() if reader not in config.chosen}
    return replace(config, **unread)
