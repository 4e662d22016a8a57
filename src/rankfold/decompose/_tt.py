"""Tensor trains: TT-SVD, TT-rounding, TT-matrices, spectra of the unfoldings, balanced shapes."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TypeAlias, overload

import torch
from torch import Tensor

from rankfold._common import Float, Rank, check_dense
from rankfold.decompose._factors import TT, TTMatrix
from rankfold.decompose._svd import singular_values
from rankfold.decompose._tt_cores import inner, orthogonalise_from_right, unpaired
from rankfold.decompose._tt_shapes import bonds, pair_modes
from rankfold.decompose._unfold import check_tolerance, relative, squared_norm, working_copy
from rankfold.errors import DecompositionError

Basis: TypeAlias = tuple[Tensor, float]

GRAM_MARGIN = 1e3
"""How far the discarded energy must lie above the Gram matrix's own rounding for the Gram matrix to be used."""
LARGE, SHARE, OVERSAMPLING = 384, 1 / 12, 8
"""A Krylov basis finds the eigenvectors of Gram matrices this large, of at most this share of the rows."""
MISSED = 1e-3
"""The share of the discarded energy that a Krylov basis may miss: at most 0.05 % of the error."""
ROUNDING = 10.0
"""Rounding of the factors to the input's dtype, in units of its epsilon per core; part of `bound`."""


def tensor_train(
    tensor: Tensor,
    rank: Rank | None = None,
    *,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
) -> TT:
    """Return a tensor as a chain of cores, by TT-SVD.

    `X[i_1, ..., i_d] = G_1[:, i_1] ... G_d[:, i_d]`. Every step projects one unfolding of what is left
    orthogonally on its leading singular vectors, so the squared errors of the steps add up exactly, and the
    error is within `sqrt(d - 1)` of the best at these ranks. Modes are split off at whichever end has the
    smaller unfolding: with small ranks the large middle unfolding is never formed.

    Args:
        tensor: order >= 2, any float dtype.
        rank: a cap for every bond, clipped to what is possible at each; or one per bond. None keeps all.
        tolerance: relative error to stay within instead: the smallest ranks with
            `||X - X^|| <= tolerance ||X||`, each bond getting an equal share of what is not yet used.
        dtype: to compute in, torch.float64 or torch.float32. By default float64, except that a tensor given
            in float32 or less is multiplied in float32 as long as far more is discarded than that rounds off.

    Returns:
        The cores in the tensor's dtype, the error, and the bound guaranteed by the discarded energy.

    Raises:
        DecompositionError: rank below 1 or beyond the largest bond, both rank and tolerance, unusable tensor.

    Reference:
        Oseledets (2011), Tensor-train decomposition, algorithm 1 and theorem 2.2.

    Example:
        >>> import torch
        >>> x = torch.ones(4, 5, 6)
        >>> tensor_train(x, 2).rank, tensor_train(x, tolerance=1e-6).rank
        ((2, 2), (1, 1))
    """
    check_dense(tensor)
    narrow = dtype is None and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    work = working_copy(tensor, torch.float32 if narrow else dtype or torch.float64)
    total = squared_norm(work)
    caps, budget = _target(work.shape, rank, tolerance, total)
    cores, lost = _split_ends(work, caps, budget, dtype or torch.float64)
    return _finish(cores, lost, total, tensor.dtype)


def tt_matrix(
    matrix: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    rank: Rank | None = None,
    *,
    tolerance: float | None = None,
    dtype: torch.dtype | None = None,
) -> TTMatrix:
    """Return a matrix as a tensor train over paired row and column modes.

    The matrix is folded to `(out_1, in_1, out_2, in_2, ...)`, each pair merged to one mode, and decomposed
    by TT-SVD. Where the products of the shapes exceed the matrix, it is padded with zeros below and right.

    Args:
        matrix: (rows, columns).
        out_shape: dims whose product is at least the number of rows.
        in_shape: as many dims, whose product is at least the number of columns.
        rank: a cap for every bond, clipped to what is possible at each; or one per bond. None keeps all.
        tolerance: relative error to stay within instead: the smallest ranks with `||X - X^|| <= tolerance ||X||`, each
            bond getting an equal share of what is not yet used.
        dtype: to compute in, torch.float64 or torch.float32. By default float64, except that a tensor given in float32
            or less is multiplied in float32 as long as far more is discarded than that rounds off.

    Returns:
        Cores (r, out_k, in_k, r') with the error and its bound.

    Raises:
        DecompositionError: shapes too small or of different lengths, a rank out of range, both rank and tolerance,
            an unusable matrix.

    Reference:
        Novikov et al. (2015), Tensorizing neural networks, section 3.

    Example:
        >>> import torch
        >>> tt_matrix(torch.eye(12), (3, 4), (4, 3), 2).rank
        (2,)
    """
    folded = pair_modes(matrix, out_shape, in_shape)
    train = tensor_train(folded, rank, tolerance=tolerance, dtype=dtype)
    return unpaired(train, out_shape, in_shape)


