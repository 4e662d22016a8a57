"""Tucker decomposition over chosen modes: truncated HOSVD, and HOOI sweeps from it."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rankfold._common import Float, check_dense, one_of, whole
from rankfold.decompose._factors import Tucker, fix_signs
from rankfold.decompose._unfold import (
    check_rank,
    fold,
    in_dtype,
    mode_gram,
    mode_product,
    relative,
    relative_difference,
    safe_scale,
    squared_norm,
    unfold,
    working_copy,
)
from rankfold.errors import DecompositionError

METHODS = ("hooi", "hosvd")
# Share of the energy below which the difference between the norms of tensor and core has lost too many digits.
CANCELLED = 1e-2
# Errors above this cannot come from float32.
TRUSTED = 3e-3
# The smallest change of the error that float32 resolves.
RESOLVED = 1e-6


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
    matrix of the tensor projected on all others, found from those of the previous sweep. The error never rises, and
    usually falls by a few per cent.

    Args:
        tensor: order >= 2, any float dtype and device.
        rank: the core's sizes over `modes`, each between 1 and the dim of its mode; one int for all of them.
        modes: which modes to factorise, all by default. A convolution's kernel has (0, 1): its spatial modes are small.
        method: "hooi", or "hosvd" for the starting point alone.
        iterations: the maximum number of HOOI sweeps.
        tolerance: the sweeps end when one lowers the relative error by less than this.
        dtype: to compute in, torch.float64 or torch.float32. By default the bases are found in float32 where the error
            is far above what that resolves, else in float64; the core of a tensor in float64 is always float64's.

    Returns:
        The core and the factors in the dtype and on the device of the tensor; the error is that before rounding to it.

    Raises:
        DecompositionError: a rank below 1 or above the dim of its mode, another number of ranks than of modes, repeated
            or unknown modes, NaN or Inf entries, a vector, an unknown method.

    Reference:
        De Lathauwer, De Moor and Vandewalle 2000 (HOSVD, HOOI); Vannieuwenhoven, Vandebril, Meerbergen 2012 (ST-HOSVD).

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> f = tucker(x, (2, 2), modes=(0, 1))
        >>> tuple(f.core.shape), f.error < 1e-5
        ((2, 2, 4), True)
    """
    check_dense(tensor)
    narrow = dtype is None and tolerance >= RESOLVED
    work = working_copy(tensor, torch.float32 if narrow and tensor.dtype != torch.float64 else dtype or torch.float64)
    chosen = _check_modes(work, modes)
    ranks = _check_ranks(work, rank, chosen)
    one_of("method", method, METHODS, error=DecompositionError)
    whole("iterations", iterations, 0, error=DecompositionError)
    sweeps = iterations if method == "hooi" else 0
    found = _decompose(work, chosen, ranks, torch.float32 if narrow else work.dtype, sweeps, tolerance)
    if narrow and found.error < TRUSTED:
        found = _decompose(work.double(), chosen, ranks, torch.float64, sweeps, tolerance)
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
    bases = {mode: _leading(mode_gram(work, mode), work.shape[mode])[0].kept for mode in chosen}
    core = _project(work, bases)
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


@dataclass(frozen=True, eq=False)
class _Basis:
    """An orthonormal basis of a mode: the directions kept, and the others, which are computed only on request."""

    kept: Float[Tensor, "dim rank"]
    rest: Callable[[], Tensor]  # (dim, others)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Bases by axis, the matching core, the sweeps done, and whether the error had settled."""

    bases: dict[int, Tensor]
    core: Tensor
    sweeps: int = 0
    converged: bool = True


def _decompose(  # noqa: PLR0913 (the arguments of `tucker`, checked)
    work: Tensor, modes: tuple[int, ...], ranks: list[int], dtype: torch.dtype, iterations: int, tolerance: float
) -> Tucker:
    """Return the decomposition in the dtype of `work`, with bases found in `dtype`."""
    scale = safe_scale(work)
    work = work if scale == 1 else work / scale
    total = squared_norm(work)
    layout = _layout(work, modes, ranks)
    arranged = work.permute(layout).contiguous()
    sizes = {layout.index(mode): rank for mode, rank in zip(modes, ranks, strict=True) if rank < work.shape[mode]}
    if iterations and len(sizes) > 1:  # with a single mode truncated, its leading eigenvectors are already optimal
        fit = _hooi(arranged.to(dtype), sizes, total, iterations, tolerance)
    else:
        fit = _hosvd(arranged.to(dtype), sizes)
    bases, core = {axis: _polished(basis.to(work.dtype)) for axis, basis in fit.bases.items()}, fit.core
    if dtype != work.dtype:
        bases = {axis: _polished(basis) for axis, basis in bases.items()}
        core = _project(arranged, bases)
    for axis, basis in bases.items():
        bases[axis], rows = fix_signs(basis, unfold(core, axis))
        core = fold(rows, axis, core.shape)
    error = relative(total - squared_norm(core), total)
    core = core.permute(*(layout.index(mode) for mode in range(work.ndim))).contiguous()
    eye = partial(torch.eye, dtype=work.dtype, device=work.device)
    factors = tuple(bases[axis] if (axis := layout.index(mode)) in bases else eye(work.shape[mode]) for mode in modes)
    found = Tucker(core, factors, modes, error, fit.sweeps, fit.converged)
    if found.error**2 <= CANCELLED:
        found = replace(found, error=relative_difference(work, found.to_dense()))
    return replace(found, core=core * scale)


