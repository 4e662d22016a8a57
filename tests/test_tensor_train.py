"""Are tensor trains within their errors and bounds, and is rounding exact where nothing has to go?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankfold.decompose import (
    TT,
    _tt,
    balanced_shape,
    bonds,
    pair_modes,
    tensor_train,
    tt_matrix,
    tt_round,
    tt_roundings,
    tt_spectra,
)
from rankfold.errors import DecompositionError

few = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.float64])


def tensor_of(shape, seed, dtype=torch.float64, decay=0.0):
    """Random values; with `decay` a sum of products whose terms fall off, as trained weights do."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    if decay:
        tensor = tensor * decay
        for k in range(4):
            term = torch.ones((), dtype=torch.float64)
            for dim in shape:
                term = term[..., None] * torch.randn(dim, generator=generator, dtype=torch.float64)
            tensor = tensor + term * 0.3**k
    return tensor.to(dtype)


def error_of(train, tensor):
    dense = tensor.double()
    return float((train.to_dense().double() - dense).norm() / dense.norm())


@given(shape=shapes, seed=st.integers(0, 99), cap=st.integers(1, 40), dtype=dtypes, decay=st.sampled_from([0.0, 0.01]))
@few
def test_the_error_is_reported_and_within_its_bound(shape, seed, cap, dtype, decay):
    tensor = tensor_of(shape, seed, dtype, decay)
    cap = min(cap, max(bonds(shape, None)))
    train = tensor_train(tensor, cap)
    assert train.cores[0].dtype == dtype
    assert all(r <= cap for r in train.rank)
    actual = error_of(train, tensor)
    assert actual <= train.bound
    assert actual == pytest.approx(train.error, rel=1e-3, abs=1e-6 if dtype == torch.float32 else 1e-12)
    tails = [float(s[r:].square().sum()) for s, r in zip(tt_spectra(tensor), train.rank, strict=True)]
    assert train.error <= math.sqrt(sum(tails)) / float(tensor.double().norm()) * (1 + 1e-3) + 1e-6
    assert train.error >= math.sqrt(max(tails)) / float(tensor.double().norm()) * (1 - 1e-3) - 1e-6


@given(shape=shapes, seed=st.integers(0, 99), tolerance=st.sampled_from([0.5, 0.1, 1e-2, 1e-6, 1e-9]), dtype=dtypes)
@few
def test_a_tolerance_is_honoured(shape, seed, tolerance, dtype):
    tensor = tensor_of(shape, seed, dtype, 1e-4)
    train = tensor_train(tensor, tolerance=tolerance)
    assert train.error <= tolerance * (1 + 1e-9)
    assert error_of(train, tensor) <= tolerance + (1e-6 if dtype == torch.float32 else 1e-12)


def test_a_tolerance_finds_the_ranks_that_are_there():
    cores = [torch.randn(r, 6, s, dtype=torch.float64) for r, s in [(1, 2), (2, 3), (3, 2), (2, 1)]]
    tensor = TT(tuple(cores)).to_dense()
    assert tensor_train(tensor, tolerance=1e-10).rank == (2, 3, 2)
    assert tensor_train(tensor.float(), tolerance=1e-5).rank == (2, 3, 2)
    assert error_of(tensor_train(tensor, (2, 3, 2)), tensor) < 1e-13


@given(shape=shapes, seed=st.integers(0, 99), dtype=dtypes)
@few
def test_full_rank_is_exact(shape, seed, dtype):
    tensor = tensor_of(shape, seed, dtype)
    train = tensor_train(tensor)
    assert train.rank == bonds(shape, None)
    assert error_of(train, tensor) < (1e-13 if dtype == torch.float64 else 1e-6)


@given(shape=shapes, seed=st.integers(0, 99), inflate=st.integers(1, 4))
@few
def test_rounding_takes_inflated_bonds_away_and_changes_nothing(shape, seed, inflate):
    small = tensor_train(tensor_of(shape, seed), 1)
    generator = torch.Generator().manual_seed(seed)
    cores = list(small.cores)
    for k in range(len(cores) - 1):  # a bond of 1 widened by a basis and its pseudo-inverse
        wide = torch.randn(cores[k].shape[2], cores[k].shape[2] + inflate, generator=generator, dtype=torch.float64)
        cores[k], cores[k + 1] = cores[k] @ wide, torch.tensordot(torch.linalg.pinv(wide), cores[k + 1], 1)
    inflated = TT(tuple(cores))
    assert min(inflated.rank) > 1
    for rounded in (tt_round(inflated, 1), tt_round(inflated, tolerance=1e-12)):
        assert set(rounded.rank) == {1}
        torch.testing.assert_close(rounded.to_dense(), small.to_dense())


@given(shape=shapes, seed=st.integers(0, 99), cap=st.integers(1, 8))
@few
def test_rounding_is_as_good_as_decomposing_anew(shape, seed, cap):
    tensor = tensor_of(shape, seed, decay=0.02)
    cap = min(cap, max(bonds(shape, None)))
    rounded, anew = tt_round(tensor_train(tensor), cap), tensor_train(tensor, cap)
    assert error_of(rounded, tensor) == pytest.approx(rounded.error, rel=1e-6, abs=1e-12)
    assert rounded.error <= math.sqrt(len(shape) - 1) * anew.error + 1e-12  # both are quasi-optimal
    assert rounded.error <= rounded.bound


