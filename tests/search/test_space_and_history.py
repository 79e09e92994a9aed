"""The grid of candidates, the best of a history, re-scoring, and successive halving."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from finectl.errors import ComputationError, UsageError
from finectl.search import SEARCHES
from finectl.search.base import Ask, Measured, Options, Space, best, ranking
from finectl.search.final import rescore, winner
from finectl.search.halving import promotions, scores


def test_steps_are_the_numbers_that_decimals_are_written_as() -> None:
    assert Space(1).values == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert Space(1, -0.3, 0.3, 0.15).values == (-0.3, -0.15, 0.0, 0.15, 0.3)
    assert Space(1, 0, 1, 0.3).values == (0.0, 0.3, 0.6, 0.9)


def test_size_and_order_of_the_points() -> None:
    assert [Space(n).size for n in (2, 3, 4)] == [121, 1331, 14641]
    points = Space(2, 0, 1, 0.5).points()
    assert [next(points) for _ in range(4)] == [(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (0.5, 0.0)]
    assert len(list(points)) == 5


def test_snap_is_the_identity_on_the_grid_and_moves_outsiders_to_the_border() -> None:
    space = Space(2, -0.5, 1.0, 0.1)
    assert all(space.snap(point) == point for point in space.points())
    assert space.snap((0.26, 7.0)) == (0.3, 1.0)
    assert space.snap((-3.0, 0.0)) == (-0.5, 0.0)


def test_a_finer_grid_holds_the_coarser_one() -> None:
    space = Space(2, 0, 1, 0.1)
    finer = space.finer()
    assert finer.step == 0.05
    assert set(space.points()) < set(finer.points())


@pytest.mark.parametrize(
    "numbers", [(0, 0, 1, 0.1), (2, 1, 0, 0.1), (2, 0, 1, 0), (2, 0, 1, -1), (2, 0, math.inf, 1), (2, math.nan, 1, 1)]
)
def test_an_impossible_box_is_refused(numbers: tuple[int, float, float, float]) -> None:
    with pytest.raises(UsageError):
        Space(*numbers)


@pytest.mark.parametrize("vector", [(0.1,), (0.1, 0.2, 0.3), (0.1, math.nan)])
def test_a_vector_that_is_no_candidate_is_refused(vector: tuple[float, ...]) -> None:
    with pytest.raises(UsageError):
        Space(2).snap(vector)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"samples": 0}, {"budget": 0}, {"budget": math.nan}, {"batch": 0}, {"shares": ()}, {"shares": (0.5,)}),
        *({"shares": (0.5, 0.25, 1.0)}, {"shares": (0.0, 1.0)}, {"keep": 0.0}, {"keep": 1.5}),
    ],
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Options(**{"samples": 100, **wrong})  # type: ignore[arg-type]


def test_best_compares_only_one_count_and_noise_and_skips_what_is_not_finite() -> None:
    history = [
        Measured((0.0,), 100, 5.0),
        Measured((0.1,), 100, math.nan),
        Measured((0.2,), 25, 1.0),
        Measured((0.3,), 100, 2.0, noise=1),
        Measured((0.4,), 100, 4.0),
        Measured((0.4,), 100, 0.5),  # a second machine's copy: the first counts
    ]
    assert best(history).candidate == (0.4,)
    assert [entry.value for entry in ranking(history)] == [4.0, 5.0]
    assert best(history, samples=25).candidate == (0.2,)
    assert best(history, noise=1).candidate == (0.3,)
    with pytest.raises(ComputationError):
        best(history[1:2])


def test_the_winner_is_chosen_on_fresh_noise_alone() -> None:
    history = [Measured((k / 10,), 100, float(k)) for k in range(6)]
    asks = rescore(history, 3)
    assert asks == [Ask((0.0,), 100, 1), Ask((0.1,), 100, 1), Ask((0.2,), 100, 1)]
    history.append(Measured((0.0,), 100, 3.0, noise=1))
    assert rescore(history, 3) == asks[1:]
    history += [Measured((0.1,), 100, 2.0, noise=1), Measured((0.2,), 100, 2.5, noise=1)]
    history.append(Measured((0.5,), 100, 0.0, noise=1))  # not among the best few of the search
    assert rescore(history, 3) == []
    assert winner(history, 3).candidate == (0.1,)
    with pytest.raises(ComputationError):
        winner(history[:6], 3)


def test_halving_promotes_the_best_part_and_carries_the_bias_over() -> None:
    options = Options(1000, shares=(0.25, 1.0), keep=0.5)
    cheap = [Measured((k / 10,), 250, 10.0 + k) for k in range(4)] + [Measured((0.9,), 250, math.inf)]
    assert promotions(cheap, options) == [Ask((k / 10,), 1000) for k in range(3)]
    full = [Measured((k / 10,), 1000, 7.0 + k) for k in range(3)]
    assert promotions(cheap + full, options) == []
    found = scores(cheap + full, options)
    assert [found[k / 10,].value for k in range(4)] == [7.0, 8.0, 9.0, 10.0]
    assert (found[0.3,].share, found[0.0,].share) == (0.25, 1.0)
    assert math.isinf(found[0.9,].value)


def test_a_candidate_that_cannot_be_measured_is_never_promoted() -> None:
    options = Options(1000, shares=(0.25, 1.0), keep=1.0)
    assert promotions([Measured((0.0,), 250, math.nan)], options) == []


def test_the_table_lists_strategies_without_importing_them() -> None:
    assert list(SEARCHES) == ["grid", "coarse-to-fine", "surrogate", "bayes", "cma-es"]
    code = (
        "import sys, finectl.search, finectl.search.base, finectl.search.journal, finectl.search.final\n"
        "sys.exit(bool({'torch', 'optuna', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = (
        "import sys\nfrom finectl.search import SEARCHES\n[SEARCHES.load(name) for name in SEARCHES]\n"
        "sys.exit(bool({'torch', 'optuna', 'cmaes'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
