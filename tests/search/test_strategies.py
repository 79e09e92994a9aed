"""Every strategy: the same for a seed, a function of the history, never the same question twice, within its budget."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import pytest
from objectives import FULL, crossed, solve

from finectl.errors import UsageError
from finectl.search import SEARCHES
from finectl.search.base import Ask, Candidate, Measured, Options, Space, best
from finectl.search.coarse_to_fine import CoarseToFine
from finectl.search.design import latin_hypercube
from finectl.search.grid import Grid
from finectl.search.quadratic import coefficients, fit, terms
from finectl.search.surrogate import Surrogate

SMALL = Space(2, 0, 1, 0.2)
FOUR = Space(4)
WITHOUT_EXTRA = [name for name in SEARCHES if not SEARCHES[name].extra]


def make(name: str, space: Space = SMALL, **options: Any) -> Any:
    if SEARCHES[name].extra:
        pytest.importorskip("optuna")
        pytest.importorskip("cmaes")
        options.setdefault("budget", 9)
    return SEARCHES.load(name)(space, Options(FULL, **options))


def unbroken(name: str, **options: Any) -> list[Measured]:
    history, objective, search = [], crossed(2, 0), make(name, **options)
    while asks := search.ask(history):
        history.append(objective(asks[0]))
    return history


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("shares", [(1.0,), (0.25, 1.0)])
def test_a_search_resumed_anywhere_goes_on_as_the_unbroken_one(name: str, shares: tuple[float, ...]) -> None:
    history = unbroken(name, shares=shares)
    stops = range(len(history)) if name in WITHOUT_EXTRA else (0, 3, len(history) - 1)
    for stop in stops:
        resumed = make(name, shares=shares).ask(history[:stop])
        assert resumed[0] == history[stop].ask
    assert make(name, shares=shares).ask(history) == []


@pytest.mark.parametrize("name", SEARCHES)
def test_nothing_is_asked_twice_and_everything_lies_on_the_grid(name: str) -> None:
    history = unbroken(name, shares=(0.25, 1.0))
    asks = [measured.ask for measured in history]
    assert len(set(asks)) == len(asks)
    assert {ask.candidate for ask in asks} <= set(SMALL.points())
    assert {ask.samples for ask in asks} == {FULL // 4, FULL}
    assert {ask.noise for ask in asks} == {0}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_seed_decides_everything(name: str) -> None:
    first, second, other = (unbroken(name, seed=seed) for seed in (1, 1, 2))
    assert first == second
    if name in ("surrogate", "bayes", "cma-es"):
        assert first != other


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
def test_the_order_in_which_a_batch_was_measured_plays_no_part(name: str) -> None:
    history = unbroken(name)
    cut = len(make(name).ask([]))  # the first batch
    shuffled = random.Random(0).sample(history[:cut], cut)
    assert make(name).ask(history[:cut]) == make(name).ask(shuffled)


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
def test_a_history_that_changed_is_replayed_from_its_beginning(name: str) -> None:
    search, objective, other = make(name), crossed(2, 0), crossed(2, 5)
    asks = search.ask([])
    search.ask([objective(ask) for ask in asks])
    changed = [other(ask) for ask in asks]
    assert search.ask(changed) == make(name).ask(changed)


@pytest.mark.parametrize("name", SEARCHES)
def test_measurements_of_other_counts_and_noises_do_not_disturb(name: str) -> None:
    history = unbroken(name)[:4]
    foreign = [Measured((0.2, 0.2), 17, -5.0), Measured((0.4, 0.4), FULL, -5.0, noise=1)]
    assert make(name).ask(foreign + history) == make(name).ask(history)


@pytest.mark.parametrize("name", ["surrogate", "bayes", "cma-es"])
@pytest.mark.parametrize("budget", [1, 5, 9])
def test_the_budget_is_kept(name: str, budget: int) -> None:
    assert 1 <= len(unbroken(name, budget=budget)) <= budget
    spent = sum(measured.samples for measured in unbroken(name, budget=budget, shares=(0.25, 1.0))) / FULL
    assert 0 < spent <= budget


@pytest.mark.parametrize("name", SEARCHES)
def test_the_announced_number_of_candidates_holds(name: str) -> None:
    least, most = make(name).candidates()
    assert 0 < least <= len(unbroken(name)) <= most


@pytest.mark.parametrize("name", SEARCHES)
def test_candidates_that_cannot_be_measured_do_not_stop_a_search(name: str) -> None:
    search, objective, history = make(name), crossed(2, 0), []
    while asks := search.ask(history):
        ask = asks[0]
        failed = sum(ask.candidate) > 1.1
        history.append(Measured(ask.candidate, ask.samples, math.inf if failed else objective(ask).value))
    assert math.isfinite(best(history).value)
    assert make(name).ask([Measured(ask.candidate, FULL, math.nan) for ask in make(name).ask([])]) is not None


@pytest.mark.parametrize("name", ["surrogate", "bayes", "cma-es"])
def test_candidates_of_interest_come_first(name: str) -> None:
    starts = ((0.0, 0.0), (1.0, 1.0))
    asks = make(name, starts=starts).ask([])
    assert tuple(ask.candidate for ask in asks[:2]) == starts


@pytest.mark.parametrize("name", WITHOUT_EXTRA)
def test_one_coefficient(name: str) -> None:
    space, objective = Space(1), crossed(1, 3)
    found, _ = solve(make(name, space), objective)
    assert objective.true(found) <= 1.02 * min(map(objective.true, space.points()))


@pytest.mark.parametrize("name", ["grid", "coarse-to-fine"])
def test_a_budget_below_what_it_takes_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="budget"):
        make(name, budget=3)


def test_grid_measures_every_candidate_in_order() -> None:
    assert [ask.candidate for ask in Grid(SMALL, Options(FULL)).ask([])] == list(SMALL.points())


def test_halving_gives_the_grid_full_measurements_of_the_better_part_only() -> None:
    history = unbroken("grid", shares=(0.25, 1.0), keep=0.25)
    assert [measured.samples for measured in history] == [FULL // 4] * 36 + [FULL] * 9


def count_from(minimum: Candidate, space: Space = FOUR, **options: Any) -> int:
    """Measurements of coarse-to-fine without noise, of a bowl around a point."""
    search, history = CoarseToFine(space, Options(FULL), **options), []
    while asks := search.ask(history):
        history += [Measured(ask.candidate, FULL, math.dist(ask.candidate, minimum)) for ask in asks]
    assert best(history).candidate == minimum
    return len(history)


def test_the_documented_counts_of_coarse_to_fine() -> None:
    assert count_from((0.3, 0.6, 0.3, 0.6)) == 256 + 80
    assert count_from((0.0, 0.0, 0.0, 0.0)) == 256 + 15
    assert [count_from((*[0.4] * moved, *[0.3] * (4 - moved))) - 336 for moved in (1, 2, 3, 4)] == [27, 45, 57, 65]


def test_coarse_to_fine_refines_between_the_grid_and_crosses_a_wide_box() -> None:
    assert count_from((0.35, 0.6), Space(2), refine=1) < 60
    assert count_from((1.7, -0.8), Space(2, -2, 2, 0.1)) < 120
    assert count_from((0.3, 0.7), Space(2), coarse=1) == 121


def test_the_design_spreads_over_every_coefficient_and_tells_all_terms_apart() -> None:
    for dimensions in (1, 2, 3, 4):
        count = coefficients(dimensions) + dimensions
        design = latin_hypercube(Space(dimensions), count, seed=0)
        assert len(set(design)) == len(design) == min(count, 11**dimensions)
        if dimensions > 1:
            assert np.linalg.matrix_rank(terms(np.array(design))) == coefficients(dimensions)
            for values in zip(*design, strict=True):
                assert {min(values), max(values)} == {0.0, 1.0}
                assert len(set(values)) >= 7


def test_a_design_larger_than_the_box_is_the_box() -> None:
    space = Space(2, 0, 1, 0.5)
    assert sorted(latin_hypercube(space, 50, seed=0)) == sorted(space.points())


def test_the_fit_recovers_a_quadratic_and_knows_its_error() -> None:
    generator = np.random.default_rng(0)
    points = generator.uniform(-1, 1, (40, 3))
    truth = generator.standard_normal(10)
    exact = fit(points, terms(points) @ truth, np.ones(40))
    assert not exact.logarithmic
    assert np.abs(exact.mean - truth).max() < 1e-3
    assert exact.skill > 0.999
    noise = fit(points, generator.standard_normal(40), np.ones(40))
    assert noise.skill < 0.3


def test_leave_one_out_is_what_leaving_out_gives() -> None:
    generator = np.random.default_rng(1)
    points = generator.uniform(-1, 1, (12, 1))
    values = 2 * points[:, 0] ** 2 - points[:, 0] - 5.0 + 0.2 * generator.standard_normal(12)
    surface = fit(points, values, np.ones(12))
    left_out = []
    for row in range(12):
        rest = np.arange(12) != row
        coefficients_ = np.linalg.lstsq(terms(points[rest]), values[rest], rcond=None)[0]
        left_out.append(values[row] - (terms(points[row : row + 1]) @ coefficients_)[0])
    skill = 1 - np.mean(np.square(left_out)) / values.var()
    assert surface.skill == pytest.approx(skill, abs=0.02)


def test_an_exponential_bowl_is_fitted_by_its_logarithm() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (30, 2))
    surface = fit(points, np.exp(3 * (points**2).sum(axis=1)), np.ones(30))
    assert surface.logarithmic
    assert surface.skill > 0.999


def test_surrogate_explores_where_no_quadratic_fits() -> None:
    """Two wells in a plain; the narrow deep one is not where a quadratic looks."""

    def value(candidate: Candidate) -> float:
        x, y = candidate
        ripple = math.sin(11 * x) * math.cos(13 * y)
        return 10 + 3 * ripple - 6 * math.exp(-((x - 0.9) ** 2 + (y - 0.1) ** 2) / 0.02)

    space, history = Space(2), []
    search = Surrogate(space, Options(FULL, budget=40))
    while asks := search.ask(history):
        history += [Measured(ask.candidate, FULL, value(ask.candidate)) for ask in asks]
    assert len(history) == 40  # a poor fit never ends the search early
    measured = np.array([entry.candidate for entry in history])
    gaps = [np.abs(measured - np.array(point)).max(axis=1).min() for point in space.points()]
    assert max(gaps) <= 0.3


def test_a_box_too_large_to_rank_is_searched_by_descents() -> None:
    space = Space(8)
    assert space.size > 1 << 21
    objective = crossed(8, 0)
    found, history = solve(Surrogate(space, Options(FULL, budget=100)), objective)
    assert len(history) <= 100
    assert objective.true(found) < 1.06 * 7.0


@pytest.mark.parametrize(("package", "names"), [("optuna", ["bayes", "cma-es"]), ("cmaes", ["cma-es"])])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if package == "cmaes":
        pytest.importorskip("optuna")
    monkeypatch.setitem(sys.modules, package, None)
    for name in names:
        with pytest.raises(UsageError, match=package) as error:
            SEARCHES.load(name)(SMALL, Options(FULL))
        assert "finectl[search]" in error.value.fix


def test_cma_es_of_one_coefficient_is_refused() -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    with pytest.raises(UsageError, match="one coefficient"):
        make("cma-es", Space(1))


def test_bayes_by_parzen_estimators_and_in_batches() -> None:
    pytest.importorskip("optuna")
    bayes = SEARCHES.load("bayes")
    search = bayes(SMALL, Options(FULL, budget=20, batch=4), sampler="tpe")
    objective, history = crossed(2, 0), []
    while asks := search.ask(history):
        assert len(set(asks)) == len(asks)
        history += [objective(ask) for ask in asks]
    assert len(history) == 20
    assert search.ask([*history, objective(Ask((0.0, 0.0), FULL, 1))]) == []


def test_bayes_ends_when_the_box_is_measured() -> None:
    pytest.importorskip("optuna")
    space, objective, history = Space(2, 0, 1, 1), crossed(2, 0), []
    search = SEARCHES.load("bayes")(space, Options(FULL, budget=50), sampler="tpe")
    while asks := search.ask(history):
        history += [objective(ask) for ask in asks]
    assert len(history) == 4
