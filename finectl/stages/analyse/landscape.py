"""The held-out loss in the plane of two task vectors, on the same noise everywhere.

u = tau_1 / |tau_1|, v = what is left of tau_2 without its part along u, at length 1. The point (a, b) is
theta_0 + a u + b v, which is theta_0 + w_1 tau_1 + w_2 tau_2 for weights that follow from the inner products of the
task vectors.

Reference: DeMe, arXiv 2410.06664, section 5, Figs. 4 and 6a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from finectl.artifacts.store import Artifact
from finectl.artifacts.tensors import load_tensors
from finectl.errors import InputError
from finectl.metrics.heldout_loss import HeldoutLoss, heldout_loss
from finectl.models.candidates import Candidates
from finectl.models.io import build_model, load_model, weights_file
from finectl.stages.analyse.config import parse_plane
from finectl.stages.analyse.setting import Setting
from finectl.stages.analyse.vectors import Sums, read_vectors

MARGIN = 0.3
PARALLEL = 1e-6


@dataclass(frozen=True)
class Plane:
    """Coordinates in the plane of two task vectors.

    Args:
        first: |tau_1|.
        along: What tau_2 has of u.
        across: What it has of v.
    """

    first: float
    along: float
    across: float

    def weights(self, a: float, b: float) -> tuple[float, float]:
        """Return the weights of the task vectors at a point."""
        second = b / self.across
        return (a - self.along * second) / self.first, second

    def project(self, with_first: float, with_second: float) -> tuple[float, float]:
        """Return the point nearest to a vector, by its inner products with tau_1 and tau_2."""
        a = with_first / self.first
        return a, (with_second - self.along * a) / self.across


def plane_of(sums: Sums, names: tuple[str, str]) -> Plane:
    """Return the plane of the first two task vectors.

    Raises:
        InputError: one of them is 0, or they have one direction.
    """
    first, second = sums.norms()[:2]
    if first > 0 and second > 0:
        along = float(sums.gram[0, 1]) / first
        across = math.sqrt(max(second**2 - along**2, 0.0))
        if across > PARALLEL * second:
            return Plane(first, along, across)
        what = f"the task vectors of {names[0]} and {names[1]} have one direction"
    else:
        what = f"the task vector of {names[0] if first == 0 else names[1]} is 0"
    raise InputError(f"{what}, so they span no plane", fix="two other models: --plane I,J")


def loss_landscape(setting: Setting, merged: Artifact | None) -> dict[str, Any]:
    """Measure the loss on a square grid around theta_0, both models and a merged one.

    Args:
        setting: The models and images.
        merged: A model of the same architecture, whose nearest point in the plane is marked.

    Returns:
        `a` and `b` (G,), coordinates of the grid; `loss` (G, G), by b, then a; `points`, each with its place, its loss
        and the share of its distance to theta_0 that lies in the plane; `ranges`, the same grids and points of the
        terms in each range of timesteps.

    Raises:
        InputError: the task vectors span no plane.
    """
    config, parts = setting.job.config, setting.parts
    pair = parse_plane(config.plane, parts.names)
    names = (parts.names[pair[0]], parts.names[pair[1]])
    further = [weights_file(merged, "ema")] if merged is not None else []
    sums = _reordered(read_vectors(parts, further=further, check=setting.check).whole, pair)
    plane = plane_of(sums, names)
    points: list[dict[str, Any]] = [
        {"name": "theta_0", "place": [0.0, 0.0], "weights": (0.0, 0.0), "inside": 1.0},
        {"name": names[0], "place": [plane.first, 0.0], "weights": (1.0, 0.0), "inside": 1.0},
        {"name": names[1], "place": [plane.along, plane.across], "weights": (0.0, 1.0), "inside": 1.0},
    ]
    if merged is not None:
        a, b = plane.project(float(sums.gram[0, -1]), float(sums.gram[1, -1]))
        length = sums.norms()[-1]
        points.append(
            {
                "name": "merged",
                "place": [a, b],
                "weights": plane.weights(a, b),
                "inside": min(1.0, math.hypot(a, b) / length) if length else 1.0,
            }
        )
    return _measured(setting, plane, points, pair, merged)


def _measured(
    setting: Setting, plane: Plane, points: list[dict[str, Any]], pair: tuple[int, int], merged: Artifact | None
) -> dict[str, Any]:
    config = setting.job.config
    axes = grid_axes([point["place"] for point in points], config.grid)
    held, diffusion = setting.images("heldout"), setting.parts.config.diffusion

    def measure(model: Any) -> list[float | None]:
        """Return the loss over all timesteps, and over each range."""
        setting.check()
        found = heldout_loss(
            model,
            held,
            draws=config.draws,
            seed=config.seed,
            batch_size=config.batch_size,
            device=setting.device,
            diffusion=diffusion,
        )
        progress.advance(samples=found.losses.numel())
        return [found.mean, *(_of_range(found, first, end) for first, end in ranges)]

    borders = setting.parts.borders or (0, diffusion.timesteps)
    ranges = list(pairwise(borders)) if len(borders) > 2 else []
    candidates = Candidates(
        setting.conditioned(build_model(setting.parts.config)),
        setting.base_state(),
        [load_tensors(setting.parts.files[index]) for index in pair],
        setting.device,
    )
    with setting.job.console.progress("landscape", config.grid**2 + len(points), unit="point") as progress:
        values = [measure(candidates.at(point.pop("weights"))) for point in points]
        rows = [[measure(candidates.at(plane.weights(a, b))) for a in axes[0]] for b in axes[1]]  # (G, G, 1 + ranges)
        own = measure(setting.conditioned(load_model(merged)).to(setting.device).eval()) if merged is not None else None
    for point, value in zip(points, values, strict=True):
        point["loss"] = value[0]
        point["ranges"] = value[1:]
    if own is not None:
        points[-1]["own_loss"] = own[0]  # of the merged model itself, which may lie off the plane
    return {
        "a": axes[0],
        "b": axes[1],
        "loss": [[cell[0] for cell in row] for row in rows],
        "points": points,
        "images": len(held),
        "draws": config.draws,
        "ranges": [
            {"first": first, "end": end, "loss": [[cell[1 + index] for cell in row] for row in rows]}
            for index, (first, end) in enumerate(ranges)
        ],
    }


def grid_axes(places: list[list[float]], count: int) -> tuple[list[float], list[float]]:
    """Return the coordinates of a square grid that holds all places, with a margin on every side."""
    ends = [(min(values), max(values)) for values in zip(*places, strict=True)]
    half = (0.5 + MARGIN) * max(high - low for low, high in ends)
    axes = [
        torch.linspace(-half, half, count, dtype=torch.float64).add((low + high) / 2).tolist() for low, high in ends
    ]
    return axes[0], axes[1]


def _reordered(sums: Sums, pair: tuple[int, int]) -> Sums:
    """Return the sums of the two models of the plane, and of a merged one behind them."""
    order = [*pair, len(sums.gram) - 1]
    return Sums(sums.gram[order][:, order], sums.histogram[order], sums.base, sums.parameters)


def _of_range(found: HeldoutLoss, first: int, end: int) -> float | None:
    inside = (found.timesteps >= first) & (found.timesteps < end)
    return float(found.losses.double()[inside].mean()) if bool(inside.any()) else None
