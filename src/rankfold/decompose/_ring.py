"""Tensor rings: TR-SVD, refined by alternating least squares."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankfold._common import Float, Rank, whole
from rankfold.decompose._factors import TR
from rankfold.decompose._svd import svd
from rankfold.decompose._tt import tensor_train
from rankfold.decompose._unfold import (
    check_rank,
    check_tolerance,
    in_dtype,
    relative,
    relative_difference,
    safe_scale,
    squared_norm,
    working_copy,
)
from rankfold.errors import DecompositionError

EXACT = 1e-7
"""Errors below this are not refined: normal equations only have half the digits."""
RIDGE = 1e-12
"""Share of the mean diagonal that is added to normal equations, so that unused bonds do no harm."""


def tensor_ring(
    tensor: Tensor,
    rank: Rank | None = None,
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
    dtype: torch.dtype = torch.float64,
) -> TR:
    """Return a tensor as a ring of cores, by TR-SVD and some sweeps of alternating least squares.

    `X[i_1, ..., i_d] = trace(G_1[:, i_1] ... G_d[:, i_d])`: a tensor train whose ends are tied by one more bond. The
    rank of the first unfolding is split into the bonds on both sides of the first core, the rest is decomposed by
    TT-SVD; then each core in turn is replaced by the least-squares optimum for the others, which lowers
    `||X - X^||_F` in every step. There is no best ring of a rank in general, and the result depends on the order of the
    modes: if the error matters more than the form, compare with `tensor_train` at equal parameters.

    Args:
        tensor: order >= 2, any float dtype.
        rank: a cap for every bond, clipped to what each can have; or one per bond, first the one that closes the ring.
            None gives bonds that cut nothing.
        iterations: the maximum number of sweeps of alternating least squares; 0 returns the TR-SVD.
        tolerance: stop when a sweep lowers the error by less than this share of it.
        dtype: to compute in, torch.float64 or torch.float32.

    Returns:
        The cores in the tensor's dtype, their norms equal, with the error.

    Raises:
        DecompositionError: rank below 1 or beyond the full bonds, a negative number of iterations, unusable tensor.

    Reference:
        Zhao et al. (2016), Tensor ring decomposition, algorithms 1 and 2.

    Example:
        >>> import torch
        >>> f = tensor_ring(torch.ones(4, 5, 6), 2)
        >>> f.rank, round(f.error, 6)
        ((2, 2, 2), 0.0)
    """
    work = working_copy(tensor, dtype)
    whole("iterations", iterations, 0, error=DecompositionError)
    check_tolerance(tolerance)
    scale = safe_scale(work)
    start = _ring_svd(work / scale, ring_bonds(work.shape, rank))
    found = _refined(work / scale, start, iterations, tolerance) if iterations and start.error > EXACT else start
    cores = [in_dtype(core, tensor.dtype) for core in _balanced(found.cores, scale)]
    return TR(tuple(cores), found.error, found.iterations, found.converged)


def ring_bonds(shape: Sequence[int], rank: Rank | None) -> tuple[int, ...]:
    """Return one rank per bond of a tensor ring of the given dims, the closing one first.

    The full rank of the first unfolding is split as evenly as possible into the first two bonds; with those, the
    others have the largest rank that they can use. An int is a cap for all; None caps nothing.

    Raises:
        DecompositionError: a rank below 1, beyond the largest bond, or that its neighbours cannot feed.

    Example:
        >>> ring_bonds((4, 4, 4, 4), None), ring_bonds((4, 4, 4, 4), 3), ring_bonds((16, 16, 16), 4)
        ((2, 2, 8, 8), (2, 2, 3, 3), (4, 4, 4))
    """
    full = _clipped(shape, None)
    if rank is None:
        return full
    if not isinstance(rank, tuple):
        return _clipped(shape, check_rank(rank, max(full)))
    if len(rank) != len(full):
        raise DecompositionError(f"rank {rank} has {len(rank)} entries: a ring over {tuple(shape)} has {len(full)}")
    for k, (bond, limit) in enumerate(zip(rank, full, strict=True)):
        check_rank(bond, limit, f"rank[{k}] of {rank}")
    for k, dim in enumerate(shape):
        before, after = rank[k], rank[(k + 1) % len(rank)]
        if after > before * dim or before > dim * after:
            raise DecompositionError(f"rank {rank} cannot be filled: bonds {before} and {after} around a mode of {dim}")
    return rank


def _clipped(shape: Sequence[int], cap: int | None) -> tuple[int, ...]:
    """Return the bonds under a cap, none larger than possible."""
    first, rest = shape[0], math.prod(shape[1:])
    whole = min(first, rest)
    ring = math.isqrt(whole)
    ring, bond = (min(cap or size, size) for size in (ring, -(-whole // ring)))
    bonds, before = [ring, bond], bond * shape[1]
    rest //= shape[1]
    for dim in shape[2:]:
        bonds.append(min(cap or before, before, rest * ring))
        before, rest = bonds[-1] * dim, rest // dim
    return tuple(bonds)


def _ring_svd(work: Tensor, bonds: tuple[int, ...]) -> TR:
    """Return the TR-SVD: the first unfolding by SVD, its rank split in two bonds, the rest by TT-SVD."""
    ring, bond, *inner = bonds
    rows = work.flatten(1)
    found = svd(rows, min(ring * bond, *rows.shape), dtype=work.dtype)
    left, right = rows.new_zeros(len(rows), ring * bond), rows.new_zeros(ring * bond, rows.shape[1])
    left[:, : found.rank], right[: found.rank] = found.u, found.s[:, None] * found.vh
    left = left.reshape(-1, ring, bond).transpose(0, 1)  # ring, n_1, bond
    tail = right.reshape(ring, bond, *work.shape[1:]).movedim(0, -1)  # bond, n_2 ... n_d, ring
    if not inner:
        return TR((left, tail), found.error)
    train = tensor_train(tail.flatten(0, 1).flatten(-2), tuple(inner), dtype=work.dtype)
    cores = [core.reshape(-1, dim, core.shape[2]) for core, dim in zip(train.cores[:-1], work.shape[1:], strict=False)]
    last = train.cores[-1].reshape(-1, work.shape[-1], ring)
    ring_train = TR((left, *cores, last))
    return replace(ring_train, error=relative_difference(work, ring_train.to_dense()))


def _refined(work: Tensor, start: TR, iterations: int, tolerance: float) -> TR:
    """Return the ring after sweeps of alternating least squares, or `start` if they find nothing better."""
    cores, total = list(start.cores), squared_norm(work)
    error, done, converged = start.error, 0, False
    while done < iterations and not converged:
        for k in range(len(cores)):
            cores[k], explained = _least_squares(work, cores, k)
        done += 1
        before, error = error, relative(total - explained, total)
        converged = error >= (1 - tolerance) * before
    error = relative_difference(work, TR(tuple(cores)).to_dense())
    return TR(tuple(cores), error, done, converged) if error < start.error else start


def _least_squares(work: Tensor, cores: Sequence[Tensor], mode: int) -> tuple[Tensor, float]:
    """Return the best core of one mode with the others fixed, and the squared norm that the ring then explains."""
    others = [*cores[mode + 1 :], *cores[:mode]]
    turned = work.permute([*range(mode, work.ndim), *range(mode)]).flatten(1)  # n, n of the others
    sides = _projected(turned, others)  # n, right bond, left bond
    gram = _gram(others)
    flat = sides.flatten(1)
    ridge = RIDGE * float(gram.diagonal().mean()) or 1.0
    root = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    solved = torch.cholesky_solve(flat.T, root).T
    return solved.reshape(sides.shape).permute(2, 0, 1), float(
        (2 * flat * solved).sum() - ((solved @ gram) * solved).sum()
    )


def _projected(turned: Float[Tensor, "n rest"], others: Sequence[Tensor]) -> Float[Tensor, "n right left"]:
    """Return `sum_j X[i, j] S[b, j, a]` with the open chain S of the other cores, the longer half of them first."""
    half = len(others) // 2
    near, far = _joined(others[:half]) if half else None, _joined(others[half:])
    middle, size, left = far.shape
    state = turned.reshape(-1, size) @ far.transpose(0, 1).flatten(1)  # n J, middle left
    if near is None:
        return state.reshape(-1, middle, left)
    state = state.reshape(len(turned), -1, left)  # n, J middle, left
    return near.flatten(1) @ state


def _joined(cores: Sequence[Tensor]) -> Float[Tensor, "r n s"]:
    """Return neighbouring cores as one."""
    whole = cores[0]
    for core in cores[1:]:
        whole = (whole.flatten(0, 1) @ core.flatten(1)).reshape(whole.shape[0], -1, core.shape[2])
    return whole


def _gram(cores: Sequence[Tensor]) -> Float[Tensor, "n n"]:
    """Return the Gram matrix of an open chain over its ends, `(right left, right left)` as in `_projected`."""
    ends = cores[0].shape[0]
    state = torch.einsum("anb,cnd->acbd", cores[0], cores[0]).flatten(0, 1)
    for core in cores[1:]:
        _, dim, after = core.shape
        state = (state.transpose(1, 2) @ core.flatten(1)).reshape(len(state), -1, after)  # ends, bond n, after
        state = state.transpose(1, 2) @ core.flatten(0, 1)
    width = state.shape[1]
    return state.reshape(ends, ends, width, width).transpose(1, 2).flatten(2).flatten(0, 1)


def _balanced(cores: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Return cores of equal norms whose product is `scale` times that of the given ones."""
    norms = [float(torch.linalg.vector_norm(core)) for core in cores]
    mean = math.prod((scale ** (1 / len(norms)), *(norm ** (1 / len(norms)) for norm in norms)))
    return [core * (mean / norm if norm else 1.0) for core, norm in zip(cores, norms, strict=True)]
