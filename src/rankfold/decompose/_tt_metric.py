"""Tensor trains of a matrix in the metric of the outputs."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold._common import Float, Rank, check_dense
from rankfold.decompose._alternate import TOLERANCE, Inner, damped_cholesky, solve_inner
from rankfold.decompose._curves import MEASURED, calibrated, spread_over
from rankfold.decompose._factors import TTMatrix
from rankfold.decompose._metric import (
    SOFTENING,
    check_definite,
    check_moment,
    check_weights,
    soft_marginals,
    symmetric_root,
)
from rankfold.decompose._tt import tt_matrix, tt_roundings
from rankfold.decompose._tt_cores import unpaired
from rankfold.decompose._tt_shapes import pair_modes
from rankfold.decompose._unfold import in_dtype, relative, relative_difference, split_axis, working_copy
from rankfold.errors import DecompositionError

CORE_SWEEPS = 6
WORK = 5e10  # multiply-adds that the solves may take: about five seconds of one core
CORE_STEPS = 3  # of conjugate gradients per core
CURVE_SWEEPS, CURVE_WORK = 1, 1e9  # sweeps at each of the ranks where a curve is measured, multiply-adds for them


def metric_tt_matrix(
    matrix: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    rank: Rank,
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    iterations: int = CORE_SWEEPS,
) -> TTMatrix:
    """Return a matrix as a tensor train over paired modes, at the least error of the outputs of the layer.

    Minimises `trace(G D C D^T)` over one core after the other, by conjugate gradients, from the better of two TT-SVDs:
    of the matrix, and of the matrix multiplied in every input mode by the root of its marginal second moment. One
    step costs `rows * columns^2` multiply-adds; as many cores are solved for as fit into `WORK` of them, at most
    `iterations` sweeps. The error in the metric never rises. Computes in float64.

    Args:
        matrix: (out, in), with as many columns as `in_shape` has and at most as many rows as `out_shape`.
        out_shape: dims of the rows; where their product is larger, the train is free there.
        in_shape: as many dims of the columns.
        rank: a cap for every bond, clipped to what is possible at each; or one per bond. None keeps all.
        second_moment: C, (in, in), or (groups, in, in) where groups of rows see inputs of their own.
        output_weights: the diagonal of G, (out,), weights of the outputs.
        iterations: the maximum number of sweeps; they end when one lowers the error by less than `TOLERANCE` of it.

    Returns:
        Cores (r, out_k, in_k, r'); `error` is the plain one, `trace` has those in the metric.

    Raises:
        DecompositionError: shapes or a metric that do not fit, NaN or Inf entries, a rank out of range.

    Example:
        >>> import torch
        >>> f = metric_tt_matrix(torch.arange(64.0).reshape(8, 8) ** 2, (2, 4), (4, 2), 1, second_moment=torch.eye(8))
        >>> f.rank, f.trace == tuple(sorted(f.trace, reverse=True))
        ((1,), True)
    """
    work = working_copy(matrix, torch.float64, order=2, what="matrix")
    form = _Form.of(work, second_moment, output_weights, tuple(out_shape), tuple(in_shape))
    plain = list(tt_matrix(work, out_shape, in_shape, rank).cores)
    white = form.coloured(tt_matrix(form.whitened(), out_shape, in_shape, rank).cores)
    best, trace = form.swept(min((plain, white), key=form.error), iterations, WORK)
    cores = tuple(in_dtype(core, matrix.dtype) for core in best)
    error = relative_difference(work, form.dense(best))
    return TTMatrix(cores, error, math.inf, trace)


def metric_tt_errors(
    matrix: Tensor,
    out_shape: Sequence[int],
    in_shape: Sequence[int],
    ranks: Sequence[Rank],
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
) -> list[float]:
    """Estimate the error in the metric at each rank from one TT-SVD of the matrix multiplied by marginal roots.

    Its own errors at all ranks are those in the metric where the second moment is a Kronecker product; at a few ranks
    the error in the metric itself is measured, after one sweep over the cores where that takes at most `CURVE_WORK`
    multiply-adds, and the ratio of the two interpolated. `metric_tt_matrix` reaches a little less.

    Args:
        matrix: (out, in), with as many columns as `in_shape` has and at most as many rows as `out_shape`.
        out_shape: dims of the rows; where their product is larger, the train is free there.
        in_shape: as many dims of the columns as `out_shape` has of the rows.
        ranks: of each a cap for every bond, clipped to what is possible at each, or one per bond.
        second_moment: C, (in, in), or (groups, in, in) where groups of rows see inputs of their own.
        output_weights: the diagonal of G, (out,), weights of the outputs.

    Returns:
        One relative error of the outputs per rank.

    Raises:
        DecompositionError: shapes or a metric that do not fit, NaN or Inf entries, a rank out of range.

    Example:
        >>> import torch
        >>> w = torch.arange(64.0).reshape(8, 8) ** 2
        >>> e = metric_tt_errors(w, (2, 4), (4, 2), [1, 2, 8], second_moment=torch.eye(8))
        >>> e == sorted(e, reverse=True), e[-1] < 1e-6
        (True, True)
    """
    work = working_copy(matrix, torch.float64, order=2, what="matrix")
    form = _Form.of(work, second_moment, output_weights, tuple(out_shape), tuple(in_shape))
    found = tt_roundings(pair_modes(form.whitened(), out_shape, in_shape), ranks)
    white = [train.error for train in found]
    places = spread_over(white, MEASURED)
    begun = [form.coloured(unpaired(found[k], out_shape, in_shape).cores) for k in places]
    measured = [form.swept(cores, CURVE_SWEEPS, CURVE_WORK)[1][-1] for cores in begun]
    return calibrated(white, places, measured)


@dataclass(frozen=True, eq=False)
class _Form:
    """A matrix, its metric, and the train's shapes; the marginal second moment of each input mode and its root."""

    matrix: Float[Tensor, "out into"]
    moments: Float[Tensor, "groups into into"]
    weights: Float[Tensor, "out 1"]
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    image: Float[Tensor, "out into"]  # W C
    total: float
    marginals: tuple[Tensor, ...]
    roots: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        work: Tensor,
        second_moment: Tensor,
        output_weights: Tensor | None,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
    ) -> _Form:
        if math.prod(in_shape) != work.shape[1]:
            raise DecompositionError(f"in_shape {in_shape} does not have the product {work.shape[1]}")
        check_dense(second_moment, "second_moment")
        given = second_moment if second_moment.ndim == 3 else second_moment[None]
        if len(work) % len(given):
            raise DecompositionError(f"{len(given)} groups do not divide {len(work)} outputs")
        moments = torch.stack([_checked(moment, work) for moment in given])
        weights = check_weights(output_weights, work)
        weights = torch.ones_like(work[:, 0]) if weights is None else weights
        image = _by_groups(work, moments)
        energies = (image * work).sum(1)
        check_definite(energies)
        marginals = soft_marginals(moments.mean(0), in_shape)
        roots = tuple(map(symmetric_root, marginals))
        total = float((energies * weights).sum())
        return cls(work, moments, weights[:, None], out_shape, in_shape, image, total, marginals, roots)

    def whitened(self) -> Float[Tensor, "out into"]:
        """Return the matrix multiplied in every input mode by its root."""
        folded = self.matrix.reshape(-1, *self.in_shape)
        for mode, root in enumerate(self.roots):
            folded = torch.movedim(torch.tensordot(folded, root, ([mode + 1], [0])), -1, mode + 1)
        return folded.reshape(self.matrix.shape)

    def coloured(self, cores: Sequence[Tensor]) -> list[Tensor]:
        """Return the cores of the matrix from those of the whitened one."""
        pairs = zip(cores, self.roots, strict=True)
        return [torch.linalg.solve(root, core.double()) for core, root in pairs]

    def dense(self, cores: Sequence[Tensor]) -> Float[Tensor, "out into"]:
        """Return the matrix of a train."""
        return TTMatrix(tuple(cores)).to_dense()[: len(self.matrix)]

    def error(self, cores: Sequence[Tensor]) -> float:
        """Return the relative error in the metric."""
        lost = self.matrix - self.dense(cores)
        return relative(float((self.weights * _by_groups(lost, self.moments) * lost).sum()), self.total)

    def swept(self, best: list[Tensor], iterations: int, work: float) -> tuple[list[Tensor], tuple[float, ...]]:
        """Return cores after as many solves as fit into `work`, and the error after each."""
        trace, step = [self.error(best)], self.matrix.numel() * self.matrix.shape[1]
        order = [*range(len(best)), *range(len(best) - 2, 0, -1)]
        for count in range(min(int(work // (step * (CORE_STEPS + 2))), iterations * len(order))):
            fresh = self.solved(best, order[count % len(order)])
            error = self.error(fresh)
            best, error = (fresh, error) if error < trace[-1] else (best, trace[-1])
            trace.append(error)
            if count >= len(order) and trace[-1 - len(order)] - trace[-1] <= TOLERANCE * trace[-1]:
                break
        return best, tuple(trace)

    def solved(self, cores: list[Tensor], place: int) -> list[Tensor]:
        """Return the cores with one of them improved, the others made orthonormal towards it first."""
        cores = _orthogonal_around(cores, place)
        before, after = (
            _product(cores[:place], self.matrix).flatten(0, 1),
            _product(cores[place + 1 :], self.matrix).flatten(1),
        )
        axes = [axis for k in range(len(cores)) for axis in (k, len(cores) + k)]

        def expand(core: Tensor) -> Tensor:
            return _by_groups(self.dense([*cores[:place], core, *cores[place + 1 :]]), self.moments)

        def collect(matrix: Tensor) -> Tensor:
            whole = matrix.new_zeros(math.prod(self.out_shape), matrix.shape[1])
            whole[: len(matrix)] = matrix
            paired = whole.reshape(*self.out_shape, *self.in_shape).permute(axes).reshape(len(before), -1)
            half = (before.T @ paired).reshape(-1, after.shape[1])
            return (half @ after.T).reshape(cores[place].shape)

        inner = Inner(expand, collect, self._preconditioner(cores, place))
        fresh = solve_inner(
            lambda rows: self.weights * rows, self.weights * self.image, cores[place], inner, CORE_STEPS
        )
        return [*cores[:place], fresh, *cores[place + 1 :]]

    def _preconditioner(self, cores: Sequence[Tensor], place: int) -> Callable[[Tensor], Tensor]:
        """Return the inverse of the normal equations of a core where C is the product of its marginals."""
        before = cores[0].new_ones(1, 1)
        for core, marginal in zip(cores[:place], self.marginals, strict=False):
            before = torch.einsum("ab,amnc,no,bmod->cd", before, core, marginal, core)
        after = cores[0].new_ones(1, 1)
        for core, marginal in list(zip(cores, self.marginals, strict=True))[:place:-1]:
            after = torch.einsum("cd,amnc,no,bmod->ab", after, core, marginal, core)
        lowers = [damped_cholesky(side, SOFTENING) for side in (before, self.marginals[place], after)]

        def solve(core: Tensor) -> Tensor:
            for axis, lower in zip((0, 2, 3), lowers, strict=True):
                moved = core.movedim(axis, 0)
                core = torch.cholesky_solve(moved.flatten(1), lower).reshape(moved.shape).movedim(0, axis)
            return core

        return solve


def _checked(moment: Tensor, work: Tensor) -> Float[Tensor, "into into"]:
    """Return a checked second moment; it may be zero, for a group that no input reaches."""
    if moment.shape == (work.shape[1],) * 2 and not bool(moment.any()):
        return moment.to(work)
    checked, scale = check_moment(moment, work)
    return checked * scale


def _by_groups(matrix: Float[Tensor, "out into"], moments: Float[Tensor, "groups into into"]) -> Tensor:
    """Return each group of rows times its second moment."""
    return (split_axis(matrix, 0, (len(moments), -1)) @ moments).flatten(0, 1)


def _product(cores: Sequence[Tensor], like: Tensor) -> Float[Tensor, "left entries right"]:
    """Return the product of neighbouring cores with their modes merged; for none, a single one."""
    if not cores:
        return like.new_ones(1, 1, 1)
    whole = cores[0].flatten(1, 2)
    for core in cores[1:]:
        whole = torch.tensordot(whole, core.flatten(1, 2), 1).flatten(1, 2)
    return whole


def _orthogonal_around(cores: Sequence[Tensor], place: int) -> list[Tensor]:
    """Return the same train with orthonormal columns in the cores before a place, and rows in those after it."""
    cores = list(cores)
    for k in range(place):
        q, r = torch.linalg.qr(cores[k].flatten(0, 2))
        cores[k], cores[k + 1] = q.reshape(*cores[k].shape[:3], -1), torch.tensordot(r, cores[k + 1], 1)
    for k in range(len(cores) - 1, place, -1):
        q, r = torch.linalg.qr(cores[k].flatten(1).T)
        cores[k], cores[k - 1] = q.T.reshape(-1, *cores[k].shape[1:]), cores[k - 1] @ r.T
    return cores
