"""Tucker over the outputs and the inputs of a kernel, in the metric of the outputs."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._alternate import (
    FINE,
    SWEEPS,
    TOLERANCE,
    Inner,
    Target,
    alternate,
    damped_cholesky,
    improved,
    kronecker_solver,
)
from rankfold.decompose._factors import Tucker
from rankfold.decompose._metric import root_of
from rankfold.decompose._tucker import tucker
from rankfold.decompose._unfold import check_rank, in_dtype, relative, relative_difference, split_axis, working_copy
from rankfold.errors import DecompositionError


def metric_tucker(
    kernel: Tensor,
    rank: tuple[int, int],
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    iterations: int = SWEEPS,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype = torch.float64,
) -> Tucker:
    """Factorise the outputs and inputs of a kernel at the least error of the outputs of the layer.

    Minimises `trace(G D C D^T)`, D being the difference as a matrix (out, in * space). For a given input factor V the
    best output factor and core are a reduced-rank regression of the outputs on `(V^T ⊗ I) x`; V is improved by
    conjugate gradients on its normal equations. It starts from the better of two input factors: HOOI's on the kernel,
    and the HOSVD's in the Kronecker product of the marginal second moments. The error in the metric never rises.

    Args:
        kernel: (out, in, space…), any float dtype and device.
        rank: of the outputs and of the inputs.
        second_moment: C, over (in, space…) in this order.
        output_weights: the diagonal of G, (out,), weights of the outputs.
        iterations: the maximum number of sweeps.
        tolerance: the sweeps end when one lowers the error by less than this share of it.
        dtype: to compute in.

    Returns:
        The core and the two factors over the modes (0, 1), in the dtype of the kernel; `error` is the plain one, and
        `trace` has those in the metric. With weights of the outputs, the output factor is not orthonormal.

    Raises:
        DecompositionError: ranks out of range, a metric that does not fit, NaN or Inf entries.

    Reference:
        Kim et al. 2016, section 3.1 (Tucker-2); Izenman 1975 (reduced-rank regression).

    Example:
        >>> import torch
        >>> k = torch.arange(24.0).reshape(2, 3, 4) ** 2
        >>> f = metric_tucker(k, (1, 2), second_moment=torch.eye(12))
        >>> f.rank, f.trace == tuple(sorted(f.trace, reverse=True))
        ((1, 2), True)
    """
    work, ranks = _checked(kernel, rank, dtype)
    form = _Form.of(Target.of(work.flatten(1), second_moment, output_weights, dtype), work.shape[1])
    plain = tucker(work, ranks, modes=(0, 1)).factors[1]
    best = min(
        (form.fitted(into, ranks[0]) for into in (plain, form.metric_input(ranks[1]))), key=lambda fit: fit.error
    )

    def improve() -> float:
        nonlocal best
        fresh = improved(form.target, best.out, best.into, form.inner(best))
        found = form.fitted(torch.linalg.qr(fresh)[0], ranks[0])
        best = min(best, found, key=lambda fit: fit.error)
        return best.error

    trace, settled = alternate(improve, iterations, tolerance, best.error)
    core = best.core.reshape(ranks[0], ranks[1], *work.shape[2:])
    out, core = _orthonormal(form.target.unscaled(best.out), core)
    found = Tucker(core, (out, best.into), (0, 1), 0.0, len(trace) - 1, settled, trace)
    error = relative_difference(work, found.to_dense())
    factors = tuple(in_dtype(factor, kernel.dtype) for factor in found.factors)
    return Tucker(in_dtype(core, kernel.dtype), factors, (0, 1), error, found.iterations, settled, trace)


def metric_tucker_errors(
    kernel: Tensor,
    ranks: Sequence[tuple[int, int]],
    *,
    second_moment: Tensor,
    output_weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[float]:
    """Return the error in the metric at each pair of ranks, of the HOSVD start of `metric_tucker`.

    The input factors of all ranks are the first columns of one matrix. With `L L^T` the second moment of the inputs
    turned by it, the columns of `W L` hold what each input direction adds to the outputs: one Cholesky serves all input
    ranks, and one Gram matrix of the columns so far gives the errors at all output ranks. `metric_tucker` reaches these
    or a little less.

    Args:
        kernel: (out, in, space…), any float dtype and device.
        ranks: pairs, in any order.
        second_moment: C, over (in, space…) in this order.
        output_weights: the diagonal of G, (out,), weights of the outputs.
        dtype: to compute in.

    Returns:
        One relative error of the outputs per pair.

    Raises:
        DecompositionError: ranks out of range, a metric that does not fit, NaN or Inf entries.

    Example:
        >>> import torch
        >>> k = torch.arange(24.0).reshape(2, 3, 4) ** 2
        >>> e = metric_tucker_errors(k, [(1, 1), (1, 3), (2, 3)], second_moment=torch.eye(12))
        >>> e == sorted(e, reverse=True), e[-1] < 1e-6
        (True, True)
    """
    if not len(ranks):
        return []
    pairs = [_checked(kernel, rank, dtype)[1] for rank in ranks]
    work = working_copy(kernel, dtype, what="kernel")
    form = _Form.of(Target.of(work.flatten(1), second_moment, output_weights, dtype), work.shape[1])
    if form.target.total <= 0:
        return [0.0] * len(ranks)
    wanted = sorted({into for _, into in pairs})
    found = form.captured(form.metric_input(wanted[-1]))  # out, most, space
    gram, curves, done = found.new_zeros(len(found), len(found)), dict[int, Tensor](), 0
    for into in wanted:
        added = found[:, done:into].flatten(1)
        gram, done = gram + added @ added.T, into
        curves[into] = torch.linalg.eigvalsh(gram).flip(0).double().clamp_min(0).cumsum(0)
    total = form.target.total
    return [relative(total - float(curves[into][out - 1]), total) for out, into in pairs]


def _checked(kernel: Tensor, rank: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, tuple[int, int]]:
    work = working_copy(kernel, dtype, what="kernel")
    if len(rank) != 2:
        raise DecompositionError(f"a rank of the outputs and one of the inputs are needed, not {rank!r}")
    out, into = (check_rank(r, work.shape[mode], f"rank of mode {mode}") for mode, r in enumerate(rank))
    return work, (out, into)


@dataclass(frozen=True, eq=False)
class _Fit:
    """An input factor V with its best output factor and core, and their error in the metric."""

    into: Float[Tensor, "into q"]
    out: Float[Tensor, "m p"]
    core: Float[Tensor, "p q_space"]
    error: float


@dataclass(frozen=True, eq=False)
class _Form:
    """Tucker as `A B(V)`: A is the output factor, and `B(V)` the core multiplied by V over the inputs."""

    target: Target
    into: int
    space: int
    input_moment: Float[Tensor, "into into"]
    space_moment: Float[Tensor, "space space"]

    @classmethod
    def of(cls, target: Target, into: int) -> _Form:
        space = len(target.moment) // into
        cube = target.moment.reshape(into, space, into, space)
        input_moment = cube.diagonal(dim1=1, dim2=3).sum(2) / space
        space_moment = cube.diagonal(dim1=0, dim2=2).sum(2) / max(float(input_moment.trace()), 1e-300)
        return cls(target, into, space, input_moment, space_moment)

    def turned(self, rows: Float[Tensor, "m n"], factor: Float[Tensor, "into q"]) -> Float[Tensor, "m q_space"]:
        """Return rows over (in, space) with the inputs multiplied by the transpose of a factor."""
        cube = split_axis(rows, 1, (self.into, -1))
        return (cube.transpose(1, 2) @ factor).transpose(1, 2).flatten(1)

    def moment(self, factor: Float[Tensor, "into q"]) -> Float[Tensor, "q_space q_space"]:
        """Return the second moment of the inputs multiplied by the transpose of a factor."""
        half = (factor.T @ self.target.moment.reshape(self.into, -1)).reshape(-1, len(self.target.moment))
        moment = self.turned(half, factor)
        return (moment + moment.T) / 2

    def fitted(self, factor: Float[Tensor, "into q"], rank: int) -> _Fit:
        """Return the best output factor and core for an orthonormal V: a reduced-rank regression.

        The regression is solved for as a change of the projected weight, so directions without inputs keep their part
        of it.
        """
        normal = self.moment(factor)
        prior = self.turned(self.target.matrix, factor)
        wanted = self.turned(self.target.image, factor)
        lower = damped_cholesky(normal)
        change: Tensor = torch.cholesky_solve((wanted - prior @ normal).T, lower).T
        whole = prior + change
        outer = whole @ normal @ whole.T
        out = torch.linalg.eigh(outer)[1].flip(1)[:, :rank]
        core = out.T @ whole
        fitted = (core * (2 * out.T @ wanted - core @ normal)).sum()
        return _Fit(factor, out, core, relative(self.target.total - float(fitted), self.target.total))

    def captured(self, factor: Float[Tensor, "into q"]) -> Float[Tensor, "m q space"]:
        """Return `W C P L^-T` with `L L^T = P^T C P`: what each direction of an input factor adds to the outputs."""
        wanted = self.turned(self.target.image, factor)
        found = torch.linalg.solve_triangular(damped_cholesky(self.moment(factor), FINE), wanted.T, upper=False)
        return split_axis(found.T, 1, (-1, self.space))

    def inner(self, fit: _Fit) -> Inner:
        """Return V as an inner factor."""
        core = split_axis(fit.core, 1, (-1, self.space))  # p, q, space

        def expand(x: Tensor) -> Tensor:
            return (x @ core).flatten(1) @ self.target.moment

        def collect(matrix: Tensor) -> Tensor:
            cube = split_axis(matrix, 1, (self.into, -1))  # p, in, space
            return torch.einsum("psk,pqk->sq", cube, core)

        terms = torch.einsum("pqk,kl,prl->qr", core, self.space_moment, core)
        return Inner(expand, collect, kronecker_solver(self.input_moment, terms))

    def metric_input(self, rank: int) -> Float[Tensor, "into q"]:
        """Return the leading input factor of the HOSVD in the Kronecker product of the marginal second moments.

        With M the Gram matrix of the kernel's input mode in the metric of outputs and space, and `F F^T` the second
        moment of the inputs, the factor spans `M F Q` of the leading eigenvectors Q of `F^T M F`: no inverse.
        """
        cube = split_axis(self.target.matrix, 1, (self.into, -1))
        half = (cube @ root_of(self.space_moment)).transpose(0, 1).flatten(1)
        gram, root = half @ half.T, root_of(self.input_moment)
        vectors = torch.linalg.eigh(root.T @ gram @ root)[1].flip(1)[:, :rank]
        basis: Tensor = torch.linalg.qr(gram @ (root @ vectors))[0]
        return basis


def _orthonormal(out: Float[Tensor, "m p"], core: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output factor with orthonormal columns, and the core that absorbs the rest."""
    q, r = torch.linalg.qr(out)
    return q, (r @ core.flatten(1)).reshape(core.shape)