def _layout(work: Tensor, modes: tuple[int, ...], ranks: list[int]) -> list[int]:
    """Return the order of the modes that puts a truncated one at each end, where products need no copy."""
    truncated = [mode for mode, rank in zip(modes, ranks, strict=True) if rank < work.shape[mode]]
    first, last = truncated[:1], truncated[1:][-1:]
    return [*first, *(mode for mode in range(work.ndim) if mode not in (*first, *last)), *last]


def _leading(gram: Float[Tensor, "dim dim"], rank: int) -> tuple[_Basis, float]:
    """Return the leading eigenvectors of a Gram matrix, in descending order, and the energy they capture."""
    values, vectors = torch.linalg.eigh(gram)
    basis = _Basis(torch.flip(vectors[:, -rank:], (1,)), lambda: vectors[:, :-rank])
    return basis, float(values[-rank:].double().sum())


def _turned(gram: Float[Tensor, "dim dim"], basis: _Basis) -> tuple[_Basis, float]:
    """Rotate a basis near the leading eigenvectors of a Gram matrix closer to them, and return the energy captured.

    Every pair of a kept and another direction is rotated by its Jacobi angle, all at once: this squares the error of
    the subspace using matrix products alone. If it captures less than before, the eigenvectors are computed instead.
    """
    image, rest = gram @ basis.kept, basis.rest()
    energies = (basis.kept * image).sum(0)
    gaps = energies - (rest * (gram @ rest)).sum(0)[:, None]
    half = rest.T @ image
    gaps = gaps.clamp_min(0) / 2
    turn = half / (gaps + torch.hypot(gaps, half)).clamp_min(torch.finfo(half.dtype).tiny)  # tangents, at most 1
    kept = _orthonormal(basis.kept + rest @ turn)
    before, captured = (float(x.double().sum()) for x in (energies, kept * (gram @ kept)))
    if captured < before * (1 - torch.finfo(gram.dtype).eps):
        return _leading(gram, kept.shape[1])
    return _Basis(kept, lambda: _orthonormal(rest - basis.kept @ turn.T)), captured


def _orthonormal(columns: Float[Tensor, "dim rank"]) -> Float[Tensor, "dim rank"]:
    """Return an orthonormal basis of the span of well-conditioned columns, by Cholesky."""
    upper = torch.linalg.cholesky(columns.T @ columns).mT
    basis: Tensor = torch.linalg.solve_triangular(upper, columns, upper=True, left=False)
    return basis


def _polished(basis: Float[Tensor, "dim rank"]) -> Float[Tensor, "dim rank"]:
    """Return columns that are orthonormal to rounding: one Newton-Schulz step squares the error."""
    return 1.5 * basis - 0.5 * basis @ (basis.T @ basis)


def _project(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """Return the tensor multiplied in each axis by the transpose of its factor."""
    for axis, factor in kept.items():
        tensor = mode_product(tensor, factor.T, axis)
    return tensor


def _hosvd(work: Tensor, sizes: Mapping[int, int]) -> _Fit:
    """Return the sequentially truncated HOSVD."""
    found, rest = _nested(work, sizes)
    bases = {axis: basis.kept for axis, basis in found.items()}
    return _Fit(bases, _project(rest, dict(list(bases.items())[-1:])))


def _nested(work: Tensor, sizes: Mapping[int, int]) -> tuple[dict[int, _Basis], Tensor]:
    """Return bases, each of the tensor projected on those before it, the strongest reduction first.

    Also returns the tensor projected on all bases but the last.
    """
    bases: dict[int, _Basis] = {}
    for axis in sorted(sizes, key=lambda axis: sizes[axis] / work.shape[axis]):
        work = _project(work, {before: basis.kept for before, basis in list(bases.items())[-1:]})
        bases[axis], _ = _leading(mode_gram(work, axis), sizes[axis])
    return bases, work


def _hooi(work: Tensor, sizes: Mapping[int, int], total: float, iterations: int, tolerance: float) -> _Fit:
    """Return the bases of the HOSVD improved by sweeps over the modes, each against the tensor projected on all others.

    Each product is freed before the next is made: fresh memory from the system costs as much as the product itself.
    """
    bases, _ = _nested(work, sizes)
    last, error, projected = list(bases)[-1], math.inf, work
    for sweep in range(1, iterations + 1):
        for axis, basis in bases.items():
            projected = work
            projected = _project(work, {other: found.kept for other, found in bases.items() if other != axis})
            # the HOSVD saw all other modes truncated only for the last basis: the other ones are far off
            far = sweep == 1 and axis != last
            gram = mode_gram(projected, axis)
            bases[axis], captured = _leading(gram, basis.kept.shape[1]) if far else _turned(gram, basis)
        before, error = error, relative(total - captured, total)
        if before - error < tolerance:
            break
    kept = {axis: basis.kept for axis, basis in bases.items()}
    return _Fit(kept, _project(projected, {last: kept[last]}), sweep, before - error < tolerance)
