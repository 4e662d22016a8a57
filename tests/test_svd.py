"""Is the truncated SVD optimal, is its error the tail energy, and does every method and metric keep its word?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rankfold.decompose import singular_values, svd
from rankfold.errors import DecompositionError

QUICK = settings(deadline=None, max_examples=25, derandomize=True)
METHODS = ("auto", "exact", "gram", "randomised")


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def decaying(m, n, decay=0.4, seed=0):
    """A matrix with singular values i^-decay."""
    small = min(m, n)
    left, right = torch.linalg.qr(random(m, small, seed=seed))[0], torch.linalg.qr(random(n, small, seed=seed + 1))[0]
    return (left * torch.arange(1, small + 1, dtype=torch.float64) ** -decay) @ right.T


def tail(matrix, rank):
    energies = torch.linalg.svdvals(matrix.double()).square()
    return math.sqrt(float(energies[rank:].sum() / energies.sum()))


def measured(matrix, factors):
    dense = (factors.u.double() * factors.s.double()) @ factors.vh.double()
    return float(torch.linalg.norm(matrix.double() - dense) / torch.linalg.norm(matrix.double()))


@st.composite
def cases(draw):
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    return random(m, n, seed=draw(st.integers(0, 99)), dtype=dtype), draw(st.integers(1, min(m, n)))


@pytest.mark.parametrize("method", METHODS)
@QUICK
@given(case=cases())
def test_error_is_the_tail_energy(method, case):
    matrix, rank = case
    factors = svd(matrix, rank, method=method)
    assert factors.rank == rank
    assert factors.u.dtype == factors.s.dtype == factors.vh.dtype == matrix.dtype
    slack = 2e-3 if method == "randomised" else 1e-5
    assert factors.error == pytest.approx(tail(matrix, rank), rel=slack, abs=2e-6)
    rounding = 4 * torch.finfo(matrix.dtype).eps
    assert measured(matrix, factors) == pytest.approx(factors.error, abs=max(rounding, 1e-9))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (20, 20), (1, 7), (7, 1)])
def test_full_rank_is_exact_and_orthonormal(method, shape):
    matrix = random(*shape)
    factors = svd(matrix, min(shape), method=method)
    assert factors.error < 1e-13
    assert_close(factors.to_dense(), matrix, rtol=0, atol=1e-12)
    eye = torch.eye(min(shape), dtype=torch.float64)
    assert_close(factors.u.T @ factors.u, eye, rtol=0, atol=1e-10)
    assert_close(factors.vh @ factors.vh.T, eye, rtol=0, atol=1e-10)
    assert_close(factors.s, torch.linalg.svdvals(matrix))


def test_factors_are_balanced_and_signs_fixed():
    matrix = decaying(20, 30)
    factors = svd(matrix, 5)
    left, right = factors.balanced()
    assert_close(left @ right, factors.to_dense())
    assert_close(left.norm(dim=0), right.norm(dim=1))
    assert (factors.u.gather(0, factors.u.abs().argmax(0, keepdim=True)) > 0).all()
    assert factors.num_params == 5 * 50


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tolerance", [0.9, 0.3, 0.03])
def test_tolerance_is_kept_by_the_least_rank(method, tolerance):
    matrix = decaying(80, 120, decay=1.0)
    factors = svd(matrix, tolerance=tolerance, method=method)
    assert factors.error <= tolerance
    least = next(r for r in range(1, 81) if tail(matrix, r) <= tolerance)
    assert factors.rank == least if method != "randomised" else least <= factors.rank <= least + 2


def test_zero_tolerance_is_the_numerical_rank():
    assert svd(random(30, 6) @ random(6, 40), tolerance=0.0).rank == 6


@pytest.mark.parametrize("decay", [0.3, 0.5])
def test_large_matrices_take_the_krylov_basis_and_stay_near_the_optimum(decay):
    matrix = decaying(1024, 1100, decay).float()
    factors = svd(matrix, 64)
    least = tail(matrix, 64)
    assert factors.method == "randomised"
    assert least * (1 - 1e-6) <= factors.error <= 1.002 * least
    assert measured(matrix, factors) == pytest.approx(factors.error, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_low_rank_matrices_are_found_exactly(dtype):
    matrix = (random(1100, 9) @ random(9, 1030)).to(dtype)
    factors = svd(matrix, 9)
    assert factors.error < 20 * torch.finfo(dtype).eps
    more = svd(matrix, 20)  # beyond the numerical rank
    assert more.rank == 20
    assert measured(matrix, more) < 20 * torch.finfo(dtype).eps


def test_a_large_tolerance_on_a_large_matrix_is_certified():
    matrix = decaying(1100, 1030, decay=1.0)
    factors = svd(matrix, tolerance=0.2)
    assert factors.method == "randomised"
    assert measured(matrix, factors) <= 0.2
    assert tail(matrix, factors.rank - 2) > 0.2


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-200, 1e200])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method, scale):
    matrix = decaying(30, 40)
    factors = svd(matrix * scale, 5, method=method)
    assert_close(factors.s / scale, svd(matrix, 5, method=method).s)


@pytest.mark.parametrize("method", METHODS)
def test_the_zero_matrix_has_no_error(method):
    factors = svd(torch.zeros(6, 9), 2, method=method)
    assert factors.error == 0
    assert_close(factors.to_dense(), torch.zeros(6, 9))


def test_the_same_seed_gives_the_same_bits():
    matrix = decaying(200, 150).float()
    one, two = (svd(matrix, 10, method="randomised", seed=3) for _ in range(2))
    assert torch.equal(one.u, two.u)
    assert torch.equal(one.vh, two.vh)
    state = torch.random.get_rng_state()
    svd(matrix, 10, method="randomised")
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_input_is_not_changed():
    matrix = decaying(20, 30).requires_grad_()
    before = matrix.detach().clone()
    factors = svd(matrix, 4)
    assert torch.equal(matrix.detach(), before)
    assert not factors.u.requires_grad


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
@pytest.mark.parametrize("method", ["auto", "exact", "gram"])
def test_projection_form_is_the_whitening_form(shape, method):
    matrix, inputs = random(*shape), random(200, shape[1], seed=5) * torch.linspace(0.2, 3, shape[1])
    moment = inputs.T @ inputs / 200
    factors = svd(matrix, 4, second_moment=moment, method=method)
    lower = torch.linalg.cholesky(moment)
    u, s, vh = torch.linalg.svd(matrix @ lower, full_matrices=False)
    whitened = torch.linalg.solve_triangular(lower.T, ((u[:, :4] * s[:4]) @ vh[:4]).T, upper=True).T
    assert_close(factors.to_dense(), whitened, rtol=0, atol=1e-10)
    assert factors.error == pytest.approx(measured(matrix, factors), abs=1e-12)
    assert factors.error > svd(matrix, 4).error


def test_projection_form_takes_a_singular_moment_and_a_tolerance_in_the_metric():
    matrix, inputs = random(10, 20), random(5, 20, seed=5)
    moment = inputs.T @ inputs / 5
    factors = svd(matrix, 5, second_moment=moment)
    assert_close(inputs @ factors.to_dense().T, inputs @ matrix.T)
    within = svd(matrix, tolerance=0.5, second_moment=moment)
    lost = matrix - within.to_dense()
    assert (lost @ moment @ lost.T).trace() <= 0.25 * (matrix @ moment @ matrix.T).trace()
    assert within.rank < 5


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (20, 20), (1, 5)])
def test_all_singular_values(shape):
    matrix = random(*shape)
    assert_close(singular_values(matrix), torch.linalg.svdvals(matrix))
    deficient = random(shape[0], 1) @ random(1, shape[1])
    assert_close(singular_values(deficient), torch.linalg.svdvals(deficient), rtol=1e-9, atol=1e-12)


MOMENTS = {
    "wrong size": (torch.eye(3), "is (5, 5), not (3, 3)"),
    "not symmetric": (torch.eye(5) + torch.triu(torch.ones(5, 5), 1), "not symmetric"),
    "indefinite": (torch.diag(torch.tensor([1.0, 1, 1, 1, -1])), "positive semi-definite"),
    "zero": (torch.zeros(5, 5), "zero"),
    "nan": (torch.full((5, 5), math.nan), "NaN"),
}


@pytest.mark.parametrize("shape", [(9, 5), (5, 5)])
@pytest.mark.parametrize("moment, message", MOMENTS.values(), ids=MOMENTS)
def test_bad_moments_are_refused(shape, moment, message):
    with pytest.raises(DecompositionError) as caught:
        svd(random(*shape), 2, second_moment=moment)
    assert message in str(caught.value)


BAD = {
    "neither": ({}, "rank or a tolerance"),
    "both": ({"rank": 1, "tolerance": 0.1}, "rank or a tolerance"),
    "method": ({"rank": 1, "method": "magic"}, "'gram' or 'randomised', got 'magic'"),
    "tolerance": ({"tolerance": 1.5}, "tolerance must be a number with 0 <= x < 1, got 1.5"),
    "unresolved": ({"tolerance": 1e-9, "method": "gram"}, "method='exact'"),
    "moment": ({"rank": 1, "method": "randomised", "second_moment": torch.eye(4)}, "no second moment"),
}


@pytest.mark.parametrize("options, message", BAD.values(), ids=BAD)
def test_bad_options_are_refused(options, message):
    with pytest.raises(DecompositionError) as caught:
        svd(random(3, 4), **options)
    assert message in str(caught.value)


def test_half_precision_that_cannot_hold_the_values_says_so():
    with pytest.raises(DecompositionError, match="beyond torch.float16"):
        svd(torch.full((64, 64), 6e4, dtype=torch.float16), 1)
