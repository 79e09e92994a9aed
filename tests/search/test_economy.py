"""What the surrogate finds with a small part of the measurements, over 20 seeds of each function."""

from __future__ import annotations

import numpy as np
import pytest
from objectives import FULL, FUNCTIONS, RELATIVE_NOISE, solve

from finectl.search.base import Options, Space
from finectl.search.coarse_to_fine import CoarseToFine
from finectl.search.grid import Grid
from finectl.search.surrogate import Surrogate

SEEDS = range(20)
INTERVAL = 1 + 1.96 * RELATIVE_NOISE


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_within_the_noise_of_the_exhaustive_grid_by_a_tenth_of_its_measurements(dimensions: int, name: str) -> None:
    space = Space(dimensions)
    inside = 0
    for seed in SEEDS:
        objective = FUNCTIONS[name](dimensions, seed)
        found, history = solve(Surrogate(space, Options(FULL, seed=seed)), objective)
        assert 10 * len(history) <= space.size
        reference, _ = solve(Grid(space, Options(FULL)), objective)
        inside += objective.true(found) <= INTERVAL * objective.true(reference)
        assert objective.true(found) <= 1.03 * min(map(objective.true, space.points()))
    assert inside == len(SEEDS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_four_coefficients_as_well_as_coarse_to_fine_by_a_fifth_of_its_measurements(name: str) -> None:
    space = Space(4)
    ratios = []
    for seed in SEEDS:
        objective = FUNCTIONS[name](4, seed)
        found, few = solve(Surrogate(space, Options(FULL, seed=seed)), objective)
        reference, many = solve(CoarseToFine(space, Options(FULL, seed=seed)), objective)
        assert 5 * len(few) <= len(many)
        ratios.append(objective.true(found) / objective.true(reference))
    assert np.mean(ratios) <= 1 + RELATIVE_NOISE / 2
    assert max(ratios) <= INTERVAL * 1.01
