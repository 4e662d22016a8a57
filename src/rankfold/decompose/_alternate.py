"""Alternating least squares in a metric: approximations `A B(x)` of a matrix, linear in A and in each x.

The squared error of the outputs is a quadratic form in A, and in each x. A is solved for exactly. Each x gets a few
steps of preconditioned conjugate gradients from its current value: they never raise the error, cope with a singular
second moment, and never form the matrix of the normal equations.
"""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._metric import SOFTENING, check_definite, check_moment, check_weights, weight_roots
from rankfold.decompose._unfold import relative, working_copy

DAMPING = 1e-8  # share of the mean diagonal of normal equations that is added to the diagonal when a change is solved
FINE = 1e-12  # the same for curves of errors, which no factor depends on: they are accurate down to its root
STEPS = 4  # of conjugate gradients per factor and sweep
SWEEPS = 10  # over all factors, at most
TOLERANCE = 2e-3  # sweeps end when one lowers the error by less than this share of it
SETTLED = 1e-10  # a residual below this share of the first one is only rounding


@dataclass(frozen=True, eq=False)
class Target:
    """A matrix to approximate in a metric, its rows scaled by the roots of their weights.

    Attributes:
        matrix: `G^(1/2) W`, (m, n).
        moment: C, (n, n).
        image: `G^(1/2) W C`, (m, n).
        total: the squared norm in the metric, `trace(G W C W^T)`.
        roots: `G^(1/2)` as a column (m, 1), or None.
    """

    matrix: Float[Tensor, "m n"]
    moment: Float[Tensor, "n n"]
    image: Float[Tensor, "m n"]
    total: float
    roots: Float[Tensor, "m 1"] | None

    @classmethod
    def of(cls, matrix: Tensor, second_moment: Tensor, output_weights: Tensor | None, dtype: torch.dtype) -> Target:
        """Return the target of a matrix, after checking that the metric fits it."""
        work = working_copy(matrix, dtype, order=2)
        moment, _ = check_moment(second_moment, work)
        check_weights(output_weights, work)
        roots = weight_roots(output_weights, work)
        scaled = work if roots is None else work * roots
        image = scaled @ moment
        energies = (image * scaled).sum(1).double()
        check_definite(energies)
        return cls(scaled, moment, image, float(energies.sum()), roots)

    def unscaled(self, left: Float[Tensor, "m rank"]) -> Float[Tensor, "m rank"]:
        """Return a left factor without the roots of the weights."""
        return left if self.roots is None else left / self.roots

    def error(self, left: Float[Tensor, "m p"], right: Float[Tensor, "p n"]) -> float:
        """Return the relative error of `left @ right` in the metric."""
        lost = self.matrix - left @ right
        return relative(float(((lost @ self.moment) * lost).sum()), self.total)


@dataclass(frozen=True, eq=False)
class Inner:
    """An inner factor x of `A B(x)`, as the solver sees it.

    Attributes:
        expand: `B(x) C` of x, (p, n): the rows that A combines, already multiplied by the second moment.
        collect: the adjoint of B, from a matrix (p, n) to the shape of x.
        precondition: an approximate inverse of the normal equations, acting on the shape of x.
    """

    expand: Callable[[Tensor], Tensor]
    collect: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor]


def solve_left(
    left: Float[Tensor, "m p"], normal: Float[Tensor, "p p"], wanted: Float[Tensor, "m p"], damping: float = DAMPING
) -> Tensor:
    """Return the best A for given rows B, from `B C B^T` and `W C B^T`, solved for as a change of `left`."""
    change: Tensor = torch.cholesky_solve((wanted - left @ normal).T, damped_cholesky(normal, damping)).T
    return left + change


def quadratic_error(
    target: Target, left: Float[Tensor, "m p"], normal: Float[Tensor, "p p"], wanted: Float[Tensor, "m p"]
) -> float:
    """Return the relative error of `A B` in the metric from `B C B^T` and `W C B^T`, resolved to about 1e-8."""
    fitted = (left * (2 * wanted - left @ normal)).sum().double()
    return relative(target.total - float(fitted), target.total)


