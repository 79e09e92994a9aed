"""Sigma and biases of a model's layers, generated from the text of its task: `init --sigma-from GENERATOR`. (Ours.)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finectl.artifacts.store import Artifact
from finectl.errors import ComputationError, InputError, UsageError
from finectl.models.io import read_dit_config
from finectl.models.learngene import dense_config
from finectl.models.presets import DiTConfig
from finectl.models.text import describe_text, find_recorded_text, require_same_text
from finectl.models.text.hashed import NAME as HASH
from finectl.training.weights.files import read_sigma_generator, unknown_words

if TYPE_CHECKING:
    from torch import Tensor

    from finectl.initializers.base import Request

KIND = "weight-generator"


def plan_generated(
    config: Any, learngene: Artifact, generator: Artifact, target: DiTConfig
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Check that a generator of sigma goes with the learngene and the target, without torch.

    Args:
        config: The options of `init`.
        learngene: Whose sigma they are.
        generator: The generator.
        target: The dense model that is wanted.

    Returns:
        Fields of the configuration that follow, and notes.

    Raises:
        UsageError: there is no prompt, none of its words is known, or an option does not go with generated sigma.
        InputError: the generator is of another learngene, or its text encoder is another one or gone.
    """
    values = read_sigma_generator(generator)
    if not (config.prompt or "").strip():
        raise UsageError("--sigma-from needs the task in words", fix='--prompt "the digits 3 and 7"')
    if config.sigma is not None:
        raise UsageError(f"--sigma {config.sigma} and --sigma-from are both given", expected="one of them")
    source = read_dit_config(learngene)
    if values["base"] != learngene.manifest.digest:
        raise InputError(
            f"{generator.path} generates sigma of another learngene (digest {str(values['base'])[:12]})",
            expected=f"one of {learngene.path} (digest {learngene.manifest.digest[:12]})",
            fix=f"finectl gen-weights collect --target sigma {learngene.path} | finectl gen-weights train -",
        )
    if _widths(target) != _widths(source):
        raise UsageError(
            f"a target of width {target.width} with {target.heads} heads; sigma are generated for width {source.width} "
            f"with {source.heads} heads",
            expected="the width of the learngene",
            fix="leave --model out, or leave --sigma-from out",
        )
    text = _text_of(config.text_encoder, values["text"], str(generator.path))
    notes: tuple[str, ...] = ()
    if text["name"] == HASH:
        notes = unknown_words(config.prompt, values["words"])
    depths = values["depths"]
    if not min(depths) <= target.depth <= max(depths):
        notes = (*notes, f"depth {target.depth} is outside the collected {min(depths)} to {max(depths)}: extrapolated")
    fields = {
        "sigma": None,
        "depth_scale": 0.0,  # that of the collection holds
        "tune_steps": config.tune_steps or 0,
        "sigma_from": str(generator.path.absolute()),
        "text_encoder": str(text["name"]),
        "text_digest": str(text["digest"]),
    }
    return fields, notes


def _widths(config: DiTConfig) -> tuple[int, int, int]:
    return config.width, config.heads, config.mlp_ratio


def _text_of(named: str | None, recorded: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """Return the record of the generator's text encoder, where it is now."""
    if named is None:
        return find_recorded_text(recorded, whose)
    text = describe_text(named, recorded["width"] if named == HASH else None)
    require_same_text(recorded, text, whose)
    return text


def generated_curves(request: Request) -> dict[str, Tensor]:
    """Return what the layers of the target own, by parameter name.

    Raises:
        InputError: a file of the learngene or of the generator is damaged.
        ComputationError: a value is not finite.
    """
    from dataclasses import replace

    import torch

    from finectl.initializers.expansion import by_parameter, curves_at
    from finectl.models.learngene import load_learngene
    from finectl.training.weights.generate import Sampling
    from finectl.training.weights.sigma import load_sigma_generator

    config = request.job.config
    parents = {artifact.kind: artifact for artifact in request.job.parents}
    generator = load_sigma_generator(parents[KIND])
    generator = replace(generator, text={**generator.text, "name": config.text_encoder})
    learngene = load_learngene(parents["learngene"])
    how, depth = generator.how, request.target.depth
    start = curves_at(learngene, depth, str(how["sigma"]), float(how["depth_scale"]))
    if dense_config(learngene.config, 1) != dense_config(DiTConfig.from_dict(dict(how["source"])), 1):
        raise InputError(f"{parents[KIND].path} says that it is of another learngene", fix="make it again with --force")
    with torch.no_grad():
        curves = generator.curves(config.prompt, start, Sampling(generator.t_star, seed=config.seed))
    bad = [name for name, value in curves.items() if not bool(torch.isfinite(value).all())]
    if bad:
        raise ComputationError(f"the generated {bad[0]} is not finite", fix="train the generator with another --seed")
    return by_parameter(curves)
