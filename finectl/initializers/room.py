"""What can be said of two widths without their weights: whether one is a part of the other, and what can be passed on.

No torch here: the check runs while a command is planned, before anything is read.
"""

from __future__ import annotations

from finectl.errors import UsageError
from finectl.models.presets import DiTConfig, count_parameters, family_name
from finectl.models.tying import TemplateConfig


def require_room(source: DiTConfig, target: DiTConfig) -> None:
    """Check that the target is a part of the ancestor in every direction of its width.

    Args:
        source: The ancestor's architecture.
        target: What is to be made from a part of it.

    Raises:
        UsageError: it is wider, has more heads, larger heads, or more hidden units.
    """
    sizes = {
        "channels": (source.width, target.width),
        "attention heads": (source.heads, target.heads),
        "channels a head": (source.width // source.heads, target.width // target.heads),
        "hidden units": (source.width * source.mlp_ratio, target.width * target.mlp_ratio),
    }
    for what, (available, wanted) in sizes.items():
        if wanted > available:
            raise UsageError(
                f"{family_name(target)} has {wanted} {what} and its source has {available}: "
                "weight-selection takes a part of a larger model and cannot widen one",
                expected=f"at most {available} {what}",
                fix="name a narrower --model, or leave it out to keep the source's width",
            )


def require_tiles(source: DiTConfig, target: DiTConfig) -> None:
    """Check that WAVE's templates tile the weights of a target of another width.

    Raises:
        UsageError: they do not.
    """
    tying = source.factorized
    if isinstance(tying, TemplateConfig) and target.width % tying.size:
        raise UsageError(
            f"wave's templates of {tying.size}x{tying.size} do not tile the weights of {family_name(target)}",
            expected=f"a width that is a multiple of {tying.size}, not {target.width}",
            fix="condense --method wave --template-size with a side that divides both widths",
        )


def block_room(source: DiTConfig, target: DiTConfig) -> int:
    """Return how many parameters of blocks can pass where all layers of the source enter every one of the target.

    No more than the source has, and no more than the target has room for.
    """
    available, room = (config.depth * count_parameters(config)["block"] for config in (source, target))
    return min(available, room)
