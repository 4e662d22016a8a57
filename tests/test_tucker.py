"""Does the Tucker decomposition keep its bounds, and does the error surface say what truncation gives?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from rankfold.decompose import tucker, tucker_errors
from rankfold.decompose._unfold import fold, khatri_rao, mode_gram, mode_product, row_gram, unfold
from rankfold.errors import DecompositionError

QUICK = settings(deadline=None, max_examples=12, derandomize=True)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tail(tensor, mode, rank):
    return float(torch.linalg.svdvals(unfold(tensor, mode))[rank:].square().sum())


def measured(tensor, factors):
    return float(torch.linalg.norm(tensor - factors.to_dense()) / torch.linalg.norm(tensor))


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=2, max_size=4))
    modes = tuple(draw(st.permutations(range(len(shape)))))[: draw(st.integers(1, len(shape)))]
    return random(*shape, seed=draw(st.integers(0, 99))), tuple(draw(st.integers(1, shape[m])) for m in modes), modes


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
@QUICK
@given(case=cases())
def test_error_is_measured_and_within_its_bounds(method, case):
    tensor, rank, modes = case
    factors = tucker(tensor, rank, modes=modes, method=method)
    assert factors.rank == rank
    assert factors.modes == modes
    assert factors.error == pytest.approx(measured(tensor, factors), abs=1e-9)
    tails = [tail(tensor, mode, r) for mode, r in zip(modes, rank, strict=True)]
    total = float(tensor.square().sum())
    assert max(tails) / total - 1e-12 <= factors.error**2 <= sum(tails) / total + 1e-12
    for factor in factors.factors:
        eye = torch.eye(factor.shape[1], dtype=torch.float64)
        assert_close(factor.T @ factor, eye, rtol=0, atol=1e-10)


@QUICK
@given(case=cases())
def test_sweeps_never_raise_the_error(case):
    tensor, rank, modes = case
    errors = [tucker(tensor, rank, modes=modes, iterations=n, tolerance=0.0).error for n in (0, 1, 3)]
    assert errors[0] + 1e-9 >= errors[1]
    assert errors[1] + 1e-9 >= errors[2]


def test_sweeps_help_and_converge():
    tensor = random(12, 10, 9)
    start, best = (tucker(tensor, (3, 3, 3), method=method) for method in ("hosvd", "hooi"))
    assert best.error < start.error
    assert (start.iterations, start.converged) == (0, True)
    assert best.converged
    assert best.iterations > 1
    assert not tucker(tensor, (3, 3, 3), iterations=1).converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_full_rank_is_exact_in_the_dtype_given(dtype):
    tensor = random(6, 5, 3, 3, dtype=dtype)
    factors = tucker(tensor, (6, 5), modes=(0, 1))
    assert factors.core.dtype == factors.factors[0].dtype == dtype
    assert_close(factors.to_dense(), tensor)
    assert factors.error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_ranks_are_recovered(dtype):
    tensor = tucker(random(9, 8, 3, 3), (4, 3), modes=(0, 1)).to_dense().to(dtype)
    factors = tucker(tensor, (4, 3), modes=(0, 1))
    assert factors.error < 10 * torch.finfo(dtype).eps


def test_one_int_is_the_rank_of_every_mode():
    assert tucker(random(5, 6, 7), 2).rank == (2, 2, 2)


@pytest.mark.parametrize("modes", [(0, 1), (1, 0), (2, 0), (-1, 1)])
def test_surface_is_the_truncated_hosvd(modes):
    tensor = random(5, 4, 3, 2)
    surface = tucker_errors(tensor, modes)
    norm, bases = torch.linalg.norm(tensor), []
    for mode in modes:
        bases.append(torch.linalg.svd(unfold(tensor, mode), full_matrices=True)[0])
    assert surface.shape == tuple(tensor.shape[mode] for mode in modes)
    for a in range(1, surface.shape[0] + 1):
        for b in range(1, surface.shape[1] + 1):
            dense = tensor
            for mode, basis, rank in zip(modes, bases, (a, b), strict=True):
                dense = mode_product(dense, basis[:, :rank] @ basis[:, :rank].T, mode)
            expected = torch.linalg.norm(tensor - dense) / norm
            assert_close(surface[a - 1, b - 1], expected, rtol=0, atol=1e-9)


def test_surface_falls_with_either_rank():
    surface = tucker_errors(random(12, 9, 3, 3).float())
    assert (surface.diff(dim=0) <= 0).all()
    assert (surface.diff(dim=1) <= 0).all()
    assert surface[-1, -1] == 0


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-660, 2.0**660])
def test_scale_does_not_matter(scale):
    tensor = random(6, 5, 4)
    one, two = tucker(tensor, 2), tucker(tensor * scale, 2)
    assert_close(two.core / scale, one.core)
    assert two.error == pytest.approx(one.error)


def test_the_zero_tensor_has_no_error():
    assert tucker(torch.zeros(4, 5, 6), 2).error == 0
    assert float(tucker_errors(torch.zeros(4, 5, 6)).max()) == 0


def test_twice_gives_the_same_bits():
    tensor = random(20, 30, 3, 3).float()
    one, two = (tucker(tensor, (5, 7), modes=(0, 1)) for _ in range(2))
    assert torch.equal(one.core, two.core)
    for a, b in zip(one.factors, two.factors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", [0, 1, 2, -1])
def test_axis_helpers_agree_with_einsum(mode):
    tensor, axes = random(3, 4, 5), "abc"
    matrix = random(6, tensor.shape[mode], seed=1)
    letter = axes[mode]
    expected = torch.einsum(f"abc,z{letter}->{axes.replace(letter, 'z')}", tensor, matrix)
    assert_close(mode_product(tensor, matrix, mode), expected)
    assert torch.equal(fold(unfold(tensor, mode), mode, tensor.shape), tensor)
    assert_close(mode_gram(tensor, mode), unfold(tensor, mode) @ unfold(tensor, mode).T)


def test_khatri_rao_and_blocked_gram():
    a, b, c = random(3, 2), random(4, 2, seed=1), random(5, 2, seed=2)
    tensor = torch.einsum("ir,jr,kr->ijk", a, b, c)
    assert_close(unfold(tensor, 0), a @ khatri_rao([b, c]).T)
    rows = random(301, 40)
    assert_close(row_gram(rows), rows @ rows.T)


BAD = {
    "rank 0": ((0, 2), {"modes": (0, 1)}, "rank of mode 0 must be a whole number >= 1, got 0; the full rank is 4"),
    "beyond full": ((2, 9), {"modes": (0, 1)}, "must be at most the full rank 5, got 9"),
    "too few ranks": ((2, 2), {}, "3 ranks are needed"),
    "unknown mode": ((2,), {"modes": (3,)}, "do not exist"),
    "no mode": ((), {"modes": ()}, "do not exist"),
    "mode twice": ((2, 2), {"modes": (0, -3)}, "twice"),
    "method": (2, {"method": "magic"}, "method must be 'hooi' or 'hosvd', got 'magic'"),
    "iterations": (2, {"iterations": -1}, "iterations must be a whole number >= 0, got -1"),
}


@pytest.mark.parametrize("rank, options, message", BAD.values(), ids=BAD)
def test_bad_options_are_refused(rank, options, message):
    with pytest.raises(DecompositionError) as caught:
        tucker(random(4, 5, 6), rank, **options)
    assert message in str(caught.value)


def test_a_surface_needs_two_modes():
    with pytest.raises(DecompositionError, match="over two modes|name a mode twice"):
        tucker_errors(random(4, 5, 6), (1, 1))
    assert math.isfinite(float(tucker_errors(random(4, 5)).sum()))
