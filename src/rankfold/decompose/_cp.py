"""Canonical polyadic decomposition (CP) of a tensor of any order, and its error over a range of ranks."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rankfold._common import real, whole
from rankfold.decompose._cp_als import (
    Run,
    Split,
    Terms,
    norms_and_directions,
    run_sweeps,
    split_modes,
    squared_residual,
)
from rankfold.decompose._cp_correction import corrected, degeneracy, sensitivity
from rankfold.decompose._cp_start import STARTS, compress, expand, extend, nested
from rankfold.decompose._curves import monotone_curve
from rankfold.decompose._factors import CP
from rankfold.decompose._unfold import check_rank, check_tolerance, relative, working_copy
from rankfold.errors import DecompositionError

TRIAL = 10  # sweeps that every start gets before the best one continues
WORTHWHILE = 0.7  # a core is swept first where it has less than this share of the tensor's entries


def cp(  # noqa: PLR0913 (one keyword per choice of the algorithm)
    tensor: Tensor,
    rank: int,
    *,
    iterations: int = 200,
    tolerance: float = 1e-6,
    starts: Sequence[str] = ("algebraic", "hosvd", "random"),
    initial: CP | None = None,
    max_degeneracy: float = 100.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> CP:
    """Write a tensor as a sum of `rank` rank-one terms, minimising the Frobenius error by alternating least squares.

    `min ||X - sum_r a_r o b_r o c_r ...||`, one factor at a time. Every start runs briefly on a core compressed by
    HOSVD; the best one continues there and then on the tensor itself. A best approximation need not exist: terms may
    grow without bound and cancel. No sweep lets the sum of their squared norms exceed `max_degeneracy ||X||^2`, and
    where it ends above `10 ||X||^2`, the error-preserving correction lowers it at an error at most 0.5 % higher. At
    order 2 it is the SVD.

    Use it for kernels whose modes all have to be separated. When only two modes are long, Tucker reaches a lower error
    with the same parameters, and its optimum is easier to find.

    Args:
        tensor: order >= 2, any float dtype and device.
        rank: number of terms, at most the product of all dims but the largest (where CP is exact).
        iterations: the maximum number of sweeps, over the core and the tensor together, once the start is chosen.
        tolerance: stop when a sweep lowers the error by less than this share of it.
        starts: names out of "algebraic" (generalised eigenvalues; exact for exact tensors whose rank is at most
            the second longest dim), "hosvd" (nested SVDs) and "random".
        initial: an earlier result for this tensor, at the same or a lower rank, as one more start;
            missing terms are taken from its residual. With `starts=()` it is the only one.
        max_degeneracy: bound on `sum_r ||term_r||^2 / ||X||^2` of the result, at least 1; `math.inf` for
            plain least squares, neither bounded nor corrected.
        seed: of the random numbers in the "algebraic" and "random" starts.
        dtype: to compute in: torch.float64 or torch.float32.

    Returns:
        The factors in the tensor's dtype, terms by descending norm, the scale of each spread evenly, signs fixed;
        with `error` (exact, of these factors), `trace`, `degeneracy` and `sensitivity`.

    Raises:
        DecompositionError: rank below 1 or beyond the full one, NaN or Inf entries, no or an unknown start,
            an `initial` of other dims or a higher rank, an option out of its range.

    References:
        Kolda and Bader 2009, figure 3.3 (ALS); Phan, Tichavsky and Cichocki 2013 (dimension tree);
        Phan et al. 2020, section 3 (correction and sensitivity).

    Example:
        >>> import torch
        >>> a, b, c = torch.eye(4, 2), torch.eye(5, 2), torch.ones(3, 2)
        >>> f = cp(torch.einsum("ir,jr,kr->ijk", a, b, c), 2)
        >>> f.rank, round(f.error, 5), round(f.degeneracy, 5)
        (2, 0.0, 1.0)
    """
    work = working_copy(tensor, dtype)
    check_rank(rank, full_cp_rank(tensor.shape))
    limits = (iterations, check_tolerance(tolerance))
    _check_options(iterations, starts, initial, max_degeneracy)
    warm = [] if initial is None else [_initial_terms(initial, work, rank)]
    split = split_modes(work, max_degeneracy=max_degeneracy)
    if work.ndim == 2 or split.total == 0:
        run = Run(nested(work, rank), (), True)
    else:
        run = _fit(work, split, rank, limits, starts, warm, seed)
        run = Run(corrected(split, run.terms), run.trace, run.converged)
    return final_form(split, run, tensor.dtype)


def cp_errors(  # noqa: PLR0913 (one keyword per choice of the algorithm)
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    iterations: int = 30,
    anchors: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Estimate the relative error of CP at many ranks from a few short fits, each started from the one before.

    Fits at `anchors` ranks in geometric progression between the smallest and the largest; there the error is that
    of a fit of `iterations` sweeps, an upper estimate of what `cp` reaches. In between, the square root of the error
    is interpolated monotonically (Fritsch and Carlson 1980). The curve never rises with the rank.

    Args:
        tensor: order >= 2, any float dtype and device.
        ranks: the ranks asked for, in any order, each between 1 and the full rank.
        iterations: sweeps per fit.
        anchors: the maximum number of fits, at least 2.
        seed: of the random numbers in the first fit's starts.
        dtype: to compute in; the default resolves errors down to about 1e-6.

    Returns:
        One relative error per entry of `ranks`.

    Raises:
        DecompositionError: no ranks, one out of range, or a tensor that `cp` refuses.

    Example:
        >>> import torch
        >>> x = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(0))
        >>> curve = cp_errors(x, range(1, 37))
        >>> len(curve), curve == sorted(curve, reverse=True), curve[-1] < 1e-5
        (36, True, True)
    """
    work = working_copy(tensor, dtype)
    if not len(ranks):
        raise DecompositionError("an error curve needs at least one rank")
    for rank in ranks:
        check_rank(rank, full_cp_rank(tensor.shape))
    whole("iterations", iterations, error=DecompositionError)
    whole("anchors", anchors, 2, error=DecompositionError)
    fits = {rank: run.trace[-1] for rank, run in fits_at(work, anchor_ranks(ranks, anchors), iterations, seed)}
    return monotone_curve(list(fits), list(fits.values()), ranks) if fits else [0.0] * len(ranks)