@overload
def tt_round(
    train: TT, rank: Rank | None = None, *, tolerance: float | None = None, dtype: torch.dtype = torch.float64
) -> TT: ...


@overload
def tt_round(
    train: TTMatrix, rank: Rank | None = None, *, tolerance: float | None = None, dtype: torch.dtype = torch.float64
) -> TTMatrix: ...


def tt_round(
    train: TT | TTMatrix,
    rank: Rank | None = None,
    *,
    tolerance: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> TT | TTMatrix:
    """Return a tensor train with smaller bonds, without forming the tensor.

    QR from the right makes every core but the first right-orthogonal; truncated SVDs from the left then discard what
    the unfoldings' singular values allow. O(d n r^3).

    Args:
        train: a TT or a TT-matrix.
        rank: a cap for every bond, clipped to what is possible at each; or one per bond; None with no
            tolerance only removes bonds that cannot be needed.
        tolerance: relative error to stay within, against `train`.
        dtype: to compute in.

    Returns:
        The same kind, left-orthogonal but for its last core; `error` and `bound` are against `train`.

    Raises:
        DecompositionError: rank below 1 or beyond the largest bond, both rank and tolerance, unusable tensor.

    Reference:
        Oseledets (2011), algorithm 2.

    Example:
        >>> import torch
        >>> x = tensor_train(torch.rand(4, 5, 6), 4)
        >>> tt_round(x, 2).rank
        (2, 2)
    """
    if not isinstance(train, TT | TTMatrix):
        raise DecompositionError(
            f"train must be a TT or a TTMatrix, got {type(train).__name__}: make one with tensor_train or tt_matrix"
        )
    flat = [working_copy(core, dtype).flatten(1, -2) for core in train.cores]
    rounded = _truncate_from_left(orthogonalise_from_right(flat), rank, tolerance, train.cores[0].dtype)
    return unpaired(rounded, train.out_shape, train.in_shape) if isinstance(train, TTMatrix) else rounded


def tt_roundings(tensor: Tensor, ranks: Sequence[Rank], *, dtype: torch.dtype = torch.float64) -> tuple[TT, ...]:
    """Return tensor trains at several ranks from one TT-SVD: the curve of error against rank.

    The TT-SVD at the largest bonds asked for is rounded to each rank, by one sweep of QR for all of them. The `error`
    of each is measured against the tensor, `||X||^2 - 2 <X, X^> + ||X^||^2`: it is reached, not a bound.

    Args:
        tensor: order >= 2.
        ranks: of each a cap for every bond, clipped to what is possible at each, or one per bond.
        dtype: to compute in.

    Returns:
        One train per rank, in `dtype`.

    Raises:
        DecompositionError: rank below 1 or beyond the largest bond, both rank and tolerance, unusable tensor.

    Example:
        >>> import torch
        >>> [round(f.error, 6) for f in tt_roundings(torch.eye(9).reshape(3, 3, 3, 3), [1, 9])]
        [0.942809, 0.0]
    """
    work = working_copy(tensor, dtype)
    total = squared_norm(work)
    asked = [bonds(work.shape, rank) for rank in ranks]
    largest = tuple(max(column) for column in zip(*asked, strict=True))
    if not asked:
        return ()
    whole = tensor_train(work, largest, dtype=dtype)
    orthogonal = orthogonalise_from_right(whole.cores)
    found = {largest: whole}
    for rank in set(asked) - {largest}:
        rounded = _truncate_from_left(orthogonal, rank, None, dtype)
        squared = total - 2 * inner(work, rounded.cores) + squared_norm(rounded.cores[-1])
        error = max(relative(squared, total), whole.error)
        found[rank] = TT(rounded.cores, error, error + rounded.bound - rounded.error)
    return tuple(found[rank] for rank in asked)


def tt_spectra(tensor: Tensor, *, dtype: torch.dtype = torch.float64) -> tuple[Float[Tensor, " n"], ...]:
    """Return the singular values of each unfolding `(i_1 ... i_k | i_k+1 ... i_d)`, descending.

    `sqrt(sum_k sum_{i > r_k} s_k[i]^2)` bounds the error of a TT-SVD at ranks r_k.

    Args:
        tensor: order >= 2.
        dtype: to compute in.

    Returns:
        One vector per bond, of the length of the largest rank there.

    Raises:
        DecompositionError: unusable tensor.

    Example:
        >>> import torch
        >>> [tuple(s.shape) for s in tt_spectra(torch.ones(2, 3, 4))]
        [(2,), (4,)]
    """
    work = working_copy(tensor, dtype)
    unfoldings = [work.reshape(rows, -1) for rows in accumulate(work.shape[:-1], mul)]
    return tuple(singular_values(matrix, dtype=dtype) for matrix in unfoldings)


def _target(
    shape: Sequence[int], rank: Rank | None, tolerance: float | None, total: float
) -> tuple[tuple[int, ...], float | None]:
    """Return the cap of every bond, and the squared error that may be discarded below the caps."""
    if rank is not None and tolerance is not None:
        raise DecompositionError("give a tensor train either a rank or a tolerance, not both")
    budget = None if tolerance is None else check_tolerance(tolerance) ** 2 * total
    return bonds(shape, rank), budget


def _share(budget: float | None, lost: list[float], count: int) -> float | None:
    """Return what the next bond may discard: an equal share of what the bonds before it left over."""
    return None if budget is None else max(budget - sum(lost), 0.0) / (count - len(lost))


def _split_ends(
    work: Tensor, caps: tuple[int, ...], budget: float | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    """Return cores from a TT-SVD from both ends, always at the end whose unfolding has the smaller side."""
    shape = list(work.shape)
    left: list[Tensor] = []
    right: list[Tensor] = []
    lost: list[float] = []
    before = after = 1  # bonds at the two ends of what is left
    while len(shape) > 1:
        rows, columns = before * shape[0], shape[-1] * after
        from_left = rows <= columns
        work = work.reshape(rows, -1) if from_left else work.reshape(-1, columns)
        cap = caps[len(left)] if from_left else caps[-1 - len(right)]
        found = _leading(work if from_left else work.T, cap, _share(budget, lost, len(caps)), dtype)
        if found is None:
            work = work.to(dtype)
            continue
        basis, discarded = found
        lost.append(discarded)
        if from_left:
            left.append(basis.reshape(before, shape.pop(0), -1))
            work, before = basis.T.to(work.dtype) @ work, basis.shape[1]
        else:
            right.insert(0, basis.T.reshape(-1, shape.pop(), after))
            work, after = work @ basis.to(work.dtype), basis.shape[1]
    return [*left, work.reshape(before, shape[0], after), *right], lost


def _leading(matrix: Float[Tensor, "m n"], cap: int, allowed: float | None, dtype: torch.dtype) -> Basis | None:
    """Return an orthonormal basis of the leading left singular vectors, and the squared norm outside it.

    `cap` vectors, or fewer where these leave at most `allowed` outside. A Gram matrix has errors of eps times its
    trace, so it is good enough if the discarded energy is well above them. If it is not, a matrix of less precision
    than `dtype` gives None, so that the caller tries again in `dtype`, where the SVD decides. If nothing is left out,
    any basis will do.
    """
    rows, columns = matrix.shape
    lossless = cap >= min(rows, columns) and allowed is None
    if lossless and rows <= columns:
        return torch.eye(rows, dtype=dtype, device=matrix.device), 0.0
    if not lossless:
        short = matrix if rows <= columns else matrix.T
        basis, discarded = _from_gram((short @ short.T).to(dtype), cap, allowed)
        noise = torch.finfo(matrix.dtype).eps * short.shape[0] * squared_norm(short)
        if discarded > GRAM_MARGIN * noise:
            return (basis if rows <= columns else torch.linalg.qr(matrix.to(dtype) @ basis).Q), discarded
    if matrix.dtype != dtype:
        return None
    return (torch.linalg.qr(matrix).Q, 0.0) if lossless else _from_svd(matrix, cap, allowed)


def _from_svd(matrix: Float[Tensor, "m n"], cap: int, allowed: float | None) -> Basis:
    """As `_leading`, to full precision; a wide matrix is first reduced to a square one with the same left vectors."""
    square = torch.linalg.qr(matrix.T, mode="r").R.T if matrix.shape[1] > matrix.shape[0] else matrix
    vectors, singular, _ = torch.linalg.svd(square, full_matrices=False)
    keep, discarded = _cut(singular.square(), cap, allowed)
    return vectors[:, :keep], discarded


def _from_gram(gram: Float[Tensor, "n n"], cap: int, allowed: float | None) -> Basis:
    """As `_leading`, from the Gram matrix of the rows."""
    if allowed is None and len(gram) >= LARGE and cap <= SHARE * len(gram):
        found = _krylov_eigenvectors(gram, cap)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(gram)
    keep, discarded = _cut(values.flip(0).clamp(min=0), cap, allowed)
    return vectors.flip(1)[:, :keep], discarded


def _krylov_eigenvectors(gram: Float[Tensor, "n n"], count: int) -> Basis | None:
    """Return the leading eigenvectors of a large Gram matrix by a block Krylov basis; None if it converges slowly.

    An eigenvalue lies within its residual of a Ritz value, so the energy that the Ritz vectors miss is at most the
    sum of the residuals: they are accepted where that is a small share of the discarded energy.
    """
    n, block = len(gram), count + OVERSAMPLING
    fresh = torch.randn(n, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(gram)
    basis = torch.linalg.qr(fresh).Q
    image = gram @ basis
    trace = float(gram.trace())
    while basis.shape[1] + block <= n // 3:
        fresh = image[:, -block:]
        for _ in range(2):  # once leaves rounding errors in the span of the basis, twice does not
            fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh)).Q
        basis, image = torch.cat([basis, fresh], 1), torch.cat([image, gram @ fresh], 1)
        values, turn = torch.linalg.eigh(basis.T @ image)
        values, turn = values[-count:], turn[:, -count:]
        vectors = basis @ turn
        missed = float(torch.linalg.vector_norm(image @ turn - vectors * values, dim=0).sum())
        discarded = trace - float(values.sum())
        if missed <= MISSED * discarded:
            return vectors.flip(1), discarded
    return None


def _cut(energies: Float[Tensor, " n"], cap: int, allowed: float | None) -> tuple[int, float]:
    """Return how many of the descending energies to keep (>= 1), and the sum of the others."""
    tails = energies.double().flip(0).cumsum(0).flip(0)  # tails[k]: discarded when k are kept
    keep = min(cap, len(tails))
    if allowed is not None:
        noise = (torch.finfo(energies.dtype).eps * len(tails)) ** 2 * float(tails[0])
        keep = min(keep, max(1, int((tails > max(allowed, noise)).sum())))
    return keep, float(tails[keep]) if keep < len(tails) else 0.0


def _truncate_from_left(cores: Sequence[Tensor], rank: Rank | None, tolerance: float | None, out: torch.dtype) -> TT:
    """Return the train with smaller bonds, in the dtype `out`, from one that is orthogonal but for its first core."""
    cores, total, lost = list(cores), squared_norm(cores[0]), list[float]()
    caps, budget = _target([core.shape[1] for core in cores], rank, tolerance, total)
    for k, cap in enumerate(caps):
        rows = cores[k].flatten(0, 1)
        found = _leading(rows, cap, _share(budget, lost, len(caps)), rows.dtype)
        basis, discarded = found or _from_svd(rows, cap, None)
        lost.append(discarded)
        cores[k] = basis.reshape(*cores[k].shape[:2], -1)
        cores[k + 1] = torch.tensordot(basis.T @ rows, cores[k + 1], 1)
    return _finish(cores, lost, total, out)


def _finish(cores: Sequence[Tensor], lost: Sequence[float], total: float, dtype: torch.dtype) -> TT:
    error = relative(sum(lost), total)
    rounding = ROUNDING * len(cores) * torch.finfo(dtype).eps
    return TT(tuple(core.to(dtype).contiguous() for core in cores), error, error + rounding)
