"""What the decompositions return: frozen results with their diagnostics."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._unfold import khatri_rao, mode_product


@dataclass(frozen=True, eq=False)
class SVD:
    """A matrix as `u @ diag(s) @ vh`: orthonormal columns of `u`, rows of `vh`, descending `s`.

    Attributes:
        u: left vectors (m, rank); the entry of largest magnitude in each column is positive.
        s: singular values (rank,).
        vh: right vectors (rank, n).
        error: relative Frobenius error of `to_dense()` against the matrix.
        method: the algorithm that was used: "exact", "gram" or "randomised".

    Example:
        >>> import torch
        >>> f = SVD(torch.eye(3, 2), torch.tensor([2.0, 1.0]), torch.eye(2, 4))
        >>> f.rank, f.num_params, tuple(f.to_dense().shape)
        (2, 14, (3, 4))
    """

    u: Float[Tensor, "m rank"]
    s: Float[Tensor, " rank"]
    vh: Float[Tensor, "rank n"]
    error: float = 0.0
    method: str = "exact"

    @property
    def rank(self) -> int:
        """The number of singular values kept."""
        return self.s.shape[0]

    @property
    def num_params(self) -> int:
        """Entries of the balanced pair, `rank * (m + n)`: the singular values go into the factors."""
        return self.u.numel() + self.vh.numel()

    def to_dense(self) -> Float[Tensor, "m n"]:
        """Return `u @ diag(s) @ vh`."""
        return (self.u * self.s) @ self.vh

    def balanced(self) -> tuple[Float[Tensor, "m rank"], Float[Tensor, "rank n"]]:
        """Return (left, right) whose product is the matrix, with sqrt(s) in each."""
        root = self.s.sqrt()
        return self.u * root, root[:, None] * self.vh


@dataclass(frozen=True, eq=False)
class CP:
    """A tensor as a sum of rank-one terms, `X[i, j, ...] = sum_r A_0[i, r] A_1[j, r] ...`.

    Attributes:
        factors: one matrix (dim_k, rank) per mode; the scale of each term is spread evenly over them.
        error: relative Frobenius error of `to_dense()` against the tensor.
        iterations: sweeps done by the start that was kept.
        converged: whether it stopped because the error no longer fell.
        trace: relative error after each of these sweeps.
        degeneracy: `sum_r ||term_r||^2 / ||X||^2`; far above 1 where terms grow and cancel.
        sensitivity: expected squared change of the tensor per unit of noise variance in the factors' entries.

    Example:
        >>> import torch
        >>> f = CP((torch.ones(2, 1), torch.ones(3, 1), torch.ones(4, 1)))
        >>> f.rank, f.num_params, tuple(f.to_dense().shape)
        (1, 9, (2, 3, 4))
    """

    factors: tuple[Float[Tensor, "_ rank"], ...]
    error: float = 0.0
    iterations: int = 0
    converged: bool = True
    trace: tuple[float, ...] = field(default=(), repr=False)
    degeneracy: float = math.nan
    sensitivity: float = math.nan

    @property
    def rank(self) -> int:
        """The number of rank-one terms."""
        return self.factors[0].shape[1]

    @property
    def num_params(self) -> int:
        """Entries of all factors, `rank * sum of dims`."""
        return sum(factor.numel() for factor in self.factors)

    def to_dense(self) -> Tensor:
        """Return the sum of the rank-one terms."""
        shape = [factor.shape[0] for factor in self.factors]
        if len(shape) == 1:
            return self.factors[0].sum(1)
        return (self.factors[0] @ khatri_rao(self.factors[1:]).T).reshape(shape)


@dataclass(frozen=True, eq=False)
class Tucker:
    """A tensor as a core multiplied in some modes: `X = core x_modes[0] factors[0] x_modes[1] factors[1] ...`.

    Attributes:
        core: the tensor with its dims over `modes` replaced by the ranks.
        factors: one matrix (dim, rank) with orthonormal columns per entry of `modes`.
        modes: the modes that are factorised; the others are untouched.
        error: relative Frobenius error of `to_dense()` against the tensor.
        iterations: HOOI sweeps done (0 for the HOSVD alone).
        converged: whether the sweeps stopped because the error no longer fell.
        trace: relative error in the metric of the start and after each sweep, where it was found in one.

    Example:
        >>> import torch
        >>> f = Tucker(torch.ones(1, 2, 3), (torch.ones(5, 1), torch.ones(6, 2)), modes=(0, 1))
        >>> f.rank, f.num_params, tuple(f.to_dense().shape)
        ((1, 2), 23, (5, 6, 3))
    """

    core: Tensor
    factors: tuple[Float[Tensor, "_ _"], ...]
    modes: tuple[int, ...]
    error: float = 0.0
    iterations: int = 0
    converged: bool = True
    trace: tuple[float, ...] = field(default=(), repr=False)

    @property
    def rank(self) -> tuple[int, ...]:
        """The core's sizes over `modes`."""
        return tuple(factor.shape[1] for factor in self.factors)

    @property
    def num_params(self) -> int:
        """Entries of the core and the factors."""
        return self.core.numel() + sum(factor.numel() for factor in self.factors)

    def to_dense(self) -> Tensor:
        """Return the core multiplied by every factor."""
        dense = self.core
        for mode, factor in zip(self.modes, self.factors, strict=True):
            dense = mode_product(dense, factor, mode)
        return dense


