"""The metric of a layer's outputs: a second moment of the inputs, and weights of the outputs.

With `D = W - W'`, `C = E[x x^T]` and weights g of the outputs, the squared error of the outputs is
`E sum_t g_t ((D x)_t)^2 = trace(G D C D^T)`: the plain one of the matrix `G^(1/2) D C^(1/2)`.
"""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold._common import Float, check_dense
from rankfold.decompose._unfold import relative, working_copy
from rankfold.errors import DecompositionError

ASYMMETRY = 1e-4  # share of the largest entry by which a second moment may differ from its transpose
INDEFINITE = 1e-5  # how negative an eigenvalue may be, as a share of the largest
SOFTENING = 1e-4  # share of the mean diagonal added where an inverse is needed and closeness is enough
LEAST_WEIGHT = 1e-8  # share of the mean weight that every output gets at least, because inverse roots are needed


def metric_error(
    matrix: Tensor, approximation: Tensor, second_moment: Tensor, output_weights: Tensor | None = None
) -> float:
    """Return the relative error of the outputs, `sqrt(trace(G D C D^T) / trace(G W C W^T))` with `D = W - W'`.

    Args:
        matrix: W, (m, n), any float dtype and device.
        approximation: W', (m, n).
        second_moment: C, (n, n): the mean of `x x^T` over the inputs, symmetric positive semi-definite.
        output_weights: the diagonal of G, (m,), at least 0: weights of the squared errors of the outputs; 1 by default.

    Returns:
        The error; 0 where the matrix itself gives no output in the metric.

    Raises:
        DecompositionError: shapes that do not fit, NaN or Inf entries, a matrix that is not a second moment.

    Example:
        >>> import torch
        >>> w, x = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> round(metric_error(w, torch.tensor([[0.0, 0.0], [0.0, 1.0]]), x.T @ x / 2), 6)
        0.447214
    """
    work = working_copy(matrix, torch.float64, order=2, what="matrix")
    check_dense(approximation, "approximation")
    if approximation.shape != matrix.shape:
        shapes = f"{tuple(approximation.shape)} and {tuple(matrix.shape)}"
        raise DecompositionError(f"an approximation and its matrix have one shape, not {shapes}")
    moment, _ = check_moment(second_moment, work)
    weights = check_weights(output_weights, work)
    total = metric_energy(work, moment, weights)
    return relative(metric_energy(work - approximation.detach().to(work), moment, weights), total)


def metric_energy(
    matrix: Float[Tensor, "m n"], moment: Float[Tensor, "n n"], output_weights: Tensor | None = None
) -> float:
    """Return `trace(G D C D^T)`."""
    energies = ((matrix @ moment) * matrix).sum(1)
    return float((energies if output_weights is None else energies * output_weights).sum())


def check_metric(matrix: Tensor, second_moment: Tensor | None, output_weights: Tensor | None) -> None:
    """Raise a DecompositionError for a metric that does not fit the matrix; both may be None."""
    if second_moment is not None:
        check_moment(second_moment, matrix)
        check_weights(output_weights, matrix)
    elif output_weights is not None:
        raise DecompositionError("weights of the outputs come with a second moment: the identity is the plain norm")


def check_moment(moment: Tensor, work: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "n n"], float]:
    """Return the second moment for the columns of `work`, scaled to a largest entry of 1, and the scale."""
    check_dense(moment, "second_moment")
    n = work.shape[1]
    if tuple(moment.shape) != (n, n):
        raise DecompositionError(f"the second moment of {n} inputs is ({n}, {n}), not {tuple(moment.shape)}")
    wide = torch.promote_types(work.dtype, torch.float32)
    moment = working_copy(moment, wide).to(work.device)
    scale = float(moment.abs().max())
    if scale == 0:
        raise DecompositionError("the second moment is zero: every matrix has the same error in it")
    if float((moment - moment.T).abs().max()) > ASYMMETRY * scale:
        raise DecompositionError("the second moment is not symmetric: it is the mean of x x^T over the inputs x")
    if float(moment.diagonal().min()) < -INDEFINITE * scale:
        raise DecompositionError("the second moment is not positive semi-definite: a mean square on it is negative")
    return (moment + moment.T) / (2 * scale), scale


