"""Sums of Kronecker products: the SVD of a rearrangement."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold.decompose._factors import KroneckerSum
from rankfold.decompose._svd import svd
from rankfold.decompose._tt_shapes import two_modes
from rankfold.decompose._unfold import in_dtype


def kronecker_sum(
    matrix: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> KroneckerSum:
    """Return the closest sum of a given number of Kronecker products, `W = sum_r A_r ⊗ B_r`.

    Minimises `||W - W'||_F`. The rearrangement of Van Loan and Pitsianis has a row for each entry of A and a column
    for each entry of B, and turns every term into a matrix of rank one: its truncated SVD is the optimum, and the
    squared error the tail of its singular values. Where the products of the shapes exceed the matrix, it is padded
    with zeros below and right, and the error counts what falls on them.

    Args:
        matrix: (rows, columns), any float dtype.
        out_shape: (m_1, m_2), rows of A and of B; the product is at least the number of rows.
        in_shape: (n_1, n_2), columns of A and of B; the product is at least the number of columns.
        rank: the number of terms, up to min(m_1 n_1, m_2 n_2); this or `tolerance`.
        tolerance: largest relative error, below 1.
        seed: of the random start of the Krylov basis, for small ranks of large matrices.
        dtype: to compute in, torch.float64 or torch.float32. By default float64, except that the randomised method
            multiplies a matrix given in float32 or less by float32 (its small algebra stays float64).

    Returns:
        The factors in the matrix's dtype, the square roots of the singular values in each, and the error.

    Raises:
        DecompositionError: shapes that are not two dims or do not cover the matrix, a rank out of range, NaN or Inf.

    Reference:
        Van Loan and Pitsianis (1993), Approximation with Kronecker products, section 2.

    Example:
        >>> import torch
        >>> w = torch.kron(torch.rand(2, 3), torch.rand(4, 5))
        >>> f = kronecker_sum(w, (2, 4), (3, 5), 1)
        >>> torch.testing.assert_close(f.to_dense(), w)
    """
    folded = two_modes(matrix, out_shape, in_shape)
    found = svd(_paired(folded), rank, tolerance=tolerance, seed=seed, dtype=dtype)
    left, right = found.balanced()
    m1, m2, n1, n2 = folded.shape
    terms = left.T.reshape(-1, m1, n1).contiguous(), right.reshape(-1, m2, n2)
    return KroneckerSum(in_dtype(terms[0], matrix.dtype), in_dtype(terms[1], matrix.dtype), found.error)


def rearranged(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int]) -> Tensor:
    """Return the rearrangement of Van Loan and Pitsianis, `(m_1 n_1, m_2 n_2)`: `A ⊗ B` becomes `vec(A) vec(B)^T`.

    Example:
        >>> import torch
        >>> rearranged(torch.kron(torch.ones(2, 3), torch.ones(4, 5)), (2, 4), (3, 5)).shape
        torch.Size([6, 20])
    """
    return _paired(two_modes(matrix, out_shape, in_shape))


def _paired(folded: Tensor) -> Tensor:
    return folded.transpose(1, 2).flatten(2).flatten(0, 1)