def test_the_curve_of_errors_is_measured():
    tensor = tensor_of((6, 5, 4, 6), 3, decay=0.2)
    ranks = [2, 24, (3, 4, 2), 1]
    found = tt_roundings(tensor, ranks)
    for train in found:
        assert error_of(train, tensor) == pytest.approx(train.error, rel=1e-6, abs=1e-7)
    assert found[1].error < 1e-12 < found[0].error < found[3].error
    assert tt_roundings(tensor, []) == ()


def test_the_krylov_basis_loses_nothing_that_counts(monkeypatch):
    tensor = tensor_of((32, 32, 32), 0)
    quick = tensor_train(tensor, 24)
    monkeypatch.setattr(_tt, "LARGE", 10**9)
    whole = tensor_train(tensor, 24)
    assert whole.error <= quick.error <= whole.error * 1.001
    matrix = torch.randn(800, 800, dtype=torch.float64)  # large enough for the basis
    monkeypatch.undo()
    quick = tensor_train(matrix, 20)
    monkeypatch.setattr(_tt, "LARGE", 10**9)
    assert tensor_train(matrix, 20).error <= quick.error <= tensor_train(matrix, 20).error * 1.0006
    assert error_of(quick, matrix) == pytest.approx(quick.error, rel=1e-9)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (11, 17), (7, 20)])
def test_a_tt_matrix_has_paired_modes_and_pads(rows, columns):
    matrix = torch.randn(rows, columns, dtype=torch.float64)
    full = tt_matrix(matrix, (3, 4), (4, 5))
    assert (full.out_shape, full.in_shape, full.rank) == ((3, 4), (4, 5), (12,))
    padded = torch.zeros(12, 20, dtype=torch.float64)
    padded[:rows, :columns] = matrix
    torch.testing.assert_close(full.to_dense(), padded)
    some = tt_matrix(matrix, (3, 4), (4, 5), 5)
    rounded = tt_round(full, 5)
    assert float((some.to_dense() - padded).norm() / padded.norm()) == pytest.approx(some.error)
    torch.testing.assert_close(rounded.to_dense(), some.to_dense())
    # a Kronecker product is a train of rank one
    kron = torch.kron(torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64))
    assert tt_matrix(kron, (3, 4), (4, 5), tolerance=1e-9).rank == (1,)


def test_the_same_input_gives_the_same_bits():
    tensor = tensor_of((32, 32, 32), 0, torch.float32)
    for one, other in zip(tensor_train(tensor, 16).cores, tensor_train(tensor, 16).cores, strict=True):
        assert torch.equal(one, other)


@given(n=st.integers(1, 3000), order=st.integers(1, 6))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_balanced_shapes_cover(n, order):
    shape = balanced_shape(n, order)
    assert len(shape) == order
    assert math.prod(shape) >= n
    assert list(shape) == sorted(shape)
    assert order == 1 or math.prod(shape) <= 2 * n or math.prod(shape) == 2 ** (n - 1).bit_length()


@pytest.mark.parametrize(
    ("n", "order", "shape"),
    [(4096, 4, (8, 8, 8, 8)), (101, 2, (10, 11)), (262144, 6, (8,) * 6), (1, 3, (1, 1, 1)), (30522, 3, (31, 31, 32))],
)
def test_balanced_shapes_of_known_sizes(n, order, shape):
    assert balanced_shape(n, order) == shape


CUBE = torch.ones(4, 4, 4)
BAD = [
    (lambda: tensor_train(CUBE, 0), "must be a whole number >= 1, got 0; the full rank is 4"),
    (lambda: tensor_train(CUBE, 5), "at most the full rank 4, got 5"),
    (lambda: tensor_train(CUBE, (2, 2, 2)), "2 bonds"),
    (lambda: tensor_train(CUBE, (4, 5)), r"rank\[1\]"),
    (lambda: tensor_train(torch.ones(4, 4, 4, 4), (1, 16, 4)), "cannot be filled"),
    (lambda: tensor_train(CUBE, 2, tolerance=0.1), "not both"),
    (lambda: tensor_train(CUBE, tolerance=1.5), "tolerance"),
    (lambda: tensor_train(CUBE * float("nan"), 2), "NaN or Inf"),
    (lambda: tensor_train(CUBE.long(), 2), "dtype"),
    (lambda: tensor_train(CUBE.to("meta"), 2), "meta device"),
    (lambda: tensor_train(torch.ones(4), 1), "order 2 or more"),
    (lambda: tensor_train(CUBE, 2, dtype=torch.float16), "float64 or torch.float32"),
    (lambda: tt_matrix(torch.ones(12, 12), (3, 4), (3, 3), 1), "does not cover 12"),
    (lambda: tt_matrix(torch.ones(12, 12), (3, 4), (12,), 1), "equal lengths"),
    (lambda: tt_matrix(CUBE, (2, 2), (2, 2), 1), "from a matrix"),
    (lambda: tt_round(tensor_train(CUBE), 9), "at most the full rank 4, got 9"),
    (lambda: balanced_shape(0, 2), "n must be a whole number >= 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(DecompositionError, match=message):
        call()


def test_the_zero_tensor_is_a_train():
    train = tensor_train(torch.zeros(3, 4, 5), 2)
    assert train.error == 0
    assert not train.to_dense().any()
    assert tensor_train(torch.zeros(3, 4, 5), tolerance=0.1).rank == (1, 1)


def test_pairs_are_merged_row_first():
    matrix = torch.arange(24.0).reshape(4, 6)
    folded = pair_modes(matrix, (2, 2), (3, 2))
    assert folded[1 * 3 + 2, 0 * 2 + 1] == matrix[1 * 2 + 0, 2 * 2 + 1]