def anchor_ranks(ranks: Sequence[int], anchors: int) -> list[int]:
    """Return at most `anchors` ranks in geometric progression between the smallest and the largest."""
    return [int(r) for r in np.unique(np.geomspace(min(ranks), max(ranks), anchors).round())]


def fits_at(work: Tensor, ranks: Sequence[int], iterations: int, seed: int) -> Iterator[tuple[int, Run]]:
    """Yield a short fit at each of the ascending ranks, started from the one before; nothing for the zero tensor."""
    split = split_modes(work)
    terms: Terms | None = None
    for rank in ranks if split.total else ():
        warm = [] if terms is None else [extend(work, terms, rank)]
        starts = tuple(STARTS) if terms is None else ("hosvd",)
        run = _fit(work, split, rank, (iterations, 1e-4), starts, warm, seed)
        terms = run.terms
        yield rank, run


def full_cp_rank(shape: Sequence[int]) -> int:
    """Return the product of all dims but the largest, a rank at which CP is exact for every tensor of the shape.

    Example:
        >>> full_cp_rank((64, 32, 9))
        288
    """
    return math.prod(shape) // max(shape)


def _fit(  # noqa: PLR0913 (private; two callers)
    work: Tensor,
    split: Split,
    rank: int,
    limits: tuple[int, float],
    starts: Sequence[str],
    warm: Sequence[Terms],
    seed: int,
) -> Run:
    """Try every start briefly, on the compressed core if there is one; continue the best there and on the tensor."""
    core, bases = compress(work, rank) if starts else (work, [])
    if core.numel() > WORTHWHILE * work.numel():
        core, bases = work, []
    small = split_modes(core, split) if bases else split
    begun = [(small, STARTS[name](core, rank, seed)) for name in starts]
    begun += [(split, terms) for terms in warm]
    iterations, tolerance = limits
    trials = [(s, run_sweeps(s, t, min(TRIAL, iterations), tolerance)) for s, t in begun if t is not None]
    if not trials:
        raise DecompositionError(
            f'the "algebraic" start has nothing to begin from at rank {rank} of dims {tuple(work.shape)} (beyond the '
            'second longest dim, or mixtures of slices are singular): add "hosvd" or "random" to the starts'
        )
    where, run = min(trials, key=lambda trial: trial[1].trace[-1])
    if where is split:
        return _go_on(split, run, iterations, tolerance)
    run = _go_on(small, run, iterations // 2, tolerance)
    return _go_on(split, Run(expand(run.terms, bases), run.trace, False), iterations, tolerance)


def _go_on(split: Split, run: Run, iterations: int, tolerance: float) -> Run:
    """Continue a run until it has done `iterations` sweeps in all or converges."""
    missing = iterations - len(run.trace)
    if run.converged or missing < 1:
        return run
    more = run_sweeps(split, run.terms, missing, tolerance)
    return Run(more.terms, run.trace + more.trace, more.converged)


def _check_options(iterations: int, starts: Sequence[str], initial: CP | None, max_degeneracy: float) -> None:
    """Raise DecompositionError for options that `cp` cannot use."""
    whole("iterations", iterations, error=DecompositionError)
    unknown = [name for name in starts if name not in STARTS] if not isinstance(starts, str) else [starts]
    if unknown or (not starts and initial is None):
        raise DecompositionError(f"starts is a sequence of names out of {sorted(STARTS)}, not {starts!r}")
    real("max_degeneracy", max_degeneracy, 1, ends="[]", error=DecompositionError)


def _initial_terms(initial: CP, work: Tensor, rank: int) -> Terms:
    """Return an earlier result as terms of the given rank, its missing ones taken from the residual."""
    if not isinstance(initial, CP):
        raise DecompositionError(f"initial must be a CP, got {type(initial).__name__}: pass what cp returned")
    dims = tuple(factor.shape[0] for factor in initial.factors)
    if dims != tuple(work.shape) or initial.rank > rank:
        raise DecompositionError(
            f"the initial CP has dims {dims} and rank {initial.rank}: it cannot begin one of dims {tuple(work.shape)} "
            f"and rank {rank}; give one of these dims and at most this rank"
        )
    parts = [norms_and_directions(factor.detach().to(work).T) for factor in initial.factors]
    weights = torch.stack([norms for norms, _ in parts]).prod(0)
    return extend(work, Terms(weights, [rows for _, rows in parts]), rank)


def final_form(split: Split, run: Run, dtype: torch.dtype) -> CP:
    """Return terms in their final form: by descending norm, balanced, signs fixed, in the tensor's dtype."""
    weights, order = run.terms.weights.sort(descending=True, stable=True)
    weights = torch.where(weights > weights[0] * torch.finfo(weights.dtype).eps, weights, 0.0)
    share = weights.pow(1 / len(run.terms.rows))
    flip = torch.ones_like(weights)
    factors = []
    for mode, rows in enumerate(run.terms.rows):
        scaled = rows[order]
        if mode < len(run.terms.rows) - 1:
            largest = scaled.gather(1, scaled.abs().argmax(1, keepdim=True))[:, 0]
            signs = torch.where(largest < 0, -1.0, 1.0).to(scaled)
            flip = flip * signs
        else:
            signs = flip
        factors.append((scaled * (share * signs)[:, None]).T.to(dtype).contiguous())
    back = [factor.T.to(split.matrix.dtype) for factor in factors]
    final = Terms(torch.ones_like(weights), back)
    error = relative(squared_residual(split, final), split.total)
    kept = Terms(weights, run.terms.rows)
    return CP(
        factors=tuple(factors),
        error=error,
        iterations=len(run.trace),
        converged=run.converged,
        trace=run.trace,
        degeneracy=degeneracy(kept, split.total),
        sensitivity=sensitivity(kept),
    )
