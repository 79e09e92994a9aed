"""The options of `merge`, and what they come to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finectl.errors import UsageError
from finectl.training.settings import DataFields
from finectl.training.text_settings import TextFields


@dataclass(frozen=True)
class Config(DataFields, TextFields):
    """The options of `finectl merge`; None is a default that depends on the input or the data."""

    base: str | None
    method: str
    weights: str | None
    block_weights: str | None
    density: float
    output_dtype: str
    fold: bool
    ranges: int | None
    grid_step: float
    grid_min: float
    grid_max: float
    max_candidates: int
    search: str | None
    objective: str | None
    search_samples: int
    rescored: int
    journal: str | None
    scheduler: str
    sampling_steps: int
    guidance: float
    vae: str | None
    reference: str | None
    features: str | None
    features_weights: str | None
    inception: str | None
    dino: str | None
    seed: int
    objective_digest: str = ""
    vae_digest: str = ""


def parse_weights(text: str, count: int, option: str = "--weights") -> tuple[float, ...]:
    """Return the weights of a list, one for each merged model.

    Raises:
        UsageError: they are not as many numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    sign = "=" if " " in option else " "  # --block-weights BLOCK
    equal = f"for equal shares: {option}{sign}{','.join([f'{1 / count:.3g}'] * count)}"
    try:
        weights = tuple(float(part) for part in parts)
    except ValueError as error:
        raise UsageError(
            f"{option} {text!r} is no list of numbers", expected="numbers with commas between", fix=equal
        ) from error
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"{option} {text!r} has a number that is not finite", expected="finite numbers", fix=equal)
    if len(weights) != count:
        raise UsageError(
            f"{option} has {len(weights)} number{'' if len(weights) == 1 else 's'}, and there are {count} models to "
            "merge",
            expected=f"{count} numbers, in the order of the models",
            fix=equal,
        )
    return weights


def parse_block_weights(text: str | None, count: int) -> dict[str, tuple[float, ...]]:
    """Return the weights of single blocks: `blocks.0=0.3,0.1;final_layer=1,1`.

    Raises:
        UsageError: it is no such list, or names a block twice.
    """
    found: dict[str, tuple[float, ...]] = {}
    for part in filter(None, ((text or "").replace(" ", "")).split(";")):
        block, sign, weights = part.partition("=")
        if not sign or not block or block in found:
            raise UsageError(
                f"--block-weights {part!r}", expected="BLOCK=W1,W2,... once a block, separated by semicolons"
            )
        found[block] = parse_weights(weights, count, option=f"--block-weights {block}")
    return found
