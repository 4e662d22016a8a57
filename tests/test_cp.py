"""Is CP exact where it can be, honest about its error, and bounded where no best approximation exists?"""

import math
import warnings
from functools import partial

import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import parafac
from torch.testing import assert_close

from rankfold.decompose import CP, cp, cp_errors, full_cp_rank
from rankfold.decompose._cp_als import (
    Terms,
    products,
    relative,
    run_sweeps,
    solve,
    solve_within,
    split_modes,
    squared_residual,
)
from rankfold.decompose._cp_correction import HEALTHY, SLACK, correct, degeneracy
from rankfold.decompose._cp_start import STARTS, algebraic, compress, dense, expand, nested, random
from rankfold.decompose._unfold import khatri_rao, unfold
from rankfold.errors import DecompositionError

SHAPES = [(5, 4), (6, 7, 3), (16, 12, 9), (3, 40, 4), (4, 5, 3, 3), (3, 3, 2, 3, 2)]
few = partial(settings, deadline=None, derandomize=True)
close = partial(assert_close, atol=1e-10, rtol=1e-10)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(shape, rank, seed=0):
    return CP(tuple(gaussian(dim, rank, seed=seed + 10 * k) for k, dim in enumerate(shape))).to_dense()


def kernel_like(shape=(16, 12, 9), seed=0):
    """A tensor with a decaying spectrum in its first mode, as trained kernels have, plus noise."""
    decay = 0.8 ** torch.arange(shape[0], dtype=torch.float64)
    return decay.reshape(-1, *[1] * (len(shape) - 1)) * gaussian(*shape, seed=seed)


def border_tensor():
    """x o x o y + x o y o x + y o x o x: of rank 3, and a limit of tensors of rank 2."""
    x, y = torch.eye(2, dtype=torch.float64)
    return sum(torch.einsum("i,j,k->ijk", *term) for term in ((x, x, y), (x, y, x), (y, x, x)))


def actual(tensor, result):
    return float((result.to_dense().double() - tensor.double()).norm() / tensor.double().norm())


# exact?


@few(max_examples=12)
@given(st.lists(st.integers(3, 8), min_size=2, max_size=4), st.integers(1, 8), st.integers(0, 10**6))
def test_low_rank_tensors_are_recovered(dims, rank, seed):
    rank = min(rank, sorted(dims)[-2])
    tensor = low_rank(dims, rank, seed)
    result = cp(tensor, rank, max_degeneracy=math.inf)
    assert result.error < 1e-8
    assert_close(result.to_dense(), tensor, rtol=0, atol=1e-7 * float(tensor.norm()))


