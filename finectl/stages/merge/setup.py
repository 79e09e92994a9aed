"""What a search for merge weights needs, found out without torch: data, objective, strategy, and what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finectl.artifacts.store import Artifact
from finectl.data.sources import DataInfo, DataOptions
from finectl.diffusion.schedulers import require_scheduler
from finectl.errors import UsageError
from finectl.metrics.features import FeatureOptions
from finectl.metrics.objective import Objective
from finectl.models.autoencoder import find_autoencoder
from finectl.models.io import read_config, require_null_class
from finectl.models.parts import Parts
from finectl.search import SEARCHES
from finectl.search.base import Options, Search, Space
from finectl.stages.merge.config import Config
from finectl.training.settings import require_fit
from finectl.training.text_settings import resolve_captioned

GRID, COARSE_TO_FINE = "grid", "coarse-to-fine"
# What the search alone reads, as it is where nothing is searched: the options' own defaults.
UNSEARCHED: dict[str, Any] = {
    "data": None,
    "image_size": None,
    "resize_filter": None,
    "skip_bad": None,
    "grid_step": 0.1,
    "grid_min": 0.0,
    "grid_max": 1.0,
    "max_candidates": 500,
    "search": None,
    "objective": None,
    "search_samples": 5000,
    "rescored": 5,
    "journal": None,
    "scheduler": "ddim",
    "sampling_steps": 50,
    "guidance": 1.0,
    "vae": None,
    "reference": None,
    "features": None,
    "features_weights": None,
    "inception": None,
    "dino": None,
    "text_encoder": None,
    "text_digest": "",
}


def without_search(config: Config) -> Config:
    """Return a configuration in which what a search alone reads is neutral: it makes no other artifact."""
    seed = config.seed if config.method == "dare" else 0
    return replace(config, **UNSEARCHED, seed=seed, density=density_of(config))


def density_of(config: Config) -> float:
    """Return the share of entries that are kept, 1 for methods that drop none."""
    return config.density if config.method in ("ties", "dare") else 1.0


def resolve_search(
    config: Config, parts: Parts, parents: Sequence[Artifact]
) -> tuple[Config, DataInfo, dict[str, Any]]:
    """Resolve the options of a search.

    Returns:
        The configuration, the data set, and what `--dry-run` prints of the search.

    Raises:
        UsageError: the grid, the strategy or the objective does not fit.
        InputError: the data set or a file is missing, or does not fit the models.
    """
    if config.method != "task-arithmetic":
        raise UsageError(
            f"--method {config.method} is merged with weights that are given; a search is over task arithmetic",
            fix="--weights, one number for each model",
        )
    source = parents[0]
    model = read_config(source)
    size = model.image_size if config.data is None else None
    data, fields = resolve_captioned(config, [source], model, size)
    require_fit(source, data)
    require_scheduler(config.scheduler, model.diffusion.prediction)
    require_null_class(model, config.guidance)
    reads = DataOptions(resize_filter=fields["resize_filter"], skip_bad=fields["skip_bad"])
    objective = Objective.of(config.objective, model, data, FeatureOptions.of(config), config.reference, reads)
    vae = find_autoencoder(config.vae, source, model.channels) if objective.metric != "loss" else None
    space = Space(parts.count, config.grid_min, config.grid_max, config.grid_step)
    name = config.search or (GRID if space.size <= config.max_candidates else COARSE_TO_FINE)
    resolved = replace(
        config,
        **fields,
        search=name,
        objective=objective.metric,
        objective_digest=objective.digest,
        vae=vae["name"] if vae else None,
        vae_digest=vae["digest"] if vae else "",
        density=1.0,
    )
    least, most = strategy(resolved, parts.count).candidates()
    measured = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    words = f"{name} over {space.size:,} candidates, {measured} measured, by {objective.metric}"
    return resolved, data, {"candidates": space.size, "measured": [least, most], "search": words}


def strategy(config: Config, count: int) -> Search:
    """Return the search that a resolved configuration names.

    Raises:
        UsageError: there is no such search, or what it needs is not installed.
    """
    space = Space(count, config.grid_min, config.grid_max, config.grid_step)
    options = Options(samples=config.search_samples, seed=config.seed)
    found: Search = SEARCHES.load(config.search or GRID)(space, options)
    return found
