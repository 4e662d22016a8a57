"""Do the rank rules find the rank, and is the allocation the best one?"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.errors import BudgetError, DecompositionError
from rankfold.ranks import allocate, energy, evbmf, stable_rank
from rankfold.ranks._spectra import _threshold

QUICK = settings(deadline=None, max_examples=25, derandomize=True)


def spectrum(shape, rank, noise, seed=0):
    rng = np.random.default_rng(seed)
    signal = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return np.linalg.svd(signal + noise * rng.standard_normal(shape), compute_uv=False)


@pytest.mark.parametrize(
    "shape, rank", [((64, 576), 8), ((576, 64), 8), ((100, 100), 20), ((40, 1000), 3), ((20, 90), 1)]
)
@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_evbmf_recovers_the_rank_and_the_noise(shape, rank, noise):
    found = evbmf(spectrum(shape, rank, noise), shape)
    assert found.rank == rank
    assert found.noise == pytest.approx(noise**2, rel=0.1)
    assert (np.diff(found.values) <= 0).all()
    assert (found.values < spectrum(shape, rank, noise)[:rank]).all()


@pytest.mark.parametrize("shape", [(64, 576), (100, 100), (40, 1000), (300, 20)])
@pytest.mark.parametrize("seed", range(3))
def test_evbmf_finds_nothing_in_noise(shape, seed):
    values = np.linalg.svd(np.random.default_rng(seed).standard_normal(shape), compute_uv=False)
    assert evbmf(values, shape).rank == 0


def test_evbmf_does_not_depend_on_scale_and_takes_a_known_noise():
    values = spectrum((64, 200), 8, 0.5)
    for scale in (1e-12, 1e12):
        assert evbmf(values * scale, (64, 200)).rank == 8
    assert evbmf(values, (64, 200), noise=0.25).rank == 8
    assert evbmf(values, (64, 200), noise=1e6).rank == 0


def test_evbmf_edge_cases():
    assert evbmf([0.0, 0.0], (2, 5)).rank == 0
    assert evbmf([3.0], (1, 50)).rank == 0
    exact = spectrum((30, 40), 4, 0.0)
    assert evbmf(exact, (30, 40)).rank == 4


@pytest.mark.parametrize(
    "alpha, z", [(1.0, 2.513), (0.75, 2.514), (0.5, 2.521), (0.25, 2.545), (0.1, 2.600), (0.05, 2.657), (0.01, 2.829)]
)
def test_the_threshold_is_solved_for(alpha, z):
    assert _threshold(alpha) / math.sqrt(alpha) == pytest.approx(z, abs=6e-4)


@QUICK
@given(values=st.lists(st.floats(0.01, 10), min_size=1, max_size=12), keep=st.floats(0.05, 1))
def test_energy_is_the_least_rank_that_keeps_it(values, keep):
    squares = np.sort(np.square(values))[::-1]
    rank = energy(values, keep)
    slack = 1e-12 * squares.sum()
    assert squares[:rank].sum() >= keep * squares.sum() - slack
    assert rank == 1 or squares[: rank - 1].sum() < keep * squares.sum() + slack


def test_stable_rank():
    assert stable_rank([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert stable_rank([1.0, 1e-9]) == pytest.approx(1)
    assert stable_rank([0.0]) == 0


BAD = {
    "keep 0": lambda: energy([1.0], 0.0),
    "keep above 1": lambda: energy([1.0], 1.5),
    "negative": lambda: stable_rank([1.0, -1.0]),
    "nan": lambda: evbmf([math.nan], (1, 1)),
    "none": lambda: energy([], 0.5),
    "too many values": lambda: evbmf([1.0, 1.0, 1.0], (2, 5)),
    "noise": lambda: evbmf([1.0], (2, 5), noise=0.0),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_numbers_are_refused(call):
    with pytest.raises(DecompositionError):
        call()


@st.composite
def instances(draw):
    groups, limits = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    sizes = rng.integers(1, 6, groups)
    costs = [rng.integers(0, 20, (n, limits)).astype(float) for n in sizes]
    damages = [np.round(rng.random(n), 2) for n in sizes]
    return costs, damages, rng.integers(0, 12 * groups, limits).astype(float)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(instance=instances())
def test_allocation_equals_brute_force(instance):
    costs, damages, limits = instance
    best = math.inf
    for indices in itertools.product(*(range(len(d)) for d in damages)):
        if (sum(cost[i] for cost, i in zip(costs, indices, strict=True)) <= limits).all():
            best = min(best, sum(damage[i] for damage, i in zip(damages, indices, strict=True)))
    if math.isinf(best):
        with pytest.raises(BudgetError):
            allocate(costs, damages, limits)
        return
    found = allocate(costs, damages, limits, gap=1e-9)
    assert found.damage == pytest.approx(best, abs=1e-9)
    assert found.optimal
    assert (np.array(found.cost) <= limits + 1e-9).all()
    chosen = [damage[i] for damage, i in zip(damages, found.indices, strict=True)]
    assert sum(chosen) == pytest.approx(found.damage)


def curves(groups, items, seed=0):
    """Costs and damages of truncated spectra: what a planner hands over."""
    rng = np.random.default_rng(seed)
    costs, damages = [], []
    for _ in range(groups):
        energies = np.arange(1, items + 1) ** -rng.uniform(0.3, 1.5)
        tails = np.maximum(1 - np.cumsum(energies) / energies.sum(), 0)
        unit = rng.integers(64, 1024)
        costs.append(np.append(unit * np.arange(1, items + 1), unit * items * 0.7))
        damages.append(np.append(tails, 0.0))
    return costs, damages


def test_a_large_allocation_is_proven():
    costs, damages = curves(60, 200)
    limit = 0.3 * sum(cost[-1] for cost in costs)
    found = allocate(costs, damages, limit)
    assert found.optimal
    assert found.gap <= 1e-4
    assert found.cost[0] <= limit
    assert found == allocate(costs, damages, limit)


def test_a_search_cut_short_has_an_honest_gap():
    costs, damages = curves(8, 30)
    limit = 0.37 * sum(cost[-1] for cost in costs)
    best = allocate(costs, damages, limit)
    hasty = allocate(costs, damages, limit, gap=0.0, nodes=0)
    assert hasty.cost[0] <= limit
    assert best.damage <= hasty.damage + 1e-12
    assert hasty.damage * (1 - hasty.gap) <= best.damage + 1e-12


def test_an_impossible_limit_names_the_closest():
    with pytest.raises(BudgetError, match="limit 0 is 5, but the cheapest choices cost 7"):
        allocate([np.array([3, 9]), np.array([4, 8])], [np.array([1.0, 0.0])] * 2, 5)


def test_limits_that_exclude_each_other_are_refused():
    costs = [np.array([[1.0, 9.0], [9.0, 1.0]])]
    with pytest.raises(BudgetError, match="no choice"):
        allocate(costs, [np.array([0.0, 0.0])], [5.0, 5.0])


BAD_INSTANCES = {
    "no groups": ([], [], 1.0),
    "empty group": ([np.empty(0)], [np.empty(0)], 1.0),
    "lengths": ([np.ones(2)], [np.ones(3)], 1.0),
    "columns": ([np.ones((2, 2))], [np.ones(2)], 1.0),
    "negative": ([np.array([-1.0])], [np.ones(1)], 1.0),
    "nan": ([np.ones(1)], [np.array([math.nan])], 1.0),
    "limit": ([np.ones(1)], [np.ones(1)], math.inf),
}


@pytest.mark.parametrize("costs, damages, limits", BAD_INSTANCES.values(), ids=BAD_INSTANCES)
def test_arrays_that_do_not_fit_are_refused(costs, damages, limits):
    with pytest.raises(BudgetError):
        allocate(costs, damages, limits)
