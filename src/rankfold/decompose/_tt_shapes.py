"""The shapes of tensor trains: bonds, balanced factors of a size, matrices folded to paired modes."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from operator import mul

from torch import Tensor

from rankfold._common import Rank, check_dense, whole
from rankfold.decompose._unfold import check_rank
from rankfold.errors import DecompositionError


def pair_modes(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int]) -> Tensor:
    """Return a matrix folded to one mode `out_k * in_k` per pair, padded with zeros where the shapes exceed it.

    Raises:
        DecompositionError: not a matrix, shapes of different lengths, or too small for the matrix.

    Example:
        >>> import torch
        >>> tuple(pair_modes(torch.ones(5, 12), (2, 3), (3, 4)).shape)
        (6, 12)
    """
    matrix = _padded(matrix, out_shape, in_shape)
    order = len(out_shape)
    axes = [axis for k in range(order) for axis in (k, order + k)]
    return (
        matrix.reshape(*out_shape, *in_shape)
        .permute(axes)
        .reshape([m * n for m, n in zip(out_shape, in_shape, strict=True)])
    )


def two_modes(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int]) -> Tensor:
    """Return a matrix with two modes of rows and two of columns, padded with zeros where the shapes exceed it.

    Raises:
        DecompositionError: not a matrix, shapes that are not two dims each, or too small for the matrix.

    Example:
        >>> import torch
        >>> tuple(two_modes(torch.ones(5, 12), (2, 3), (3, 4)).shape)
        (2, 3, 3, 4)
    """
    if len(out_shape) != 2 or len(in_shape) != 2:
        raise DecompositionError(f"out_shape {tuple(out_shape)} and in_shape {tuple(in_shape)} must be two dims each")
    return _padded(matrix, out_shape, in_shape).reshape(*out_shape, *in_shape)


def _padded(matrix: Tensor, out_shape: Sequence[int], in_shape: Sequence[int]) -> Tensor:
    """Return the matrix, checked, and padded to as many rows and columns as the shapes have."""
    check_dense(matrix, "matrix", meta=True)
    if matrix.ndim != 2:
        raise DecompositionError(f"modes are folded from a matrix, not from a tensor of shape {tuple(matrix.shape)}")
    if len(out_shape) != len(in_shape) or not out_shape:
        raise DecompositionError(f"out_shape {tuple(out_shape)} and in_shape {tuple(in_shape)} must have equal lengths")
    for name, shape, size in (("out_shape", out_shape, matrix.shape[0]), ("in_shape", in_shape, matrix.shape[1])):
        if math.prod(shape) < size or min(shape) < 1:
            raise DecompositionError(f"{name} {tuple(shape)} does not cover {size}: its product must be at least that")
    rows, columns = math.prod(out_shape), math.prod(in_shape)
    if (rows, columns) != tuple(matrix.shape):
        padded = matrix.new_zeros(rows, columns)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        return padded
    return matrix


def bonds(shape: Sequence[int], rank: Rank | None) -> tuple[int, ...]:
    """Return one rank per bond of a tensor train of the given dims.

    An int is a cap for all bonds, clipped to the largest rank possible at each; None is the full rank.

    Raises:
        DecompositionError: a rank below 1, beyond the largest bond, or that its neighbours cannot feed.

    Example:
        >>> bonds((4, 4, 4, 4), 8), bonds((4, 4, 4, 4), None)
        ((4, 8, 4), (4, 16, 4))
    """
    whole = math.prod(shape)
    full = tuple(min(rows, whole // rows) for rows in accumulate(shape[:-1], mul))
    if rank is None:
        return full
    if not isinstance(rank, tuple):
        cap = check_rank(rank, max(full, default=1))
        return tuple(min(cap, limit) for limit in full)
    if len(rank) != len(full):
        raise DecompositionError(
            f"rank {rank} has {len(rank)} entries: a train over {tuple(shape)} has {len(full)} bonds"
        )
    for k, (bond, limit) in enumerate(zip(rank, full, strict=True)):
        check_rank(bond, limit, f"rank[{k}] of {rank}")
    ends = (1, *rank, 1)
    for k, dim in enumerate(shape):
        if ends[k + 1] > ends[k] * dim or ends[k] > dim * ends[k + 1]:
            raise DecompositionError(
                f"rank {rank} cannot be filled: bonds {ends[k]} and {ends[k + 1]} around a mode of {dim}"
            )
    return rank


def balanced_shape(n: int, order: int) -> tuple[int, ...]:
    """Return `order` factors, ascending and as equal as possible, whose product is at least `n`.

    The factors of `n` itself where they are balanced (their sum at most 1.5 times the smallest sum that any
    product >= n can have), else those of the next product of nearly equal numbers: primes are padded.

    Args:
        n: what to cover, >= 1.
        order: how many factors, >= 1.

    Returns:
        The factors.

    Raises:
        DecompositionError: `n` or `order` below 1.

    Example:
        >>> balanced_shape(4096, 4), balanced_shape(97, 2), balanced_shape(25088, 3)
        ((8, 8, 8, 8), (10, 10), (28, 28, 32))
    """
    whole("n", n, error=DecompositionError)
    whole("order", order, error=DecompositionError)
    low = max(1, round(n ** (1 / order)))
    low -= low**order > n
    padded = next(shape for k in range(order + 1) if math.prod(shape := (low,) * (order - k) + (low + 1,) * k) >= n)
    exact = _flattest_factors(n, order)
    return exact if sum(exact) <= 1.5 * sum(padded) else padded


@lru_cache(maxsize=4096)
def _flattest_factors(n: int, order: int) -> tuple[int, ...]:
    """Return the factorisation of n with the smallest sum, ascending."""
    if order == 1:
        return (n,)
    # the smallest factor is at most the order-th root
    divisors = [k for k in range(1, int(n ** (1 / order)) + 2) if n % k == 0]
    return min((tuple(sorted((k, *_flattest_factors(n // k, order - 1)))) for k in divisors), key=lambda s: (sum(s), s))