@dataclass(frozen=True, eq=False)
class _Chain:
    """What the trains of a tensor and of a matrix share: cores from bond to bond, and how far they are off."""

    cores: tuple[Tensor, ...]
    error: float = 0.0
    bound: float = 0.0
    trace: tuple[float, ...] = field(default=(), repr=False)

    @property
    def rank(self) -> tuple[int, ...]:
        """The bonds between neighbouring cores."""
        return tuple(core.shape[0] for core in self.cores[1:])

    @property
    def num_params(self) -> int:
        """Entries of all cores."""
        return sum(core.numel() for core in self.cores)


@dataclass(frozen=True, eq=False)
class TT(_Chain):
    """A tensor as a chain of cores: `X[i_1, ..., i_d] = G_1[:, i_1] G_2[:, i_2] ... G_d[:, i_d]`.

    Attributes:
        cores: tensors (r, n, r') with matching neighbours; the first r and the last r' are 1.
        error: relative Frobenius error of `to_dense()` against the tensor.
        bound: the error that the truncations guarantee, `error <= bound`.
        trace: empty; see `TTMatrix`.
        rank: the bonds between neighbouring cores.
        num_params: entries of all cores.

    Example:
        >>> import torch
        >>> f = TT((torch.ones(1, 4, 2), torch.ones(2, 5, 1)))
        >>> f.rank, f.num_params, tuple(f.to_dense().shape)
        ((2,), 18, (4, 5))
    """

    cores: tuple[Float[Tensor, "_ _ _"], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's dims."""
        return tuple(core.shape[1] for core in self.cores)

    def to_dense(self) -> Tensor:
        """Return the contracted chain."""
        dense = self.cores[0].reshape(-1, self.cores[0].shape[-1])
        for core in self.cores[1:]:
            dense = (dense @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
        return dense.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class TTMatrix(_Chain):
    """A matrix as a chain of cores over paired modes: row `(i_1, ..., i_d)`, column `(j_1, ..., j_d)`.

    `W[i, j] = G_1[:, i_1, j_1] G_2[:, i_2, j_2] ... G_d[:, i_d, j_d]`.

    Attributes:
        cores: tensors (r, out_k, in_k, r') with matching neighbours; the first r and the last r' are 1.
        error: relative Frobenius error of `to_dense()` against the matrix.
        bound: the error that the truncations guarantee, `error <= bound`.
        trace: relative error in the metric of the start and after each core solved, where it was found in one.
        rank: the bonds between neighbouring cores.
        num_params: entries of all cores.

    Example:
        >>> import torch
        >>> f = TTMatrix((torch.ones(1, 4, 2, 3), torch.ones(3, 5, 6, 1)))
        >>> f.out_shape, f.in_shape, f.rank, tuple(f.to_dense().shape)
        ((4, 5), (2, 6), (3,), (20, 12))
    """

    cores: tuple[Float[Tensor, "_ _ _ _"], ...]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The dims whose product is the number of rows."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The dims whose product is the number of columns."""
        return tuple(core.shape[2] for core in self.cores)

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the matrix (product of `out_shape`, product of `in_shape`)."""
        chain = TT(tuple(core.flatten(1, 2) for core in self.cores)).to_dense()
        order = len(self.cores)
        paired = chain.reshape([dim for pair in zip(self.out_shape, self.in_shape, strict=True) for dim in pair])
        axes = [*range(0, 2 * order, 2), *range(1, 2 * order, 2)]
        return paired.permute(axes).reshape(math.prod(self.out_shape), math.prod(self.in_shape))


@dataclass(frozen=True, eq=False)
class BTT:
    """A matrix as a grid of blocks of low rank: block `(i, k)` is `left[i, k] @ right[i, k]`.

    Attributes:
        left: (blocks down, blocks across, rows of a block, rank).
        right: (blocks down, blocks across, rank, columns of a block).
        error: relative Frobenius error of `to_dense()` against the matrix.

    Example:
        >>> import torch
        >>> f = BTT(torch.ones(2, 3, 5, 1), torch.ones(2, 3, 1, 4))
        >>> f.rank, f.num_params, f.out_shape, f.in_shape, tuple(f.to_dense().shape)
        (1, 54, (2, 5), (3, 4), (10, 12))
    """

    left: Float[Tensor, "down across m rank"]
    right: Float[Tensor, "down across rank n"]
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The rank of every block."""
        return self.left.shape[3]

    @property
    def out_shape(self) -> tuple[int, int]:
        """Blocks down, and the rows of one."""
        return self.left.shape[0], self.left.shape[2]

    @property
    def in_shape(self) -> tuple[int, int]:
        """Blocks across, and the columns of one."""
        return self.right.shape[1], self.right.shape[3]

    @property
    def num_params(self) -> int:
        """Entries of all factors."""
        return self.left.numel() + self.right.numel()

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the matrix (product of `out_shape`, product of `in_shape`)."""
        return (self.left @ self.right).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """A matrix as a sum of Kronecker products, `W = sum_r left[r] ⊗ right[r]`.

    Attributes:
        left: (rank, m_1, n_1).
        right: (rank, m_2, n_2).
        error: relative Frobenius error of `to_dense()` against the matrix.

    Example:
        >>> import torch
        >>> f = KroneckerSum(torch.ones(3, 2, 2), torch.ones(3, 5, 4))
        >>> f.rank, f.num_params, f.out_shape, f.in_shape, tuple(f.to_dense().shape)
        (3, 72, (2, 5), (2, 4), (10, 8))
    """

    left: Float[Tensor, "rank m1 n1"]
    right: Float[Tensor, "rank m2 n2"]
    error: float = 0.0

    @property
    def rank(self) -> int:
        """The number of terms."""
        return self.left.shape[0]

    @property
    def out_shape(self) -> tuple[int, int]:
        """The rows of a left and of a right factor."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def in_shape(self) -> tuple[int, int]:
        """The columns of a left and of a right factor."""
        return self.left.shape[2], self.right.shape[2]

    @property
    def num_params(self) -> int:
        """Entries of all factors."""
        return self.left.numel() + self.right.numel()

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the matrix (product of `out_shape`, product of `in_shape`)."""
        products = self.left.flatten(1).T @ self.right.flatten(1)
        dims = (*self.left.shape[1:], *self.right.shape[1:])
        return products.reshape(dims).transpose(1, 2).flatten(2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class TR:
    """A tensor as a ring of cores: `X[i_1, ..., i_d] = trace(G_1[:, i_1] G_2[:, i_2] ... G_d[:, i_d])`.

    Attributes:
        cores: tensors (r, n, r') with matching neighbours; the last r' is the first r.
        error: relative Frobenius error of `to_dense()` against the tensor.
        iterations: sweeps of alternating least squares done.
        converged: whether these stopped because the error no longer fell.

    Example:
        >>> import torch
        >>> f = TR((torch.ones(2, 4, 3), torch.ones(3, 5, 2)))
        >>> f.rank, f.num_params, f.shape, tuple(f.to_dense().shape)
        ((2, 3), 54, (4, 5), (4, 5))
    """

    cores: tuple[Float[Tensor, "_ _ _"], ...]
    error: float = 0.0
    iterations: int = 0
    converged: bool = True

    @property
    def rank(self) -> tuple[int, ...]:
        """The bonds: first the one that closes the ring, then those between neighbouring cores."""
        return tuple(core.shape[0] for core in self.cores)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's dims."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def num_params(self) -> int:
        """Entries of all cores."""
        return sum(core.numel() for core in self.cores)

    def to_dense(self) -> Tensor:
        """Return the contracted ring."""
        ring = self.cores[0].shape[0]
        dense = self.cores[0].flatten(0, 1)  # ring n_1, r
        for core in self.cores[1:-1]:
            dense = (dense @ core.flatten(1)).reshape(-1, core.shape[2])
        open_ends = dense.reshape(ring, -1, dense.shape[1]).transpose(0, 1).flatten(1)  # n_1 ..., ring r
        return (open_ends @ self.cores[-1].permute(2, 0, 1).flatten(0, 1)).reshape(self.shape)


def fix_signs(u: Float[Tensor, "m rank"], vh: Float[Tensor, "rank n"]) -> tuple[Tensor, Tensor]:
    """Return both with the entry of largest magnitude in each column of `u` made positive."""
    largest = u.gather(0, u.abs().argmax(0, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(u.dtype)
    return u * signs, vh * signs.T
