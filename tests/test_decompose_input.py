"""Does every decomposition refuse what it cannot decompose, with the reason?"""

import math

import pytest
import torch

from rankfold.decompose import (
    block_singular_values,
    block_tensor_train,
    cp,
    kronecker_sum,
    singular_values,
    svd,
    tensor_ring,
    tensor_train,
    tt_matrix,
    tucker,
    tucker_errors,
)
from rankfold.errors import DecompositionError, RankfoldError

CALLS = {
    "svd": lambda x, rank=1: svd(x, rank),
    "singular_values": lambda x: singular_values(x),
    "cp": lambda x, rank=1: cp(x, rank),
    "tucker": lambda x, rank=1: tucker(x, rank),
    "tucker_errors": lambda x: tucker_errors(x),
    "tensor_train": lambda x, rank=1: tensor_train(x, rank),
    "tt_matrix": lambda x, rank=1: tt_matrix(x, (2, 2), (2, 3), rank),
    "block_tensor_train": lambda x, rank=1: block_tensor_train(x, (2, 2), (2, 3), rank),
    "block_singular_values": lambda x: block_singular_values(x, (2, 2), (2, 3)),
    "kronecker_sum": lambda x, rank=1: kronecker_sum(x, (2, 2), (2, 3), rank),
    "tensor_ring": lambda x, rank=1: tensor_ring(x, rank),
}
RANKED = ("svd", "cp", "tucker", "tensor_train", "tt_matrix", "block_tensor_train", "kronecker_sum", "tensor_ring")
ROWS, COLUMNS = 4, 6
TENSORS = {
    "nan": (lambda: torch.full((ROWS, COLUMNS), math.nan), "NaN or Inf"),
    "inf": (lambda: torch.full((ROWS, COLUMNS), math.inf), "NaN or Inf"),
    "integers": (lambda: torch.ones(ROWS, COLUMNS, dtype=torch.int64), "float dtype"),
    "complex": (lambda: torch.ones(ROWS, COLUMNS, dtype=torch.complex64), "float dtype"),
    "meta": (lambda: torch.ones(ROWS, COLUMNS, device="meta"), "meta device"),
    "vector": (lambda: torch.ones(ROWS), "(4,)"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("make, message", TENSORS.values(), ids=TENSORS)
def test_what_cannot_be_decomposed_is_refused(call, make, message):
    with pytest.raises(DecompositionError) as caught:
        call(make())
    assert message in str(caught.value)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("rank", [0, -1, 1000])
def test_ranks_outside_one_to_full_are_refused(name, rank):
    with pytest.raises(DecompositionError) as caught:
        CALLS[name](torch.ones(ROWS, COLUMNS), rank)
    assert str(rank) in str(caught.value)


@pytest.mark.parametrize("name", ["svd", "singular_values", "tt_matrix", "block_tensor_train", "kronecker_sum"])
def test_batches_of_matrices_are_refused(name):
    with pytest.raises(DecompositionError) as caught:
        CALLS[name](torch.ones(2, ROWS, COLUMNS))
    assert "(2, 4, 6)" in str(caught.value)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_input_is_kept(name, dtype):
    matrix = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    factors = CALLS[name](matrix)
    assert factors.to_dense().dtype == dtype
    lost = torch.linalg.norm(matrix.double() - factors.to_dense().double()) / torch.linalg.norm(matrix.double())
    assert float(lost) == pytest.approx(factors.error, abs=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", RANKED)
def test_a_transposed_input_will_do(name):
    matrix = torch.randn(COLUMNS, ROWS, generator=torch.Generator().manual_seed(0)).T
    assert CALLS[name](matrix).error == pytest.approx(CALLS[name](matrix.contiguous()).error, abs=1e-6)


def test_dtypes_to_compute_in_are_named():
    with pytest.raises(DecompositionError, match="float64 or torch.float32"):
        svd(torch.ones(3, 3), 1, dtype=torch.float16)


def test_errors_are_value_errors():
    assert issubclass(DecompositionError, RankfoldError)
    assert issubclass(RankfoldError, ValueError)
