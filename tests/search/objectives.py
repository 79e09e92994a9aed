"""Smooth functions with noise like a Fréchet distance of merged models: about 7 at best, half as much again at 0."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from finectl.search.base import Ask, Candidate, Measured, Search
from finectl.search.final import RESCORED, rescore, winner

FULL = 5000
RELATIVE_NOISE = 0.01  # standard deviation of a Fréchet distance of 5,000 samples
FLOOR = 7.0


class Objective:
    """A function of the coefficients and its noise, which depends on nothing but what is measured."""

    def __init__(self, true: Callable[[np.ndarray], float], seed: int, noise: float = RELATIVE_NOISE) -> None:
        self.true = lambda candidate: float(true(np.asarray(candidate, dtype=float)))
        self.seed = seed
        self.noise = noise
        self.made: list[Ask] = []

    def __call__(self, ask: Ask) -> Measured:
        self.made.append(ask)
        digest = hashlib.sha256(f"{self.seed}:{ask.candidate}:{ask.samples}:{ask.noise}".encode()).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal()
        true = self.true(ask.candidate)
        error = self.noise * true * (FULL / ask.samples) ** 0.5
        bias = 2000.0 / ask.samples  # a Fréchet distance of fewer samples is larger
        value = true + bias + error * draw
        return Measured(ask.candidate, ask.samples, value, (value - 1.96 * error, value + 1.96 * error), ask.noise)


def _shape(dimensions: int, seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng([dimensions, seed])
    rotation, _ = np.linalg.qr(generator.standard_normal((dimensions, dimensions)))
    scales = spread ** -np.linspace(0, 1, dimensions) if dimensions > 1 else np.ones(1)
    matrix = rotation @ np.diag(scales) @ rotation.T
    return matrix, generator.uniform(0.15, 0.85, dimensions)


def _bowl(matrix: np.ndarray, centre: np.ndarray) -> Callable[[np.ndarray], float]:
    scale = FLOOR / 2 / (centre @ matrix @ centre)
    return lambda w: float(scale * (w - centre) @ matrix @ (w - centre))


def crossed(dimensions: int, seed: int) -> Objective:
    bowl = _bowl(*_shape(dimensions, seed, 4.0))
    return Objective(lambda w: FLOOR + bowl(w), seed)


def anisotropic(dimensions: int, seed: int) -> Objective:
    bowl = _bowl(*_shape(dimensions, seed, 30.0))
    return Objective(lambda w: FLOOR + bowl(w), seed)


def border(dimensions: int, seed: int) -> Objective:
    matrix, centre = _shape(dimensions, seed, 4.0)
    centre[0], centre[-1] = 1.25, (0.4 if dimensions == 1 else -0.15)
    bowl = _bowl(matrix, centre)
    return Objective(lambda w: FLOOR + bowl(w), seed)


def warped(dimensions: int, seed: int) -> Objective:
    """Not quadratic: steeper far away, with a third and a fourth power and a ripple."""
    matrix, centre = _shape(dimensions, seed, 6.0)
    bowl = _bowl(matrix, centre)

    def true(w: np.ndarray) -> float:
        offset = w - centre
        ripple = 0.05 * np.sin(9 * w).sum()
        return FLOOR * np.exp(0.8 * bowl(w) / FLOOR) + 1.5 * (offset**3).sum() + 2 * (offset**4).sum() + ripple

    return Objective(true, seed)


FUNCTIONS: dict[str, Callable[[int, int], Objective]] = {
    "crossed": crossed,
    "anisotropic": anisotropic,
    "border": border,
    "warped": warped,
}


def solve(search: Search, objective: Objective, count: int = RESCORED) -> tuple[Candidate, list[Measured]]:
    """Return the winner on fresh noise, and what the search measured before it was chosen."""
    history: list[Measured] = []
    while asks := search.ask(history):
        history += [objective(ask) for ask in asks]
    again = [objective(ask) for ask in rescore(history, count)]
    return winner([*history, *again], count).candidate, history
