"""Tucker decomposition over chosen modes: truncated HOSVD, and HOOI sweeps from it."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rankfold._typing import Float
from rankfold.decompose._factors import Tucker, fix_signs
from rankfold.decompose._unfold import (
    check_rank,
    in_dtype,
    mode_gram,
    mode_product,
    relative,
    relative_difference,
    safe_scale,
    squared_norm,
    working_copy,
)
from rankfold.errors import DecompositionError

METHODS = ("hooi", "hosvd")
# Share of the energy below which the difference of the norms of tensor and core has lost too many digits.
CANCELLED = 1e-2
# An error above this is not of the making of float32.
TRUSTED = 3e-3


def tucker(
    tensor: Tensor,
    rank: int | Sequence[int],
    *,
    modes: Sequence[int] | None = None,
    method: str = "hooi",
    iterations: int = 50,
    tolerance: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tucker:
    """Return a core and one orthonormal factor per mode: `X = core x_1 U_1 x_2 U_2 ...` over the chosen modes.

    Starts from the sequentially truncated HOSVD, whose squared error is at most the sum of the tails of the
    unfoldings; HOOI then minimises `||X - X'||_F` over one factor at a time, by the leading eigenvectors of the Gram
    matrix of the tensor projected on all others. The error never rises; the gain is a few percent of it.

    Args:
        tensor: order >= 2, any float dtype and device.
        rank: the core's sizes over `modes`, each between 1 and the dim of its mode; one int for all of them.
        modes: which modes to factorise, all by default. A convolution's kernel has (0, 1): its spatial modes are small.
        method: "hooi", or "hosvd" for the start alone.
        iterations: most HOOI sweeps.
        tolerance: the sweeps end when one lowers the relative error by less than this.
        dtype: to compute in, torch.float64 or torch.float32. By default float64, except for a tensor given in float32
            or less whose error is far above what float32 resolves.

    Returns:
        The core and the factors in the dtype and on the device of the tensor; the error is that before rounding to it.

    Raises:
        DecompositionError: a rank below 1 or above the dim of its mode, as many ranks as modes missing, repeated or
            unknown modes, NaN or Inf entries, a vector, an unknown method.

    Reference:
        De Lathauwer, De Moor and Vandewalle 2000 (HOSVD, HOOI); Vannieuwenhoven, Vandebril, Meerbergen 2012 (ST-HOSVD).

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> f = tucker(x, (2, 2), modes=(0, 1))
        >>> tuple(f.core.shape), f.error < 1e-5
        ((2, 2, 4), True)
    """
    quick = dtype is None and tensor.dtype != torch.float64
    work = working_copy(tensor, torch.float32 if quick else dtype or torch.float64)
    chosen = _check_modes(work, modes)
    ranks = _check_ranks(work, rank, chosen)
    if method not in METHODS:
        raise DecompositionError(f"method {method!r} is unknown: choose from {list(METHODS)}")
    if iterations < 0:
        raise DecompositionError(f"iterations is 0 or more, not {iterations}")
    sweeps = iterations if method == "hooi" else 0
    found = _decompose(work, chosen, ranks, sweeps, tolerance)
    if quick and found.error < TRUSTED:
        found = _decompose(work.double(), chosen, ranks, sweeps, tolerance)
    factors = tuple(in_dtype(factor, tensor.dtype) for factor in found.factors)
    return replace(found, core=in_dtype(found.core, tensor.dtype), factors=factors)


def tucker_errors(
    tensor: Tensor, modes: tuple[int, int] = (0, 1), *, dtype: torch.dtype = torch.float64
) -> Float[Tensor, "dim0 dim1"]:
    """Return the relative error of the truncated HOSVD for every pair of ranks, from one decomposition.

    With `E[i, j]` the energy of the full HOSVD's core at (i, j) of the two modes, the squared error at the ranks
    (a, b) is the sum of E outside its first a rows and b columns. HOOI reaches this or a little less.

    Args:
        tensor: order >= 2, any float dtype and device.
        modes: two of its modes.
        dtype: to compute in, and of the result.

    Returns:
        Errors (dim of the first mode, dim of the second); entry [a - 1, b - 1] belongs to the ranks (a, b).

    Raises:
        DecompositionError: not two different modes, NaN or Inf entries, a vector.

    Example:
        >>> import torch
        >>> e = tucker_errors(torch.diag(torch.tensor([2.0, 1.0, 1.0])))
        >>> round(float(e[0, 0]) ** 2, 6), float(e[2, 2])
        (0.333333, 0.0)
    """
    work = working_copy(tensor, dtype)
    chosen = _check_modes(work, modes)
    if len(chosen) != 2:
        raise DecompositionError(f"an error surface is over two modes, not {tuple(modes)}")
    scale = safe_scale(work)
    work = work if scale == 1 else work / scale
    bases = [_leading(mode_gram(work, mode), work.shape[mode])[0] for mode in chosen]
    core = _project(work, chosen, bases)
    energy = core.movedim(chosen, (0, 1)).reshape(*(work.shape[mode] for mode in chosen), -1).square().sum(2)
    # Sums of what is left out have no cancellation: rows below a, and columns right of b in the rows up to a.
    below = energy.sum(1).flip(0).cumsum(0).flip(0) - energy.sum(1)
    below[-1] = 0
    right = torch.zeros_like(energy)
    right[:, :-1] = energy.flip(1).cumsum(1).flip(1)[:, 1:]
    return ((below[:, None] + right.cumsum(0)) / energy.sum().clamp_min(torch.finfo(dtype).tiny)).clamp_min(0).sqrt()


def _check_modes(tensor: Tensor, modes: Sequence[int] | None) -> tuple[int, ...]:
    given = tuple(range(tensor.ndim)) if modes is None else tuple(modes)
    if not given or any(not -tensor.ndim <= mode < tensor.ndim for mode in given):
        raise DecompositionError(f"modes {given} do not exist in a tensor of shape {tuple(tensor.shape)}")
    chosen = tuple(mode % tensor.ndim for mode in given)
    if len(set(chosen)) != len(chosen):
        raise DecompositionError(f"modes {given} name a mode twice")
    return chosen


def _check_ranks(tensor: Tensor, rank: object, modes: tuple[int, ...]) -> list[int]:
    ranks = list(rank) if isinstance(rank, list | tuple) else [rank] * len(modes)
    if len(ranks) != len(modes):
        raise DecompositionError(f"{len(modes)} ranks are needed for the modes {modes}, not {rank!r}")
    return [check_rank(r, tensor.shape[mode], f"rank of mode {mode}") for r, mode in zip(ranks, modes, strict=True)]


def _decompose(work: Tensor, modes: tuple[int, ...], ranks: list[int], iterations: int, tolerance: float) -> Tucker:
    """Return the decomposition in the dtype of `work`."""
    scale = safe_scale(work)
    work = work if scale == 1 else work / scale
    total = squared_norm(work)
    factors, sweeps, converged = _hosvd(work, modes, ranks), 0, True
    # With one mode truncated, its leading eigenvectors are already the best.
    if iterations and sum(rank < work.shape[mode] for mode, rank in zip(modes, ranks, strict=True)) > 1:
        factors, sweeps, converged = _hooi(work, modes, factors, total, iterations, tolerance)
    factors = [fix_signs(factor, factor.T)[0] for factor in factors]
    core = _project(work, modes, factors)
    tail = total - squared_norm(core)
    found = Tucker(core, tuple(factors), modes, 0.0, sweeps, converged)
    error = relative(tail, total) if tail > CANCELLED * total else relative_difference(work, found.to_dense())
    return replace(found, core=core.contiguous() * scale, error=error)


def _leading(gram: Float[Tensor, "dim dim"], rank: int) -> tuple[Float[Tensor, "dim rank"], float]:
    """Return the leading eigenvectors of a Gram matrix, in descending order, and the energy they capture."""
    values, vectors = torch.linalg.eigh(gram)
    leading = torch.flip(vectors[:, -rank:], (1,))
    if leading.dtype != torch.float64:  # orthonormal to float32 only: one Newton-Schulz step squares that error
        leading = 1.5 * leading - 0.5 * leading @ (leading.T @ leading)
    return leading, float(values[-rank:].double().sum())


def _project(tensor: Tensor, modes: Sequence[int], factors: Sequence[Tensor]) -> Tensor:
    """Return the tensor multiplied in each mode by the transpose of its factor."""
    for mode, factor in zip(modes, factors, strict=True):
        tensor = mode_product(tensor, factor.T, mode)
    return tensor


def _hosvd(work: Tensor, modes: tuple[int, ...], ranks: list[int]) -> list[Tensor]:
    """Return the factors of the sequentially truncated HOSVD, the strongest reductions first."""
    factors: dict[int, Tensor] = {}
    for mode, rank in sorted(zip(modes, ranks, strict=True), key=lambda pair: pair[1] / work.shape[pair[0]]):
        if rank == work.shape[mode]:
            factors[mode] = torch.eye(rank, dtype=work.dtype, device=work.device)
            continue
        factors[mode] = _leading(mode_gram(work, mode), rank)[0]
        work = mode_product(work, factors[mode].T, mode)
    return [factors[mode] for mode in modes]


def _ends(work: Tensor, first: int, last: int) -> Tensor:
    """Return a copy with one mode first and another last, the rest in their order between them."""
    middle = [mode for mode in range(work.ndim) if mode not in (first, last)]
    return work.permute(first, *middle, last).contiguous()


def _hooi(
    work: Tensor, modes: tuple[int, ...], factors: list[Tensor], total: float, iterations: int, tolerance: float
) -> tuple[list[Tensor], int, bool]:
    """Return the improved factors, the sweeps done, and whether the error had settled."""
    factors = list(factors)
    truncated = [k for k, factor in enumerate(factors) if factor.shape[0] > factor.shape[1]]
    # Mode k first and another truncated mode last: the product with the latter gives the unfolding without a copy.
    last = {k: truncated[0] if k != truncated[0] else truncated[1] for k in truncated}
    copies = {k: _ends(work, modes[k], modes[last[k]]) for k in truncated}
    error = captured = math.inf
    for sweep in range(1, iterations + 1):
        for k in truncated:
            projected = copies[k] @ factors[last[k]]
            for j in truncated:
                if j not in (k, last[k]):
                    axis = 1 + sum(m not in (modes[k], modes[last[k]]) for m in range(modes[j]))
                    projected = mode_product(projected, factors[j].T, axis)
            factors[k], captured = _leading(mode_gram(projected, 0), factors[k].shape[1])
        before, error = error, relative(total - captured, total)
        if before - error < tolerance:
            return factors, sweep, True
    return factors, iterations, False