def check_definite(values: Float[Tensor, " n"]) -> None:
    """Raise a DecompositionError if any of the values is negative beyond rounding."""
    if float(values.min()) < -INDEFINITE * float(values.max().abs()):
        least = f"least eigenvalue {float(values.min()):.3g} of largest {float(values.max()):.3g}"
        raise DecompositionError(f"the second moment is not positive semi-definite: {least}")


def check_weights(output_weights: Tensor | None, work: Float[Tensor, "m n"]) -> Float[Tensor, " m"] | None:
    """Return the weights of the outputs in the dtype and on the device of `work`."""
    if output_weights is None:
        return None
    check_dense(output_weights, "output_weights")
    if (given := tuple(output_weights.shape)) != (work.shape[0],):
        raise DecompositionError(f"{work.shape[0]} outputs have as many weights, not those of {given}")
    weights = working_copy(output_weights, torch.promote_types(work.dtype, torch.float32), least=1).to(work.device)
    if float(weights.min()) < 0 or float(weights.max()) == 0:
        raise DecompositionError("the weights of the outputs are mean squares: none is negative, and not all are zero")
    return weights


def weight_roots(output_weights: Tensor | None, work: Float[Tensor, "m n"]) -> Float[Tensor, "m 1"] | None:
    """Return `G^(1/2)` as a column, scaled to mean square 1 before small weights are raised to the least one."""
    weights = check_weights(output_weights, work)
    if weights is None:
        return None
    relative_weights = weights / weights.mean()
    return relative_weights.clamp_min(LEAST_WEIGHT).sqrt()[:, None]


def root_of(moment: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return a square root F of a positive semi-definite matrix, `F F^T = C`, by eigenvectors: C may be singular."""
    values, vectors = torch.linalg.eigh(moment)
    check_definite(values)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def symmetric_root(moment: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(moment)
    check_definite(values)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def soft_marginals(moment: Float[Tensor, "n n"], dims: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the second moment of each input mode, summed over the others; their Kronecker product approximates C.

    All but the first have trace 1. `SOFTENING` of the mean diagonal is added to each to make it invertible.
    """
    found = []
    for mode, dim in enumerate(dims):
        before, after = math.prod(dims[:mode]), math.prod(dims[mode + 1 :])
        marginal = torch.einsum("bxabya->xy", moment.reshape(before, dim, after, before, dim, after))
        tiny = torch.finfo(moment.dtype).tiny
        marginal = marginal if mode == 0 else marginal / marginal.trace().clamp_min(tiny)
        raised = (marginal + marginal.T) / 2
        raised.diagonal().add_(SOFTENING * raised.diagonal().mean().clamp_min(tiny))
        found.append(raised)
    return tuple(found)


def metric_spectrum(
    matrix: Float[Tensor, "m n"], second_moment: Tensor, output_weights: Tensor | None = None
) -> Float[Tensor, " values"]:
    """Return all singular values of `G^(1/2) W C^(1/2)`, descending, from one eigendecomposition of the shorter side.

    Their squares are accurate to the rounding of the largest one, so a tail below 1e-8 of the norm is only rounding.
    """
    moment, scale = check_moment(second_moment, matrix)
    weights = check_weights(output_weights, matrix)
    mean = 1.0 if weights is None else float(weights.mean())
    roots = weight_roots(output_weights, matrix)
    work = matrix if roots is None else matrix * roots
    m, n = work.shape
    if m <= n:
        gram = work @ moment @ work.T
    else:
        root = root_of(moment)
        gram = root.T @ (work.T @ work) @ root
    values: Tensor = torch.linalg.eigvalsh((gram + gram.T).double() / 2)
    check_definite(values)
    return torch.mul(values.flip(0).clamp_min(0).sqrt(), math.sqrt(scale * mean))
