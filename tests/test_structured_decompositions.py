"""Are block trains, Kronecker sums and rings as close as they can be, and is the error the one that is reported?"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rankfold.decompose import (
    block_singular_values,
    block_tensor_train,
    kronecker_sum,
    rearranged,
    ring_bonds,
    singular_values,
    svd,
    tensor_ring,
    tensor_train,
)
from rankfold.errors import DecompositionError

few = settings(max_examples=20, deadline=None, derandomize=True)
F64 = torch.float64
pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))
shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)
seeds = st.integers(0, 99)


def random(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def distance(factors, tensor):
    return float((factors.to_dense().double() - tensor.double()).norm() / tensor.double().norm())


def padded(matrix, out_shape, in_shape):
    whole = matrix.new_zeros(math.prod(out_shape), math.prod(in_shape))
    whole[: matrix.shape[0], : matrix.shape[1]] = matrix
    return whole


@given(out=pairs, into=pairs, seed=seeds, cut=st.booleans(), data=st.data())
@few
def test_every_block_is_its_own_truncated_svd(out, into, seed, cut, data):
    rows, columns = (max(1, math.prod(shape) - cut) for shape in (out, into))
    matrix = random((rows, columns), seed)
    rank = data.draw(st.integers(1, min(out[1], into[1])))
    found = block_tensor_train(matrix, out, into, rank)
    whole, dense = padded(matrix, out, into), found.to_dense()
    assert (found.out_shape, found.in_shape, found.rank) == (out, into, rank)
    for i in range(out[0]):
        for k in range(into[0]):
            block = (slice(i * out[1], (i + 1) * out[1]), slice(k * into[1], (k + 1) * into[1]))
            u, s, vh = torch.linalg.svd(whole[block])
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            torch.testing.assert_close(dense[block], best)
    values = block_singular_values(matrix, out, into)
    tail = math.sqrt(float(values[..., rank:].square().sum() / values.square().sum()))
    assert found.error == pytest.approx(distance(found, whole), abs=1e-12)
    assert found.error == pytest.approx(tail, abs=1e-12)


def test_the_factors_of_a_block_train_are_balanced():
    found = block_tensor_train(random((12, 20), 0), (3, 4), (4, 5), 2)
    grams = found.left.mT @ found.left, found.right @ found.right.mT
    torch.testing.assert_close(*grams)
    assert found.num_params == 2 * (4 * 12 + 3 * 20)


@given(out=pairs, into=pairs, seed=seeds, data=st.data())
@few
def test_a_kronecker_sum_has_the_error_of_the_rearrangement(out, into, seed, data):
    matrix = random((math.prod(out), math.prod(into)), seed)
    rank = data.draw(st.integers(1, min(out[0] * into[0], out[1] * into[1])))
    found = kronecker_sum(matrix, out, into, rank)
    terms = sum(torch.kron(a, b) for a, b in zip(found.left, found.right, strict=True))
    torch.testing.assert_close(found.to_dense(), terms)
    energies = singular_values(rearranged(matrix, out, into)).square()
    tail = math.sqrt(float(energies[rank:].sum() / energies.sum()))
    assert distance(found, matrix) == pytest.approx(tail, abs=1e-7)
    assert found.error == pytest.approx(tail, abs=1e-7)
    assert (found.out_shape, found.in_shape, found.rank) == (out, into, rank)


def test_a_kronecker_sum_finds_its_terms():
    matrix = sum(torch.kron(random((3, 4), k), random((5, 2), 9 + k)) for k in range(3))
    assert kronecker_sum(matrix, (3, 5), (4, 2), tolerance=1e-9).rank == 3
    assert distance(kronecker_sum(matrix, (3, 5), (4, 2), 3), matrix) < 1e-12
    assert distance(kronecker_sum(matrix, (3, 5), (4, 2), 2), matrix) > 1e-2


def test_padding_counts_in_the_error_of_a_kronecker_sum():
    matrix = random((11, 7), 0)
    found = kronecker_sum(matrix, (3, 4), (2, 4), 3)
    assert found.error == pytest.approx(distance(found, padded(matrix, (3, 4), (2, 4))), abs=1e-9)


@given(shape=shapes, seed=seeds, data=st.data())
@few
def test_the_error_of_a_ring_is_the_one_made(shape, seed, data):
    tensor = random(shape, seed)
    rank = data.draw(st.integers(1, max(ring_bonds(shape, None))))
    start, refined = tensor_ring(tensor, rank, iterations=0), tensor_ring(tensor, rank)
    for found in (start, refined):
        assert found.error == pytest.approx(distance(found, tensor), abs=1e-9)
        assert found.shape == shape
        assert max(found.rank) <= rank
        assert found.rank == ring_bonds(shape, rank)
    assert refined.error <= start.error + 1e-12
    norms = torch.stack([core.norm() for core in refined.cores])
    torch.testing.assert_close(norms, norms.mean().expand_as(norms))


@given(shape=shapes, seed=seeds)
@few
def test_a_ring_of_full_bonds_is_exact(shape, seed):
    tensor = random(shape, seed)
    assert tensor_ring(tensor).rank == ring_bonds(shape, None) == tensor_ring(tensor, max(ring_bonds(shape, None))).rank
    assert distance(tensor_ring(tensor), tensor) < 1e-13


@given(shape=shapes, seed=seeds, cap=st.integers(1, 4))
@few
def test_a_ring_closed_by_one_is_a_train(shape, seed, cap):
    """With a closing bond of 1 TR-SVD is TT-SVD from the left, which is quasi-optimal as that from both ends is."""
    tensor = random(shape, seed)
    train = tensor_train(tensor, min(cap, max(tensor_train(tensor).rank)))
    assume(all(bond <= full for bond, full in zip(train.rank, ring_bonds(shape, None)[1:], strict=True)))
    ring = tensor_ring(tensor, (1, *train.rank), iterations=0)
    reach = math.sqrt(len(shape) - 1)
    assert ring.error <= reach * train.error + 1e-9
    assert train.error <= reach * ring.error + 1e-9


def test_least_squares_finds_a_ring_that_is_there():
    """TR-SVD splits the first rank blindly; the sweeps come nearer to the ring that the tensor was made of."""
    cores = [random((3, 6, 3), k) for k in range(3)]
    tensor = torch.einsum("aib,bjc,cka->ijk", *cores)
    blind, found = tensor_ring(tensor, 3, iterations=0), tensor_ring(tensor, 3, iterations=200, tolerance=1e-6)
    assert found.error < 0.75 * blind.error
    assert found.iterations > 0


def test_sweeps_stop_when_the_error_no_longer_falls():
    tensor = random((5, 6, 7), 1)
    found = tensor_ring(tensor, 2, iterations=500, tolerance=1e-3)
    assert found.converged
    assert 0 < found.iterations < 500
    assert not tensor_ring(tensor, 2, iterations=1, tolerance=0.0).converged


def test_rings_agree_with_tensorly():
    decomposition = pytest.importorskip("tensorly.decomposition")
    tensorly = pytest.importorskip("tensorly")
    tensor = random((5, 6, 4), 3)
    theirs = decomposition.tensor_ring(tensor.numpy(), rank=[2, 2, 3, 2])
    dense = torch.from_numpy(tensorly.tr_to_tensor(theirs))
    ours = tensor_ring(tensor, (2, 2, 3), iterations=0)
    assert ours.error == pytest.approx(float((dense - tensor).norm() / tensor.norm()), rel=1e-9)
    torch.testing.assert_close(
        torch.from_numpy(tensorly.tr_to_tensor([c.numpy() for c in ours.cores])), ours.to_dense()
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_of_entries_do_not_matter(scale):
    matrix = random((12, 12), 0)
    for call in (
        lambda x: block_tensor_train(x, (3, 4), (4, 3), 1),
        lambda x: kronecker_sum(x, (3, 4), (4, 3), 2),
        lambda x: tensor_ring(x.reshape(4, 3, 12), 2),
    ):
        scaled = call((matrix * scale).float())
        assert scaled.error == pytest.approx(call(matrix).error, rel=1e-3)
        assert math.isfinite(float(scaled.to_dense().abs().sum()))


BAD = [
    (lambda x: block_tensor_train(x, (2, 2, 3), (3, 4), 1), "two dims each"),
    (lambda x: block_tensor_train(x, (3, 3), (3, 4), 1), "does not cover 12"),
    (lambda x: block_tensor_train(x, (3, 4), (3, 4), 5), "full rank 4"),
    (lambda x: block_tensor_train(x, (3, 4), (3, 4), True), "must be a whole number >= 1, got True"),
    (lambda x: block_singular_values(x, (12,), (12,)), "two dims each"),
    (lambda x: kronecker_sum(x, (3, 4), (12,), 1), "two dims each"),
    (lambda x: kronecker_sum(x, (3, 4), (3, 4)), "not both or neither"),
    (lambda x: kronecker_sum(x, (3, 4), (3, 4), 10), "full rank 9"),
    (lambda x: tensor_ring(x[0], 1), "order 2 or more"),
    (lambda x: tensor_ring(x, 0), "must be a whole number >= 1, got 0"),
    (lambda x: tensor_ring(x, (1, 1, 1)), "3 entries"),
    (lambda x: tensor_ring(x.reshape(6, 2, 2, 6), (1, 1, 6, 6)), "cannot be filled"),
    (lambda x: tensor_ring(x.reshape(2, 6, 12), (2, 1, 6)), r"rank\[0\]"),
    (lambda x: tensor_ring(x, 2, iterations=-1), "iterations"),
    (lambda x: tensor_ring(x, 2, tolerance=2.0), "tolerance"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_named(call, message):
    with pytest.raises(DecompositionError, match=message):
        call(random((12, 12), 0))


def test_the_same_input_gives_the_same_factors():
    tensor = random((6, 5, 8), 0)
    for one, other in zip(tensor_ring(tensor, 3).cores, tensor_ring(tensor, 3).cores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    state = torch.get_rng_state()
    kronecker_sum(tensor.reshape(15, 16), (3, 5), (4, 4), 2)
    torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)


def test_a_block_train_at_one_block_is_the_svd():
    matrix = random((9, 7), 2)
    found, whole = block_tensor_train(matrix, (1, 9), (1, 7), 3), svd(matrix, 3)
    torch.testing.assert_close(found.to_dense(), whole.to_dense())
    assert found.error == pytest.approx(whole.error, rel=1e-9)
