"""Block tensor trains (Monarch matrices): every block of a grid truncated on its own."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._factors import BTT
from rankfold.decompose._tt_shapes import two_modes
from rankfold.decompose._unfold import check_rank, in_dtype, relative, safe_scale, squared_norm, working_copy


def block_tensor_train(
    matrix: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    rank: int,
    *,
    dtype: torch.dtype = torch.float64,
) -> BTT:
    """Return the closest matrix whose blocks in a grid all have a given rank.

    With `out_shape = (n_1, n_2)` and `in_shape = (m_2, m_1)` the matrix is a grid of `n_1 x m_2` blocks, each of
    `n_2 x m_1` neighbouring entries. It minimises `||W - W'||_F`: the blocks share no parameter, so the truncated SVD
    of each is the optimum, and the squared error is the sum of their tails. Where the products of the shapes exceed
    the matrix, it is padded with zeros below and right.

    Args:
        matrix: (rows, columns), any float dtype.
        out_shape: two dims whose product is at least the number of rows.
        in_shape: two dims whose product is at least the number of columns.
        rank: of every block, up to min(n_2, m_1).
        dtype: to compute in, torch.float64 or torch.float32.

    Returns:
        The factors in the matrix's dtype, the square roots of the singular values in each, and the error.

    Raises:
        DecompositionError: shapes that are not two dims or do not cover the matrix, a rank out of range, NaN or Inf.

    Reference:
        Qiu et al. (2024), Compute better spent, section 4; Dao et al. (2022), Monarch, theorem 1 (projection, rank 1).

    Example:
        >>> import torch
        >>> f = block_tensor_train(torch.ones(12, 12), (3, 4), (4, 3), 1)
        >>> f.num_params, round(f.error, 6)
        (84, 0.0)
    """
    blocks = _blocks(matrix, out_shape, in_shape, dtype)
    check_rank(rank, min(blocks.shape[2:]))
    scale = safe_scale(blocks)
    u, s, vh = torch.linalg.svd(blocks / scale, full_matrices=False)
    root = (s[..., :rank] * scale).sqrt()
    left, right = u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :]
    error = relative(squared_norm(s[..., rank:]) if rank < s.shape[2] else 0.0, squared_norm(s))
    return BTT(in_dtype(left, matrix.dtype), in_dtype(right, matrix.dtype), error)


def block_singular_values(
    matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "down across values"]:
    """Return the singular values of every block of the grid that `block_tensor_train` makes, descending.

    The error at a rank is the root of the share of the squares beyond it: one call gives it at every rank.

    Args:
        matrix: (rows, columns), any float dtype.
        out_shape: two dims whose product is at least the number of rows.
        in_shape: two dims whose product is at least the number of columns.
        dtype: to compute in.

    Returns:
        (blocks down, blocks across, values).

    Raises:
        DecompositionError: shapes that are not two dims or do not cover the matrix, a rank out of range, NaN or Inf.

    Example:
        >>> import torch
        >>> block_singular_values(torch.eye(4), (2, 2), (2, 2))[0]
        tensor([[1., 1.],
                [0., 0.]], dtype=torch.float64)
    """
    values: Tensor = torch.linalg.svdvals(_blocks(matrix, out_shape, in_shape, dtype))
    return values


def _blocks(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the blocks (down, across, rows, columns)."""
    return two_modes(working_copy(matrix, dtype, order=2, what="matrix"), out_shape, in_shape).transpose(1, 2)
