"""Does the coupled factorisation find functions of one hidden layer again, from Jacobians and values?"""

from dataclasses import replace

import pytest
import torch
from cases_flexible import block, neurons, sampled
from numpy.polynomial import chebyshev, legendre
from torch.testing import assert_close

from rankfold.decompose import Basis, Neurons, Shapes, coupled, values_of
from rankfold.decompose._bases import KINDS, bent_knots, slopes_of
from rankfold.decompose._coupled import _problem, k_rank
from rankfold.decompose._coupled_model import SOLVERS, activity, cost_of, left_solved
from rankfold.decompose._coupled_refine import REFINEMENTS, _normal_equations, pack, unpack
from rankfold.decompose._coupled_start import STARTS
from rankfold.errors import DecompositionError

BASES = [Basis("piecewise", 6), Basis("legendre", 4), Basis("chebyshev", 5, "tanh"), Basis("spline", 7, "gelu")]


def shapes(basis, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(rank, basis.knots + 2, generator=generator, dtype=torch.float64)
    return Shapes(2 * draw[:, 2:] - 1, 0.5 + draw[:, 0], draw[:, 1] - 0.5)


def problem_of(basis, act="tanh", samples=60, sizes=(4, 3, 5)):
    chain = block(act, sizes)
    return _problem(*sampled(chain, samples, sizes[0]), 2, basis, torch.float64)


def missed(found, chain, into=8):
    """Relative value error on samples that the solver has not seen."""
    x = torch.randn(200, into, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    values = chain(x).detach()
    return float((found.evaluate(x.T).T - values).norm() / (values - values.mean(0)).norm())


# --- the functions ---


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_slopes_are_the_derivatives(basis):
    u = 3 * torch.rand(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1.5
    u.requires_grad_()
    own = shapes(basis, 3)
    values = values_of(basis, u, own)
    found = torch.stack(
        [torch.autograd.grad(values[..., d].sum(), u, retain_graph=True)[0] for d in range(basis.columns)], -1
    )
    assert_close(slopes_of(basis, u, own), found)


@pytest.mark.parametrize("kind", ["legendre", "chebyshev", "spline"])
def test_functions_go_on_linearly(kind):
    basis = Basis(kind, 5)
    u = torch.tensor([[1.0], [1.5], [2.0], [-1.0], [-1.5], [-2.0]], dtype=torch.float64)
    values = values_of(basis, u, shapes(basis, 1))[:, 0]
    assert_close(values[2] - values[1], values[1] - values[0])
    assert_close(values[5] - values[4], values[4] - values[3])


def test_splines_add_up_to_one():
    u = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    values = values_of(Basis("spline", 9), u, shapes(Basis("spline", 9), 1))
    assert_close(values.sum(-1), torch.ones_like(u))


def test_polynomials_are_those_of_numpy():
    u = torch.linspace(-1, 1, 11, dtype=torch.float64)
    for kind, module, vander in (("legendre", legendre, "legvander"), ("chebyshev", chebyshev, "chebvander")):
        wanted = torch.from_numpy(getattr(module, vander)(u.numpy(), 4)[:, 1:])
        assert_close(KINDS[kind].values(u, u, 4), wanted)


def test_knots_are_put_where_the_slope_jumps():
    u = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None]
    slopes = torch.where(u > 0.305, 2.0, 0.0) + torch.where(u > -0.505, 1.0, 0.0)
    knots = bent_knots(Basis("piecewise", 3), u, slopes)
    assert_close(knots.sort(1).values, torch.tensor([[-0.51, 0.31]], dtype=torch.float64), atol=0.011, rtol=0)
    assert bent_knots(Basis("piecewise", 8), u[:3], slopes[:3]).shape == (1, 7)  # more knots than gaps


# --- the solvers ---


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_normal_equations_are_those_of_the_residuals(basis):
    problem, weight = problem_of(basis, samples=20), 2.0
    state = SOLVERS["joint"](problem, STARTS["linear"](problem, 2, 0), weight)

    def residuals(vector):
        here = unpack(vector, state)
        now = activity(problem, here)
        jacobians = torch.einsum("ok,ik,jk->ioj", here.left, now.gains, here.right) - problem.jacobians
        values = now.hidden @ here.left.T - problem.values
        scales = (1 / problem.squared_jacobians) ** 0.5, (weight / problem.squared_values) ** 0.5
        return torch.cat([scales[0] * jacobians.flatten(), scales[1] * values.flatten()])

    vector = pack(state)
    assert torch.equal(pack(unpack(vector, state)), vector)
    slopes, rest = torch.autograd.functional.jacobian(residuals, vector), residuals(vector)
    normal, gradient = _normal_equations(problem, vector, state, weight)
    assert_close(normal, slopes.T @ slopes)
    assert_close(gradient, slopes.T @ rest)
    assert_close(float(rest.square().sum()), cost_of(problem, state, weight))


@pytest.mark.parametrize("basis", BASES, ids=str)
def test_the_joint_solve_lowers_the_cost(basis):
    problem = problem_of(basis)
    state = STARTS["random"](problem, 2, 0)
    rough = replace(state, coefficients=torch.ones_like(state.coefficients))
    solved = SOLVERS["joint"](problem, rough, 1.0)
    assert cost_of(problem, solved, 1.0) < cost_of(problem, SOLVERS["projection"](problem, rough, 1.0), 1.0) + 1e-9
    assert cost_of(problem, solved, 1.0) < 0.9 * cost_of(problem, rough, 1.0)
    moved = replace(solved, coefficients=solved.coefficients + 0.01)
    assert cost_of(problem, solved, 1.0) <= cost_of(problem, moved, 1.0)
    assert cost_of(problem, left_solved(problem, solved, 1.0), 1.0) <= cost_of(problem, solved, 1.0) + 1e-12


@pytest.mark.parametrize("refine", ["levenberg-marquardt", "gradient"])
def test_refinement_lowers_the_cost(refine):
    problem = problem_of(Basis("legendre", 4))
    state = SOLVERS["joint"](problem, STARTS["random"](problem, 2, 0), 1.0)
    refined = REFINEMENTS[refine](problem, state, 1.0)
    assert refined.cost < 0.9 * cost_of(problem, state, 1.0)
    assert_close(cost_of(problem, refined.state, 1.0), refined.cost, rtol=1e-6, atol=1e-12)
    assert list(refined.trace) == sorted(refined.trace, reverse=True)


# --- what comes out ---


@pytest.mark.parametrize("act", ["relu", "tanh", "gelu"])
def test_exact_from_its_own_neurons(act):
    chain = block(act)
    basis = Basis("piecewise", 4, act if act != "relu" else "")
    found = coupled(*sampled(chain), 5, basis=basis, starts=(), initial=Neurons(*neurons(chain), act))
    assert found.cost < 1e-10
    assert missed(found, chain) < 1e-6
    x = torch.randn(8, 5, dtype=torch.float64)
    wanted = torch.stack([torch.autograd.functional.jacobian(chain, row) for row in x.T], -1)
    assert_close(found.jacobians(x), wanted, atol=1e-5, rtol=1e-5)


def test_polynomials_are_recovered():
    v, w = (torch.randn(5, 3, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    cubic = torch.tensor([[1.0, 0.5, -0.2], [0.0, 1.0, 0.3], [-1.0, 0.2, 0.4]], dtype=torch.float64)

    def function(x):
        t = x @ v / 2
        return (cubic[:, 0] * t + cubic[:, 1] * t**2 + cubic[:, 2] * t**3) @ w.T

    found = coupled(*sampled(function, 120, 5), 3, basis=Basis("legendre", 3))
    assert found.cost < 1e-10 and found.unique
    cosines = torch.nn.functional.normalize(v, dim=0).T @ torch.nn.functional.normalize(found.right, dim=0)
    assert_close(cosines.abs().amax(1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)


def test_the_errors_are_those_of_the_layer():
    chain = block()
    jacobians, values, x = sampled(chain)
    found = coupled(jacobians, values, x, 3, starts=("linear",), refine="none")
    value = (found.evaluate(x) - values).norm() / (values - values.mean(1, keepdim=True)).norm()
    jacobian = (found.jacobians(x) - jacobians).norm() / jacobians.norm()
    assert_close(found.value_error, float(value))
    assert_close(found.jacobian_error, float(jacobian))
    assert_close(found.cost, float(jacobian) ** 2 + found.weight * float(value) ** 2)


def test_diagnostics_say_what_happened():
    found = coupled(*sampled(block()), 3, starts=("cp", "random", "random"), refine="none")
    assert set(found.spread) == {"cp", "random", "random 2"} and found.start in found.spread
    assert min(found.spread.values()) == found.spread[found.start]
    assert found.trace and found.kruskal[0] == 3


def test_k_ranks():
    eye = torch.eye(4)
    assert k_rank(torch.cat([eye, eye.sum(1, keepdim=True)], 1)) == 4
    assert k_rank(torch.cat([eye, eye[:, :1] + eye[:, 1:2]], 1)) == 2
    assert k_rank(torch.cat([eye, 2 * eye[:, :1]], 1)) == 1
    assert k_rank(torch.cat([eye, 0 * eye[:, :1]], 1)) == 0


def test_same_seed_same_result():
    data = sampled(block())
    runs = [coupled(*data, 4, starts=("random",), refine="none", seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].left, runs[1].left) and torch.equal(runs[0].coefficients, runs[1].coefficients)
    assert not torch.equal(runs[0].left, runs[2].left)


def test_the_input_dtype_comes_back():
    data = [part.float() for part in sampled(block())]
    found = coupled(*data, 2, starts=("linear",), refine="none")
    assert {found.left.dtype, found.right.dtype, found.bias.dtype, found.shapes.knots.dtype} == {torch.float32}


@pytest.mark.slow
def test_random_starts_find_most_small_blocks():
    successes = 0
    for seed in range(20):
        chain = block(seed=seed)
        found = coupled(*sampled(chain, seed=seed), 5, starts=("random",) * 2, seed=seed)
        successes += missed(found, chain) < 1e-3
    assert successes >= 16


BAD = [
    (dict(rank=0), "rank"),
    (dict(rank=41), "rank"),
    (dict(starts=()), "starts"),
    (dict(starts="cp"), "starts"),
    (dict(starts=("best",)), "starts"),
    (dict(starts=("algebraic",), rank=9), "algebraic"),
    (dict(solver="magic"), "solver"),
    (dict(refine="magic"), "refine"),
    (dict(weight=0.0), "weight"),
    (dict(values=torch.full((8, 40), torch.nan)), "NaN"),
    (dict(values=torch.zeros(8, 39)), "samples"),
    (dict(inputs=torch.zeros(7, 40)), "samples"),
    (dict(jacobians=torch.zeros(8, 40)), "order"),
]


@pytest.mark.parametrize(("changed", "word"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused(changed, word):
    jacobians, values, inputs = sampled(block(), 40)
    arguments = {"jacobians": jacobians, "values": values, "inputs": inputs, "rank": 3, **changed}
    with pytest.raises(DecompositionError, match=word):
        coupled(**arguments)


@pytest.mark.parametrize("options", [("cubic", 3), ("legendre", 0), ("spline", 3), ("legendre", 3, "sin")])
def test_bad_bases_are_refused(options):
    with pytest.raises(DecompositionError):
        Basis(*options)
