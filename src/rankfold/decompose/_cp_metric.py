"""CP of a kernel in the metric of the outputs."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._alternate import (
    SWEEPS,
    TOLERANCE,
    Inner,
    Target,
    alternate,
    improved,
    kronecker_solver,
    quadratic_error,
    solve_left,
)
from rankfold.decompose._cp import anchor_ranks, cp, final_form, fits_at, full_cp_rank
from rankfold.decompose._cp_als import Run, Terms, norms_and_directions, split_modes
from rankfold.decompose._curves import monotone_curve
from rankfold.decompose._factors import CP
from rankfold.decompose._metric import soft_marginals, symmetric_root
from rankfold.decompose._unfold import check_rank, khatri_rao, mode_product, working_copy

WORK = 1e11  # multiply-adds that the sweeps may take: about ten seconds of one core
FACTOR_STEPS = 3  # of conjugate gradients per factor and sweep
RIDGE = 1e-6  # damping of the output factor: terms of CP are nearly dependent
ROUGH = 60  # sweeps of the fit of the whitened kernel, which is only a start
ANCHORS = 6
CURVE_SWEEPS, CURVE_WORK = 2, 2e9  # sweeps in the metric at each rank of a curve, and multiply-adds for them
SHORT = 30  # sweeps of a fit for the curve of errors


def metric_cp(
    tensor: Tensor,
    rank: int,
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    iterations: int = SWEEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> CP:
    """Write a kernel as a sum of rank-one terms, at the least error of the outputs of the layer.

    Minimises `trace(G D C D^T)`, D being the difference as a matrix (out, product of the other dims). It starts from
    the better of two fits by `cp`: of the kernel, and of the kernel multiplied in every mode by the root of its
    marginal second moment. Sweeps then solve for the output factor exactly and for the others by conjugate gradients,
    as many as their cost of `rank * columns^2` per step allows within `WORK` multiply-adds; beyond that the output
    factor alone is solved for. The error in the metric never rises. Computes in float64.

    Args:
        tensor: (out, in, …), order >= 3, any float dtype and device.
        rank: number of terms, up to the product of all dims but the largest.
        second_moment: C, over all modes but the first, in their order.
        output_weights: the diagonal of G, (out,).
        iterations: the maximum number of sweeps.
        tolerance: the sweeps end when one lowers the error by less than this share of it.
        seed: of the random starts of `cp`.

    Returns:
        The factors as those of `cp`; `error` is the plain one, and `trace` has those in the metric.

    Raises:
        DecompositionError: a rank out of range, a metric that does not fit, NaN or Inf entries.

    Example:
        >>> import torch
        >>> k = torch.arange(24.0).reshape(2, 3, 4) ** 2
        >>> f = metric_cp(k, 2, second_moment=torch.eye(12))
        >>> f.rank, f.trace == tuple(sorted(f.trace, reverse=True))
        (2, True)
    """
    work = working_copy(tensor, torch.float64, least=3)
    check_rank(rank, full_cp_rank(work.shape))
    form = _Form.of(work, second_moment, output_weights)
    plain = cp(work, rank, seed=seed).factors
    white = form.colour(cp(form.whitened(), rank, iterations=ROUGH, tolerance=1e-4, seed=seed).factors)
    best = min((form.fitted(factors[1:], form.scaled(factors[0])) for factors in (plain, white)), key=_error_of)
    best, trace, settled = form.swept(best, iterations, tolerance, WORK)
    factors = [form.target.unscaled(best.out), *best.inner]
    parts = [norms_and_directions(factor.T) for factor in factors]
    weights = torch.stack([norms for norms, _ in parts]).prod(0)
    run = Run(Terms(weights, [rows for _, rows in parts]), trace, settled)
    return replace(final_form(split_modes(work), run, tensor.dtype), iterations=len(trace) - 1)


def metric_cp_errors(
    tensor: Tensor,
    ranks: Sequence[int],
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    anchors: int = ANCHORS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Estimate the error in the metric of CP at many ranks from a few short fits.

    At each of a few ranks in geometric progression: a short fit of the kernel multiplied by the roots of its marginal
    second moments, begun from the one below, the best output factor for it in the metric, and where they take at most
    `CURVE_WORK` multiply-adds two sweeps over all factors. `metric_cp` continues from roughly there and ends a little
    lower, or up to a third lower where no sweep was affordable. In between the curve is interpolated monotonically.

    Args:
        tensor: (out, in, …), order >= 3, any float dtype and device.
        ranks: the ranks asked for, in any order.
        second_moment: C, over all modes but the first, in their order.
        output_weights: the diagonal of G, (out,).
        anchors: the maximum number of fits.
        seed: of the random starts of the first fit.
        dtype: to compute in.

    Returns:
        One relative error of the outputs per rank.

    Raises:
        DecompositionError: a rank out of range, a metric that does not fit, NaN or Inf entries.

    Example:
        >>> import torch
        >>> k = torch.arange(24.0).reshape(2, 3, 4) ** 2
        >>> e = metric_cp_errors(k, [1, 2, 4], second_moment=torch.eye(12))
        >>> e == sorted(e, reverse=True)
        True
    """
    work = working_copy(tensor, dtype, least=3)
    for rank in ranks:
        check_rank(rank, full_cp_rank(work.shape))
    form = _Form.of(work, second_moment, output_weights)
    if not len(ranks) or form.target.total <= 0:
        return [0.0] * len(ranks)
    known: dict[int, float] = {}
    for rank, run in fits_at(form.whitened(), anchor_ranks(ranks, anchors), SHORT, seed):
        factors = [run.terms.rows[0].T * run.terms.weights, *(rows.T for rows in run.terms.rows[1:])]
        coloured = form.colour(factors)
        begun = form.fitted(coloured[1:], form.scaled(coloured[0]))
        known[rank] = form.swept(begun, CURVE_SWEEPS, 0.0, CURVE_WORK)[0].error
    return monotone_curve(list(known), list(known.values()), ranks)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Inner factors (dim, rank), the output factor that fits them best (its rows scaled), and their error."""

    inner: list[Tensor]
    out: Float[Tensor, "m rank"]
    error: float


def _error_of(fit: _Fit) -> float:
    return fit.error


@dataclass(frozen=True, eq=False)
class _Form:
    """CP as `A B(x)`: A is the output factor, B the Khatri-Rao product of the others, linear in each of them."""

    target: Target
    dims: tuple[int, ...]
    marginals: tuple[Tensor, ...]  # second moments of each inner mode, softened; their product has the norm of C
    roots: tuple[Tensor, ...]

    @classmethod
    def of(cls, work: Tensor, second_moment: Tensor, output_weights: Tensor | None) -> _Form:
        target = Target.of(work.flatten(1), second_moment, output_weights, work.dtype)
        dims = tuple(work.shape[1:])
        marginals = soft_marginals(target.moment, dims)
        return cls(target, dims, marginals, tuple(map(symmetric_root, marginals)))

    def whitened(self) -> Tensor:
        """Return the kernel multiplied in every mode by the root of its weights or its marginal second moment."""
        tensor = self.target.matrix.reshape(-1, *self.dims)
        for mode, root in enumerate(self.roots):
            tensor = mode_product(tensor, root, mode + 1)
        return tensor

    def colour(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return the factors of the kernel from those of the whitened one."""
        inner = [torch.linalg.solve(root, factor) for root, factor in zip(self.roots, factors[1:], strict=True)]
        return [self.target.unscaled(factors[0]), *inner]

    def scaled(self, out: Tensor) -> Tensor:
        """Return an output factor with the roots of the weights."""
        return out if self.target.roots is None else out * self.target.roots

    def fitted(self, inner: Sequence[Tensor], out: Tensor) -> _Fit:
        """Return inner factors, their columns of norm one, with the output factor that fits them best from `out`."""
        norms = [torch.linalg.vector_norm(factor, dim=0).clamp_min(1e-30) for factor in inner]
        inner = [factor / norm for factor, norm in zip(inner, norms, strict=True)]
        out = out * reduce(torch.mul, norms)
        right = khatri_rao(inner).T
        image = right @ self.target.moment
        normal, wanted = image @ right.T, self.target.image @ right.T
        out = solve_left(out, normal, wanted, RIDGE)
        return _Fit(list(inner), out, quadratic_error(self.target, out, normal, wanted))

    def swept(self, best: _Fit, iterations: int, tolerance: float, work: float) -> tuple[_Fit, tuple[float, ...], bool]:
        """Return a fit after as many sweeps as fit into `work`, its errors, and whether it settled."""
        step = best.out.shape[1] * self.target.moment.numel()
        affordable = int(work // (step * (FACTOR_STEPS + 2) * len(self.dims)))

        def improve() -> float:
            nonlocal best
            for mode in range(len(best.inner) - 1, -1, -1):
                fresh = improved(self.target, best.out, best.inner[mode], self.factor(best, mode), FACTOR_STEPS)
                inner = [*best.inner[:mode], fresh, *best.inner[mode + 1 :]]
                best = min(best, self.fitted(inner, best.out), key=_error_of)
            return best.error

        trace, settled = alternate(improve, min(iterations, affordable), tolerance, best.error)
        return best, trace, settled

    def factor(self, fit: _Fit, mode: int) -> Inner:
        """Return one of the inner factors as the solver sees it."""
        others = [factor for k, factor in enumerate(fit.inner) if k != mode]
        before = khatri_rao(fit.inner[:mode]) if mode else fit.out.new_ones(1, fit.out.shape[1])
        after = khatri_rao(fit.inner[mode + 1 :]) if fit.inner[mode + 1 :] else fit.out.new_ones(1, fit.out.shape[1])

        def expand(x: Tensor) -> Tensor:
            return khatri_rao([before, x, after]).T @ self.target.moment

        def collect(matrix: Tensor) -> Tensor:
            cube = matrix.reshape(matrix.shape[0], len(before), -1, len(after))
            return torch.einsum("rbda,br,ar->dr", cube, before, after)

        grams = [
            factor.T @ marginal @ factor
            for factor, marginal in zip(others, (m for k, m in enumerate(self.marginals) if k != mode), strict=True)
        ]
        terms = reduce(torch.mul, [fit.out.T @ fit.out, *grams])
        return Inner(expand, collect, kronecker_solver(self.marginals[mode], terms))