def test_factors_of_a_unique_decomposition_are_recovered():
    truth = [gaussian(dim, 4, seed=dim) for dim in (6, 7, 5)]
    found = cp(CP(tuple(truth)).to_dense(), 4).factors
    for a, b in zip(truth, found, strict=True):
        cosines = (a / a.norm(dim=0)).T @ (b / b.norm(dim=0))
        assert_close(cosines.abs().max(0).values, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact(shape):
    tensor = gaussian(*shape)
    result = cp(tensor, full_cp_rank(shape))
    assert result.error < 1e-12
    assert result.degeneracy == pytest.approx(1, abs=1e-9)
    close(result.to_dense(), tensor)


def test_rank_to_spare_is_padded_with_zeros():
    tensor = low_rank((8, 8, 8), 2)
    result = cp(tensor, 5)
    assert result.error < 1e-10
    for factor in result.factors:
        assert factor[:, 2:].abs().max() == 0
        assert factor[:, :2].abs().max() > 0


def test_zero_tensor():
    result = cp(torch.zeros(3, 4, 5), 3)
    assert (result.error, result.degeneracy, result.sensitivity) == (0, 0, 0)
    close(result.to_dense(), torch.zeros(3, 4, 5))
    assert cp_errors(torch.zeros(3, 4, 5), [1, 2]) == [0, 0]


def test_order_two_is_the_svd():
    matrix = gaussian(9, 6)
    values = torch.linalg.svdvals(matrix)
    assert cp(matrix, 3).error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_nested_svd_terms_are_orthogonal(shape):
    tensor = gaussian(*shape)
    terms = nested(tensor, full_cp_rank(shape))
    close(dense(terms), tensor)
    gram = torch.stack([rows @ rows.T for rows in terms.rows]).prod(0) * torch.outer(terms.weights, terms.weights)
    close(gram, terms.weights.square().diag())


@pytest.mark.parametrize("shape, rank", [((8, 9, 10), 5), ((20, 20, 9), 20), ((5, 6, 3, 3), 4), ((7, 6, 1), 3)])
def test_algebraic_start_needs_no_sweeps(shape, rank):
    tensor = low_rank(shape, rank)
    close(dense(algebraic(tensor, rank, 0)), tensor)


def test_algebraic_start_knows_where_it_cannot_begin():
    assert algebraic(gaussian(4, 4, 4), 6, 0) is None
    with pytest.raises(DecompositionError, match="algebraic"):
        cp(gaussian(4, 4, 4), 6, starts=("algebraic",))


# honest?


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("start", STARTS)
def test_trace_never_rises_and_the_error_is_the_actual_one(shape, rank, start):
    tensor = kernel_like(shape)
    if rank > sorted(shape)[-2] and start == "algebraic":
        return
    result = cp(tensor, rank, starts=(start,), iterations=60)
    assert all(after <= before + 1e-12 for before, after in zip(result.trace, result.trace[1:], strict=False))
    assert result.error == pytest.approx(actual(tensor, result), rel=1e-9)
    assert result.iterations == len(result.trace) <= 60
    if result.degeneracy < 9.9:  # no correction was made
        assert result.error == pytest.approx(result.trace[-1], rel=1e-9)


def test_error_is_resolved_below_the_cancellation_of_the_fit():
    tensor = low_rank((9, 8, 7), 3) + 1e-9 * gaussian(9, 8, 7, seed=5)
    result = cp(tensor, 3)
    assert 0 < result.error < 1e-9
    assert result.trace[-1] == pytest.approx(actual(tensor, result), rel=1e-3)


def test_single_precision_reports_the_actual_error():
    tensor = kernel_like((32, 24, 9))
    result = cp(tensor, 12, dtype=torch.float32)
    assert result.error == pytest.approx(actual(tensor, result), rel=1e-5)
    assert result.error == pytest.approx(cp(tensor, 12).error, rel=0.02)


@pytest.mark.parametrize("shape, rank", [((16, 12, 9), 6), ((16, 12, 9), 24), ((8, 7, 3, 3), 6)])
def test_no_worse_than_tensorly(shape, rank):
    tensor = kernel_like(shape, seed=1)
    with tensorly.backend_context("pytorch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [
            parafac(tensor, rank, n_iter_max=200, init=init, tol=1e-10, random_state=0, return_errors=True)[1][-1]
            for init in ("random", "svd")
        ]
    assert cp(tensor, rank).error <= 1.02 * float(min(theirs))


def test_sweep_is_that_of_tensorly():
    tensor, first = gaussian(10, 9, 8), random(gaussian(10, 9, 8), 5, seed=3)
    run = run_sweeps(split_modes(tensor), Terms(first.weights, list(first.rows)), 3, 0.0)
    with tensorly.backend_context("pytorch"):
        start = tensorly.cp_tensor.CPTensor((first.weights, [rows.T for rows in first.rows]))
        errors = parafac(tensor, 5, n_iter_max=3, init=start, tol=1e-16, return_errors=True)[1]
    assert run.trace == pytest.approx([float(error) for error in errors], rel=1e-9)  # the modes' order is the same


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_mttkrp(shape):
    tensor = gaussian(*shape)
    rows = [gaussian(4, dim, seed=k) for k, dim in enumerate(shape)]
    seen = []
    for mode, product in products(split_modes(tensor), rows):
        others = [r.T for k, r in enumerate(rows) if k != mode]
        close(product.T, unfold(tensor, mode) @ khatri_rao(others))
        rows[mode] = gaussian(4, shape[mode], seed=50 + mode)  # the next product has to see the change
        seen.append(mode)
    assert sorted(seen) == list(range(len(shape)))


@pytest.mark.parametrize("shape, rank", [((16, 12, 9), 4), ((3, 40, 4), 12), ((30, 3, 3), 5)])
def test_compressed_core_gives_the_error_on_the_tensor(shape, rank):
    tensor = kernel_like(shape)
    whole = split_modes(tensor)
    core, bases = compress(tensor, rank)
    assert all(dim <= rank for dim in core.shape)
    run = run_sweeps(split_modes(core, whole), nested(core, rank), 3, 0.0)
    assert run.trace[-1] == pytest.approx(
        relative(squared_residual(whole, expand(run.terms, bases)), whole.total), rel=1e-9, abs=1e-13
    )


# bounded?


@pytest.mark.parametrize("limit, expected", [(10.0, 0.0101), (100.0, 1e-3), (1000.0, 1e-4)])
def test_border_rank_is_bounded_at_the_best_error_for_the_bound(limit, expected):
    # the best family, ((x + h y)^3 - (x - h y)^3) / 2h, has D = 1 / 6 h^2 and a relative error of h^2 / sqrt(3)
    result = cp(border_tensor(), 2, max_degeneracy=limit, iterations=500)
    assert result.degeneracy <= limit * (1 + 1e-9)
    assert result.error == pytest.approx(expected, rel=0.1)
    assert all(factor.abs().max() < 10 for factor in result.factors)


def test_without_a_bound_the_same_tensor_degenerates():
    assert cp(border_tensor(), 2, max_degeneracy=math.inf).degeneracy > 1e4


@few(max_examples=8)
@given(st.integers(0, 10**6))
def test_degeneracy_is_never_above_the_bound(seed):
    result = cp(gaussian(2, 2, 2, seed=seed), 2, iterations=300)
    assert result.degeneracy <= 100 * (1 + 1e-9)
    norms = torch.stack([factor.norm(dim=0) for factor in result.factors]).prod(0)
    total = gaussian(2, 2, 2, seed=seed).square().sum()
    assert result.degeneracy == pytest.approx(float(norms.square().sum() / total), rel=1e-6)


@pytest.mark.parametrize("allowed", [0.02, 5e-3, 2e-3])
def test_correction_keeps_the_error_and_shrinks_the_terms(allowed):
    split = split_modes(border_tensor(), max_degeneracy=100.0)
    terms = run_sweeps(split, algebraic(border_tensor(), 2, 0), 300, 0.0).terms
    assert degeneracy(terms, split.total) > 90
    smaller = correct(split, terms, allowed)
    assert relative(squared_residual(split, smaller), split.total) <= allowed * (1 + 1e-6)
    least = 1 / (6 * math.sqrt(3) * allowed)  # of the family above
    assert degeneracy(smaller, split.total) < max(HEALTHY, 1.2 * least)


def test_correction_is_part_of_cp():
    result = cp(border_tensor(), 2)
    assert result.trace[-1] * (1 + 1e-4) < result.error <= result.trace[-1] * SLACK * (1 + 1e-6)


def test_solve_falls_back_where_cholesky_breaks_down():
    basis = gaussian(5, 2)
    gram, truth = basis @ basis.T, basis @ gaussian(2, 3, seed=1)
    gram = gram - 1e-6 * torch.eye(5, dtype=torch.float64)
    found = solve(gram, gram @ truth, torch.zeros(5, 3, dtype=torch.float64))
    close(gram @ found, gram @ truth, atol=1e-5, rtol=1e-5)


def test_solve_within_meets_the_ceiling():
    rows = gaussian(4, 6)
    gram, product = rows @ rows.T, gaussian(4, 3, seed=2)
    free = solve(gram, product, torch.zeros(4, 3, dtype=torch.float64))
    ceiling = float(free.square().sum()) / 3
    found = solve_within(gram, product, ceiling)
    assert float(found.square().sum()) == pytest.approx(ceiling, rel=1e-6)
    # optimal: the gradient of the fit points along the solution
    gradient = product - gram @ found
    assert_close(torch.cosine_similarity(gradient.flatten(), found.flatten(), 0), torch.tensor(1.0).double())


# in its final form?


def test_scale_order_and_signs():
    result = cp(kernel_like(), 7, iterations=30)
    norms = torch.stack([factor.norm(dim=0) for factor in result.factors])
    close(norms, norms[:1].expand_as(norms))
    assert (norms[0].diff() <= 0).all()
    for factor in result.factors[:-1]:
        assert (factor.gather(0, factor.abs().argmax(0, keepdim=True)) > 0).all()


def test_sensitivity_is_the_response_to_noise():
    result = cp(kernel_like((6, 5, 4)), 3)
    noise, draws = 1e-5, 4000
    generator = torch.Generator().manual_seed(0)
    noisy = [f + noise * torch.randn(draws, *f.shape, generator=generator, dtype=f.dtype) for f in result.factors]
    change = torch.einsum("nir,njr,nkr->nijk", *noisy) - result.to_dense()
    assert result.sensitivity == pytest.approx(float(change.square().sum()) / draws / noise**2, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    tensor = kernel_like().to(dtype)
    result = cp(tensor, 4, iterations=20)
    assert {(f.dtype, f.device, f.is_contiguous()) for f in result.factors} == {(dtype, tensor.device, True)}
    back = CP(tuple(factor.double() for factor in result.factors))
    assert result.error == pytest.approx(actual(tensor, back), rel=1e-9)
    assert result.error == pytest.approx(cp(tensor.double(), 4, iterations=20).error, rel=0.01)


def test_same_seed_same_factors_and_no_global_randomness():
    tensor, state = kernel_like(), torch.get_rng_state()
    pair = [cp(tensor, 5, seed=7, iterations=20) for _ in range(2)]
    for a, b in zip(pair[0].factors, pair[1].factors, strict=True):
        assert torch.equal(a, b)
    assert cp_errors(tensor, [2, 5], seed=1) == cp_errors(tensor, [2, 5], seed=1)
    assert torch.equal(state, torch.get_rng_state())
    other = cp(tensor, 5, seed=8, starts=("random",), iterations=2)
    assert not torch.equal(other.factors[0], cp(tensor, 5, seed=7, starts=("random",), iterations=2).factors[0])


def test_gradients_do_not_flow():
    assert not cp(kernel_like().requires_grad_(), 2, iterations=2).factors[0].requires_grad


# warm starts


def test_warm_start_goes_on_from_where_it_is():
    tensor = kernel_like()
    first = cp(tensor, 6, iterations=15)
    again = cp(tensor, 6, initial=first, starts=(), iterations=5)
    assert again.trace[0] <= first.error + 1e-12


def test_warm_start_is_extended_by_terms_of_its_residual():
    tensor = kernel_like()
    first = cp(tensor, 4)
    more = cp(tensor, 7, initial=first, starts=(), iterations=1)
    assert more.rank == 7
    assert more.error < 0.95 * first.error


def test_warm_start_of_another_tensor_is_refused():
    with pytest.raises(DecompositionError, match=r"dims \(5, 4, 3\)"):
        cp(kernel_like(), 4, initial=cp(gaussian(5, 4, 3), 2))
    with pytest.raises(DecompositionError, match="at most this rank"):
        cp(kernel_like(), 2, initial=cp(kernel_like(), 3, iterations=2))


# the error at many ranks


def test_error_curve_falls_and_follows_the_fits():
    tensor = kernel_like()
    ranks = list(range(1, 61))
    curve = cp_errors(tensor, ranks)
    assert all(after <= before for before, after in zip(curve, curve[1:], strict=False))
    for rank in (3, 20):
        assert curve[rank - 1] == pytest.approx(cp(tensor, rank, iterations=60).error, abs=0.04)


def test_error_curve_keeps_the_order_asked_for_and_ends_exactly():
    tensor = kernel_like((6, 5, 4))
    curve = cp_errors(tensor, [20, 1, 7], dtype=torch.float64)
    assert curve[0] < 1e-10 < curve[2] < curve[1]
    assert curve[1] == pytest.approx(cp(tensor, 1).error, rel=1e-2)
    fit = cp(tensor, 7, iterations=30, tolerance=1e-4, max_degeneracy=math.inf)
    assert cp_errors(tensor, [7], dtype=torch.float64) == pytest.approx([fit.trace[-1]], rel=1e-6)


# refused?

BAD = {
    "rank 0": (lambda x: cp(x, 0), "rank must be a whole number >= 1, got 0"),
    "rank beyond full": (lambda x: cp(x, 21), "full rank 20"),
    "NaN": (lambda x: cp(x / 0 * 0, 2), "NaN or Inf"),
    "order 1": (lambda x: cp(x.flatten(), 2), "order 2 or more"),
    "integers": (lambda x: cp(x.long(), 2), "int64"),
    "meta": (lambda x: cp(x.to("meta"), 2), "meta device"),
    "half arithmetic": (lambda x: cp(x, 2, dtype=torch.float16), "float16"),
    "no sweeps": (lambda x: cp(x, 2, iterations=0), "iterations"),
    "negative tolerance": (lambda x: cp(x, 2, tolerance=-1.0), "tolerance"),
    "no starts": (lambda x: cp(x, 2, starts=()), "starts"),
    "unknown start": (lambda x: cp(x, 2, starts=("svd",)), "hosvd"),
    "a string of starts": (lambda x: cp(x, 2, starts="hosvd"), "starts"),
    "bound below 1": (lambda x: cp(x, 2, max_degeneracy=0.5), "max_degeneracy"),
    "bound NaN": (lambda x: cp(x, 2, max_degeneracy=math.nan), "max_degeneracy"),
    "no ranks": (lambda x: cp_errors(x, []), "at least one rank"),
    "curve beyond full": (lambda x: cp_errors(x, [2, 21]), "full rank 20"),
    "curve of rank 0": (lambda x: cp_errors(x, [0, 2]), "rank must be a whole number >= 1, got 0"),
    "one anchor": (lambda x: cp_errors(x, [1, 2], anchors=1), "anchors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(DecompositionError, match=message):
        call(gaussian(6, 5, 4))
