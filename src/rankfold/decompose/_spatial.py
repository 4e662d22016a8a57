"""A kernel split between two groups of spatial axes, in the metric of the outputs."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._alternate import (
    STEPS,
    SWEEPS,
    TOLERANCE,
    Inner,
    Target,
    alternate,
    improved,
    kronecker_solver,
    nested_errors,
    quadratic_error,
    solve_left,
)
from rankfold.decompose._curves import MEASURED, calibrated, spread_over
from rankfold.decompose._metric import root_of
from rankfold.decompose._unfold import check_rank, in_dtype, relative_difference, split_axis, working_copy

CURVE_SWEEPS, CURVE_WORK = 2, 4e9  # sweeps at the ranks where a curve is measured, multiply-adds for them


@dataclass(frozen=True, eq=False)
class Separable:
    """A kernel as `K[t, s, i, j] = sum_r left[t, j, r] right[r, s, i]`.

    Attributes:
        left: (out, second axes, rank).
        right: (rank, in, first axes).
        error: relative Frobenius error of `to_dense()` against the kernel.
        trace: relative error in the metric, of the start and after each sweep.

    Example:
        >>> import torch
        >>> f = Separable(torch.ones(2, 3, 1), torch.ones(1, 4, 5))
        >>> f.rank, f.num_params, tuple(f.to_dense().shape)
        (1, 26, (2, 4, 5, 3))
    """

    left: Float[Tensor, "out second rank"]
    right: Float[Tensor, "rank into first"]
    error: float = 0.0
    trace: tuple[float, ...] = field(default=(), repr=False)

    @property
    def rank(self) -> int:
        """The number of terms."""
        return self.left.shape[2]

    @property
    def num_params(self) -> int:
        """Entries of both factors."""
        return self.left.numel() + self.right.numel()

    def to_dense(self) -> Float[Tensor, "out into first second"]:
        """Return the kernel."""
        return torch.einsum("tjr,rsi->tsij", self.left, self.right)


def separable(
    kernel: Tensor,
    rank: int,
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    iterations: int = SWEEPS,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float64,
) -> Separable:
    """Split a kernel between its first and its second spatial axes, at the least error of the outputs.

    Minimises `trace(G D C D^T)`, D being the difference as a matrix (out, in * first * second). The split is a
    product in the matrix (out * second, in * first), but the metric does not act on its rows and columns separately.
    The factors are therefore solved for in turn: `left` exactly, `right` by conjugate gradients. It starts from the
    better of two right factors, that of the plain SVD and that of the SVD in the closest Kronecker form of the metric;
    the error in the metric never rises.

    Args:
        kernel: (out, in, first, second), any float dtype and device.
        rank: between 1 and min(out * second, in * first).
        second_moment: C, over (in, first, second) in this order.
        output_weights: the diagonal of G, (out,).
        iterations: the maximum number of sweeps.
        tolerance: the sweeps end when one lowers the error by less than this share of it.
        dtype: to compute in.

    Returns:
        The factors in the dtype and on the device of the kernel, with the errors in the metric as `trace`.

    Raises:
        DecompositionError: a rank out of range, a metric that does not fit, NaN or Inf entries.

    Example:
        >>> import torch
        >>> k = torch.arange(48.0).reshape(2, 4, 3, 2)
        >>> separable(k, 2, second_moment=torch.eye(24)).error < 1e-5
        True
    """
    work = working_copy(kernel, dtype, order=4, what="kernel")
    out, into, first, second = work.shape
    check_rank(rank, min(out * second, into * first))
    target = Target.of(work.flatten(1), second_moment, output_weights, dtype)
    form = _Form.of(target, into, first, second)
    starts = [form.fitted(right[:rank]) for right in (form.plain_right(rank), form.metric_right(rank))]
    right, left, begun = min(starts, key=lambda found: found[2])
    right, left, trace = form.swept((right, left, begun), iterations, tolerance)
    left = target.unscaled(left).reshape(out, rank, second).transpose(1, 2)
    left, right = _balanced(left, right.reshape(rank, into, first))
    error = relative_difference(work, torch.einsum("tjr,rsi->tsij", left, right))
    return Separable(in_dtype(left, kernel.dtype), in_dtype(right, kernel.dtype), error, trace)


def separable_errors(
    kernel: Tensor,
    ranks: list[int],
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """Estimate the error in the metric that `separable` reaches at each rank.

    The right factors of all ranks are the first rows of one matrix, so a single Cholesky factorisation gives the error
    of each with its best left factor. At a few ranks, two sweeps are done if they take at most `CURVE_WORK`
    multiply-adds, and what they gain is interpolated.

    Args:
        kernel: (out, in, first, second), any float dtype and device.
        ranks: the ranks asked for, in any order.
        second_moment: C, over (in, first, second) in this order.
        output_weights: the diagonal of G, (out,).
        dtype: to compute in.

    Returns:
        One relative error of the outputs per entry of `ranks`.

    Raises:
        DecompositionError: a rank out of range, a metric that does not fit, NaN or Inf entries.

    Example:
        >>> import torch
        >>> k = torch.arange(48.0).reshape(2, 4, 3, 2) ** 2
        >>> e = separable_errors(k, [1, 2, 4], second_moment=torch.eye(24))
        >>> e == sorted(e, reverse=True), e[-1] < 1e-3
        (True, True)
    """
    work = working_copy(kernel, dtype, order=4, what="kernel")
    out, into, first, second = work.shape
    full = min(out * second, into * first)
    if not ranks:
        return []
    most = max(check_rank(rank, full) for rank in ranks)
    target = Target.of(work.flatten(1), second_moment, output_weights, dtype)
    form = _Form.of(target, into, first, second)
    right = form.metric_right(most)
    normal, wanted = form.equations(right)
    curve = [nested_errors(target, normal, wanted, second)[rank - 1] for rank in ranks]
    step = (STEPS + 2) * CURVE_SWEEPS * target.moment.numel()
    places = [k for k in spread_over(curve, MEASURED) if ranks[k] * step <= CURVE_WORK and ranks[k] < full]
    begun = [form.fitted(right[: ranks[k]]) for k in places]
    measured = [form.swept(fit, CURVE_SWEEPS, 0.0)[2][-1] for fit in begun]
    curve = calibrated(curve, places, measured) if places else curve
    return [0.0 if rank == full else error for rank, error in zip(ranks, curve, strict=True)]


@dataclass(frozen=True, eq=False)
class _Form:
    """The split as `A B(x)`: x is (rank, in * first), `B(x) = x ⊗ I_second`, and A is (out, rank * second)."""

    target: Target
    first_side: int  # in * first
    second: int
    moment: Float[Tensor, "side rest"]  # the second moment with (in, first) as rows
    first_moment: Float[Tensor, "side side"]
    second_moment: Float[Tensor, "second second"]

    @classmethod
    def of(cls, target: Target, into: int, first: int, second: int) -> _Form:
        side = into * first
        cube = target.moment.reshape(side, second, side, second)
        first_moment = cube.diagonal(dim1=1, dim2=3).sum(2) / second
        second_moment = cube.diagonal(dim1=0, dim2=2).sum(2) / max(float(first_moment.trace()), 1e-300)
        return cls(target, side, second, target.moment.reshape(side, -1), first_moment, second_moment)

    def expand(self, x: Float[Tensor, "rank side"]) -> Float[Tensor, "p n"]:
        """Return `B(x) C`."""
        return (x @ self.moment).reshape(x.shape[0] * self.second, -1)

    def collect(self, matrix: Float[Tensor, "p n"]) -> Float[Tensor, "rank side"]:
        """Return the adjoint of B: for each term the sum over the second axis."""
        cube = matrix.reshape(-1, self.second, self.first_side, self.second)
        return cube.diagonal(dim1=1, dim2=3).sum(2)

    def equations(self, right: Tensor, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `B C B^T` and `W C B^T` of a right factor; `image` is `B C` where it is known already."""
        rank = right.shape[0]
        image = self.expand(right) if image is None else image
        sides = (image.reshape(-1, self.first_side, self.second), split_axis(self.target.image, 1, (-1, self.second)))
        normal, wanted = (
            (side.transpose(1, 2) @ right.T).transpose(1, 2).reshape(side.shape[0], rank * self.second)
            for side in sides
        )
        return normal, wanted

    def fitted(self, right: Tensor, left: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """Return a right factor with its best left factor, and their error in the metric."""
        normal, wanted = self.equations(right)
        left = self.target.matrix.new_zeros(wanted.shape) if left is None else left
        left = solve_left(left, normal, wanted)
        return right, left, quadratic_error(self.target, left, normal, wanted)

    def swept(
        self, fit: tuple[Tensor, Tensor, float], iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor, tuple[float, ...]]:
        """Return the right and the left factor after sweeps over both, and the error after each."""
        right, left, begun = fit

        def improve() -> float:
            nonlocal right, left
            right, left, error = self.fitted(improved(self.target, left, right, self.inner(left)), left)
            return error

        trace, _ = alternate(improve, iterations, tolerance, begun)
        return right, left, trace

    def inner(self, left: Float[Tensor, "m p"]) -> Inner:
        """Return the right factor as an `Inner` for the solver."""
        terms = left.shape[1] // self.second
        gram = (left.T @ left).reshape(terms, self.second, terms, self.second)
        mixed = torch.einsum("rjqk,jk->rq", gram, self.second_moment)
        return Inner(self.expand, self.collect, kronecker_solver(mixed, self.first_moment))

    def plain_right(self, rank: int) -> Float[Tensor, "rank side"]:
        """Return the right factor of the plain SVD."""
        rows = split_axis(self.target.unscaled(self.target.matrix), 1, (-1, self.second)).transpose(1, 2).flatten(0, 1)
        return leading_rows(rows, rows, rank)

    def metric_right(self, rank: int) -> Float[Tensor, "rank side"]:
        """Return the right factor of the SVD in the Kronecker product of the two marginal second moments.

        In projection form: the leading left vectors of `(G ⊗ C_second)^(1/2) W C_first^(1/2)`, times the first two.
        """
        cube = split_axis(self.target.matrix, 1, (-1, self.second))  # out, in first, second
        rows = (cube @ root_of(self.second_moment)).transpose(1, 2).flatten(0, 1)
        return leading_rows(rows, rows @ root_of(self.first_moment), rank)


def leading_rows(rows: Float[Tensor, "m n"], weighted: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "rank n"]:
    """Return the projection of the rows on the leading left singular vectors of the weighted ones."""
    if rows.shape[0] <= rows.shape[1]:
        vectors = torch.linalg.eigh(weighted @ weighted.T)[1].flip(1)[:, :rank]
    else:
        vectors = weighted @ torch.linalg.eigh(weighted.T @ weighted)[1].flip(1)[:, :rank]
        vectors = torch.linalg.qr(vectors)[0]
    leading: Tensor = vectors.T @ rows
    return leading


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return orthogonal factors of the same product, the singular values shared between them."""
    out, second, rank = left.shape
    q, r = torch.linalg.qr(left.reshape(-1, rank))
    p, s = torch.linalg.qr(right.flatten(1).T)
    u, values, vh = torch.linalg.svd(r @ s.T)
    root = values.sqrt()
    return (q @ (u * root)).reshape(out, second, rank), (root[:, None] * (vh @ p.T)).reshape(right.shape)
