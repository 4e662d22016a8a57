"""One basis for several matrices that see the same inputs."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold._common import Float, check_dense
from rankfold.decompose._svd import svd
from rankfold.errors import DecompositionError


@dataclass(frozen=True, eq=False)
class SharedSVD:
    """Matrices W_k as `lefts[k] @ right`, with one right factor shared by all.

    Attributes:
        lefts: one factor (m_k, rank) per matrix.
        right: the shared factor (rank, n).
        error: relative Frobenius error of all matrices together.

    Example:
        >>> import torch
        >>> f = SharedSVD((torch.ones(3, 1), torch.ones(2, 1)), torch.ones(1, 4))
        >>> f.rank, f.num_params, [tuple(w.shape) for w in f.to_dense()]
        (1, 9, [(3, 4), (2, 4)])
    """

    lefts: tuple[Float[Tensor, "_ rank"], ...]
    right: Float[Tensor, "rank n"]
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The size of the shared basis."""
        return self.right.shape[0]

    @property
    def num_params(self) -> int:
        """Entries of all factors, the shared one once."""
        return self.right.numel() + sum(left.numel() for left in self.lefts)

    def to_dense(self) -> tuple[Tensor, ...]:
        """Return the matrices."""
        return tuple(left @ self.right for left in self.lefts)


def shared_svd(
    matrices: Sequence[Tensor],
    rank: int,
    *,
    second_moment: Tensor | None = None,
    output_weights: Tensor | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> SharedSVD:
    """Approximate matrices that see the same inputs by a shared right factor and a left factor each.

    The SVD of the matrices stacked on top of each other, `[W_1; W_2; ...] = [A_1; A_2; ...] B`: of all shared bases of
    this size it has the least error, summed over the matrices, in the metric where one is given. The projections of
    queries, keys and values share their inputs, as do the gate and up projections of a feed-forward block; with k
    matrices it takes `rank * (n + sum of rows)` parameters instead of `rank * (k n + sum of rows)`.

    Args:
        matrices: (m_k, n) each, any float dtype, all on one device.
        rank: between 1 and min(sum of rows, n).
        second_moment: (n, n), symmetric positive semi-definite, of the inputs that they share.
        output_weights: weights of the outputs of all matrices, in their order.
        seed: of the random start of the Krylov basis.
        dtype: to compute in.

    Returns:
        The factors in the dtype of the first matrix, the scale balanced between the two sides.

    Raises:
        DecompositionError: no matrices, different numbers of columns, an unusable rank, a metric that does not
            fit, NaN or Inf.

    Reference:
        Wang et al. 2024 (Basis Sharing), there across layers.

    Example:
        >>> import torch
        >>> f = shared_svd([torch.eye(3), 2 * torch.eye(3)], 3)
        >>> f.num_params, round(f.error, 6)
        (27, 0.0)
    """
    if not isinstance(matrices, Sequence | Tensor):
        raise DecompositionError(f"matrices must be a sequence of tensors, got {type(matrices).__name__}: pass a list")
    for k, matrix in enumerate(matrices):
        check_dense(matrix, f"matrices[{k}]")
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise DecompositionError(f"a basis is shared by matrices with as many columns, not by those of {shapes}")
    stacked = torch.cat([matrix.detach().to(matrices[0].dtype) for matrix in matrices])
    found = svd(stacked, rank, second_moment=second_moment, output_weights=output_weights, seed=seed, dtype=dtype)
    left, right = found.balanced()
    return SharedSVD(torch.split(left, [shape[0] for shape in shapes]), right, found.error)