def damped_cholesky(normal: Float[Tensor, "p p"], damping: float = DAMPING) -> Float[Tensor, "p p"]:
    """Return the Cholesky factor of a positive semi-definite matrix, its diagonal raised as much as necessary."""
    symmetric, limits = (normal + normal.T) / 2, torch.finfo(normal.dtype)
    mean, damping = float(symmetric.diagonal().mean()), max(damping, 10 * limits.eps)
    for _ in range(8):
        raised = symmetric.clone()
        raised.diagonal().add_(max(damping * mean, limits.tiny))
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            break
        damping *= 100
    return lower


def solve_inner(
    gram: Callable[[Tensor], Tensor], wanted: Float[Tensor, "p n"], x: Tensor, inner: Inner, steps: int = STEPS
) -> Tensor:
    """Return x after some steps of conjugate gradients on its normal equations, `B^*(gram(B(x) C)) = B^*(wanted)`.

    For `A B(x)`, gram multiplies by `A^T A` and wanted is `A^T W C`.
    """
    residual = inner.collect(wanted - gram(inner.expand(x)))
    direction = inner.precondition(residual)
    size = first = float((residual * direction).sum())
    for step in range(steps):
        if size <= SETTLED * first or size <= 0:
            break
        image = inner.collect(gram(inner.expand(direction)))
        curvature = float((direction * image).sum())
        if not curvature > 0:  # nothing but rounding is left
            break
        x = x + (size / curvature) * direction
        if step == steps - 1:
            break
        residual = residual - (size / curvature) * image
        ready = inner.precondition(residual)
        before, size = size, float((residual * ready).sum())
        direction = ready + (size / before) * direction
    return x


def improved(target: Target, left: Float[Tensor, "m p"], x: Tensor, inner: Inner, steps: int = STEPS) -> Tensor:
    """Return the inner factor x of `A B(x)` after some conjugate gradients with A held fixed."""
    gram = left.T @ left
    return solve_inner(lambda rows: gram @ rows, left.T @ target.image, x, inner, steps)


def kronecker_solver(rows: Float[Tensor, "a a"], columns: Float[Tensor, "b b"]) -> Callable[[Tensor], Tensor]:
    """Return `X -> rows^-1 X columns^-1` for X (a, b), both softened: a preconditioner."""
    lowers = [damped_cholesky(matrix, SOFTENING) for matrix in (rows, columns)]

    def solve(x: Tensor) -> Tensor:
        half: Tensor = torch.cholesky_solve(x, lowers[0])
        whole: Tensor = torch.cholesky_solve(half.T, lowers[1]).T
        return whole

    return solve


def alternate(
    improve: Callable[[], float], iterations: int, tolerance: float, start: float
) -> tuple[tuple[float, ...], bool]:
    """Call `improve` until the error it returns falls by less than `tolerance` times itself.

    Returns:
        All errors, `start` first, and whether they settled.
    """
    trace = [start]
    while len(trace) <= iterations:
        trace.append(improve())
        if trace[-2] - trace[-1] <= tolerance * trace[-2]:
            return tuple(trace), True
    return tuple(trace), iterations == 0


def nested_errors(
    target: Target, normal: Float[Tensor, "p p"], wanted: Float[Tensor, "m p"], block: int
) -> list[float]:
    """Return the error of the best A for the first k blocks of rows of B, for every k, from one Cholesky.

    `normal` is `B C B^T` and `wanted` is `W C B^T`: with `L L^T = B C B^T`, the columns of `W C B^T L^-T` hold the
    energies that the rows of B capture one after the other.
    """
    lower = damped_cholesky(normal, FINE)
    captured = torch.linalg.solve_triangular(lower, wanted.T, upper=False).square().sum(1).double()
    energies = captured.reshape(-1, block).sum(1).cumsum(0)
    if target.total <= 0:
        return [0.0] * len(energies)
    return [math.sqrt(max(1 - float(energy) / target.total, 0.0)) for energy in energies]
