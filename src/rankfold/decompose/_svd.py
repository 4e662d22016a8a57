"""Truncated singular value decomposition: exact, from a Gram matrix, or from a block Krylov basis."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from rankfold._common import Float, check_dense, one_of
from rankfold.decompose._factors import SVD, fix_signs
from rankfold.decompose._metric import (
    check_definite,
    check_metric,
    check_moment,
    metric_spectrum,
    root_of,
    weight_roots,
)
from rankfold.decompose._unfold import (
    check_rank,
    check_tolerance,
    in_dtype,
    relative,
    relative_difference,
    row_gram,
    safe_scale,
    squared_norm,
    working_copy,
)
from rankfold.errors import DecompositionError

# Share of the energy below which a difference of squared norms has lost too many digits to serve as an error.
CANCELLED = MappingProxyType({torch.float64: 1e-9, torch.float32: 1e-2})
# Errors above this cannot come from squaring singular values in that dtype: no more careful method is needed.
TRUSTED = MappingProxyType({torch.float64: 3e-5, torch.float32: 3e-3})
# The least tolerance that a method working on squared singular values can resolve.
RESOLVED = MappingProxyType({torch.float64: 1e-6, torch.float32: 1e-2})
# Ratios of squared singular values down to which a float64 Gram matrix gives orthogonal vectors, and accurate values.
CLEAN_VECTORS, CLEAN_VALUES = 1e-6, 1e-10
# For a given rank, the Krylov basis grows until one more block lowers the error by less than this share of it.
GAIN = 2e-3
# A randomised decomposition pays off if the smaller side is at least this large and the rank at most this share of it.
LARGE, SHARE = 1024, 0.2
EPS = torch.finfo(torch.float64).eps

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Target:
    """What to truncate to: a rank, or a relative error."""

    rank: int | None
    tolerance: float = 0.0

    def choose(self, energies: Float[Tensor, " values"], total: float = 0.0, eps: float = EPS) -> int:
        """Return the rank: as given, or the smallest with an allowed tail (`total`, or their sum, less the first)."""
        if self.rank is not None:
            return self.rank
        # Summed from the end, so that small tails keep their digits; energy outside the values is added.
        tails = energies.clamp_min(0).flip(0).cumsum(0).flip(0)
        total = max(total, float(tails[0]))
        noise = (eps * len(energies)) ** 2 * total
        fits = (tails + (total - float(tails[0])) <= max(self.tolerance**2 * total, noise)).nonzero()
        return max(1, int(fits[0])) if len(fits) else len(energies)


Method: TypeAlias = Callable[[Tensor, _Target, int], Triplets | None]


def svd(  # noqa: PLR0913 (one keyword per choice of the target and the metric)
    matrix: Tensor,
    rank: int | None = None,
    *,
    tolerance: float | None = None,
    second_moment: Tensor | None = None,
    output_weights: Tensor | None = None,
    method: str = "auto",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> SVD:
    """Return the truncated SVD of a matrix: the closest matrix of a rank, or the lowest rank within an error.

    Minimises `||W - W'||_F` over the matrices W' of the rank; the squared error is the tail `sum_{i > r} s_i^2`.
    With the second moment `C = E[x x^T]` of the inputs it minimises the error of the outputs,
    `E ||(W - W') x||^2 = ||(W - W') C^(1/2)||_F^2`, by the projection `W' = U_r U_r^T W` on the leading
    eigenvectors of `W C W^T`. No inverse is needed, so C may be singular. With weights G of the outputs it is
    `W' = G^(-1/2) U_r U_r^T G^(1/2) W` on those of `G^(1/2) W C W^T G^(1/2)`. At full rank W' is W. `error` is still
    the plain relative Frobenius error; `metric_error` gives that in the metric.

    Args:
        matrix: (m, n), any float dtype and device.
        rank: between 1 and min(m, n); this or `tolerance`.
        tolerance: largest relative error (in the metric of C where it is given), below 1; 0 keeps the numerical rank.
        second_moment: (n, n), symmetric positive semi-definite.
        output_weights: (m,), weights of the squared errors of the outputs, at least 0 (each counts as 1e-8 of their
            mean or more, since its inverse is needed); only with a second moment.
        method: "exact"; "gram" (eigenvectors of the smaller Gram matrix: errors above 1e-6); "randomised" (block
            Krylov basis: within 0.2 % of the least error on slowly decaying spectra; for ranks up to a fifth of the
            smaller side); or "auto", the cheapest of them that reaches the accuracy asked for.
        seed: of the random start of the Krylov basis.
        dtype: to compute in, torch.float64 or torch.float32. By default float64, except that the randomised method
            multiplies a matrix given in float32 or less by float32 (its small algebra stays float64).

    Returns:
        The factors in the dtype and on the device of the matrix. The error is computed, before they are rounded to
        that dtype; `method` is the one that was used.

    Raises:
        DecompositionError: both or neither of rank and tolerance, a rank beyond full, NaN or Inf entries, a matrix of
            another order, an unknown method, a second moment that does not fit, a tolerance the method cannot resolve.

    Reference:
        Eckart and Young 1936; Halko, Martinsson and Tropp 2011; Musco and Musco 2015, algorithm 2 (block Krylov).

    Example:
        >>> import torch
        >>> w = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> f = svd(w, 2)
        >>> f.s, round(f.error**2, 6)
        (tensor([3., 2.]), 0.071429)
    """
    full = _check(matrix, method)
    if (rank is None) == (tolerance is None):
        raise DecompositionError(f"give a rank or a tolerance, not both or neither: rank={rank}, tolerance={tolerance}")
    target = _Target(None, check_tolerance(tolerance)) if rank is None else _Target(check_rank(rank, full))
    if second_moment is not None and target.rank != full:
        return _in_metric(matrix, second_moment, output_weights, target, method, dtype or torch.float64)
    check_metric(matrix, second_moment, output_weights)
    names = _candidates(full, target) if method == "auto" else FALLBACK.get(method, (method,))
    attempts = [(name, p) for name in names for p in _precisions(name, target, matrix.dtype, dtype)]
    if not attempts:
        raise DecompositionError(
            f"method {method!r} in {dtype or torch.float64} cannot tell an error of {target.tolerance:g} "
            "from rounding: use method='exact'"
        )
    return _first_trusted(matrix, attempts, target, seed)


def singular_values(
    matrix: Tensor,
    *,
    second_moment: Tensor | None = None,
    output_weights: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Float[Tensor, " values"]:
    """Return all singular values of a matrix W, descending; in a metric those of `G^(1/2) W C^(1/2)`.

    They are square roots of the eigenvalues of the smaller Gram matrix where all of these are well above rounding,
    and come from the matrix itself otherwise. In a metric they are square roots of eigenvalues always, and what is
    below 1e-8 of the largest is rounding: their tails are the squared errors that `svd` reaches there.

    Args:
        matrix: (m, n), any float dtype and device.
        second_moment: C, (n, n), symmetric positive semi-definite.
        output_weights: the diagonal of G, (m,), weights of the squared errors of the rows.
        dtype: to compute in, and of the result.

    Returns:
        The min(m, n) singular values.

    Raises:
        DecompositionError: NaN or Inf entries, a matrix of another order, not a float dtype, a metric that does not
            fit.

    Example:
        >>> import torch
        >>> singular_values(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
        tensor([3., 2.], dtype=torch.float64)
    """
    work = working_copy(matrix, dtype, order=2, what="matrix")
    check_metric(work, second_moment, output_weights)
    if second_moment is not None:
        return metric_spectrum(work, second_moment, output_weights).to(dtype)
    short, scale = _scaled(work)
    short = short if short.shape[0] <= short.shape[1] else short.T
    values = torch.linalg.eigvalsh(row_gram(short).double()).flip(0)
    clean = float(values[-1]) > CLEAN_VALUES * float(values[0]) and dtype == torch.float64
    values = values.sqrt() if clean else torch.linalg.svdvals(short)
    return torch.mul(values, scale)


def _scaled(work: Tensor) -> tuple[Tensor, float]:
    """Return the matrix divided by a scale that makes its squares safe, and the scale."""
    scale = safe_scale(work)
    return (work if scale == 1 else work / scale), scale


def _check(matrix: Tensor, method: str) -> int:
    one_of("method", method, ("auto", *METHODS), error=DecompositionError)
    check_dense(matrix, "matrix")
    if matrix.ndim != 2 or matrix.numel() == 0:
        hint = ": loop over the batch, or unfold the tensor" if matrix.ndim > 2 else ""
        raise DecompositionError(f"svd takes a matrix, not a tensor of shape {tuple(matrix.shape)}{hint}")
    return min(matrix.shape)


def _candidates(small: int, target: _Target) -> tuple[str, ...]:
    """Return the methods to try, cheapest first, for a matrix with this smaller side."""
    if target.rank == small:
        return ("exact",)
    if small >= LARGE and (target.rank or 0) <= SHARE * small:
        return ("randomised", "gram", "exact")
    return ("gram", "exact")


def _precisions(name: str, target: _Target, given: torch.dtype, asked: torch.dtype | None) -> list[torch.dtype]:
    """Return the dtypes to try a method in: float32 where it will do for the input and the tolerance, then float64."""
    if asked is not None:
        choices = [asked]
    elif name == "exact" or given == torch.float64:
        choices = [torch.float64]
    else:
        choices = [torch.float32, torch.float64]
    if name == "exact" or target.rank is not None:
        return choices
    return [dtype for dtype in choices if target.tolerance >= RESOLVED.get(dtype, 0.0)]


def _first_trusted(matrix: Tensor, attempts: list[tuple[str, torch.dtype]], target: _Target, seed: int) -> SVD:
    """Return the first result whose error is well above the rounding of its method, or else the last one."""
    given_up = None
    for name, dtype in attempts:
        if name == given_up:
            continue
        work = working_copy(matrix, dtype, order=2, what="matrix")
        triplets = METHODS[name](work, target, seed)
        if triplets is None:
            given_up = name
            continue
        result = _result(work, triplets, name, matrix.dtype)
        if result.error > TRUSTED[dtype] or name == "exact":
            break
    return result


def _result(work: Tensor, triplets: Triplets, name: str, dtype: torch.dtype) -> SVD:
    """Measure the error, fix the signs and return the factors in the dtype of the input."""
    u, s, vh = triplets
    total = squared_norm(work)
    tail = total - float(s.double().square().sum())  # holds for a projection that is not optimal, too
    cancelled = s.shape[0] == min(work.shape) or tail <= CANCELLED[work.dtype] * total
    error = relative_difference(work.to(u.dtype), (u * s) @ vh) if cancelled else relative(tail, total)
    u, vh = fix_signs(u, vh)
    return SVD(in_dtype(u, dtype), in_dtype(s, dtype), in_dtype(vh, dtype), error, name)


def _exact(work: Float[Tensor, "m n"], target: _Target, seed: int) -> Triplets:  # noqa: ARG001 (one signature for all)
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    energies = s.double().square()
    rank = target.choose(energies, eps=torch.finfo(work.dtype).eps)
    return u[:, :rank], s[:rank], vh[:rank]


def _gram(work: Float[Tensor, "m n"], target: _Target, seed: int) -> Triplets:  # noqa: ARG001 (one signature for all)
    """Project on the leading eigenvectors of the Gram matrix of the smaller side."""
    rows, scale = _scaled(work)
    tall = rows.shape[0] > rows.shape[1]
    rows = rows.T if tall else rows
    values, vectors = torch.linalg.eigh(row_gram(rows))
    values = values.double()
    rank = target.choose(values.flip(0))
    left = vectors[:, -rank:].double()
    if rows.dtype != torch.float64:  # orthonormal only to float32: one Newton-Schulz step squares that error
        left = 1.5 * left - 0.5 * left @ (left.T @ left)
    u, s, vh = _triplets(left, left.T.to(rows.dtype) @ rows)
    return (vh.T, s * scale, u.T) if tall else (u, s * scale, vh)


def _randomised(work: Float[Tensor, "m n"], target: _Target, seed: int) -> Triplets | None:
    """Project on the leading Ritz vectors of a block Krylov basis, grown as far as the target needs.

    Returns None if a tolerance takes too many vectors to pay off, or if the basis ends before the rank is reached.
    """
    work, scale = _scaled(work)
    total, rank = squared_norm(work), 0
    tail = total
    rounding = torch.finfo(work.dtype).eps * total
    for basis, image, last in _krylov(work, _block(target), seed):
        size = basis.shape[0]
        if (target.rank is None and size > min(work.shape) // 3) or (last and size < (target.rank or 1)):
            return None
        if not last and not _worth_a_look(target, size, total - squared_norm(image), total):
            continue
        values, vectors = torch.linalg.eigh(row_gram(image).double())
        earlier, rank = rank, target.choose(values.flip(0), total)
        before, tail = tail, total - float(values[-rank:].sum())
        unchanged = before - tail <= 2 * GAIN * tail + rounding if target.rank else rank == earlier
        settled = unchanged and 2 * rank <= size
        if last or settled:
            left = vectors[:, -rank:].to(work.dtype)
            u, s, vh = _triplets(basis.T @ left, left.T @ image)
            return u, s * scale, vh
    return None


def _block(target: _Target) -> int:
    """Return the width of a Krylov block: narrow ones get further with the same basis, wide ones multiply faster."""
    return 64 if target.rank is None else min(128, max(16, -(-target.rank // 64) * 16))


def _worth_a_look(target: _Target, size: int, residual: float, total: float) -> bool:
    if target.rank is not None:
        return size >= 2 * target.rank
    return residual <= target.tolerance**2 * total


def _krylov(work: Float[Tensor, "m n"], block: int, seed: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Yield a growing orthonormal basis Q (k, m) of the block Krylov space of `A A^T` on `A Omega`, and `Q A` (k, n).

    The image of a block serves both for the next power and for the projected matrix, so a block takes two products.
    Vectors are stored as rows, which multiply fastest. It ends when the space is invariant: the rest is rounding.
    """
    m, n = work.shape
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(block, n, generator=generator, dtype=torch.float64).to(work) @ work.T
    basis, image, size = work.new_empty(8 * block, m), work.new_empty(8 * block, n), 0
    while size < min(m, n):
        fresh = fresh[: min(m, n) - size]
        for _ in range(2):  # once leaves rounding errors in the span of the basis, twice does not
            length = torch.linalg.vector_norm(fresh)
            fresh = fresh - (fresh @ basis[:size].T) @ basis[:size]
            if torch.linalg.vector_norm(fresh) <= 10 * torch.finfo(work.dtype).eps * length:
                yield basis[:size], image[:size], True
                return
            fresh = torch.linalg.qr(fresh.T).Q.T
        end = size + fresh.shape[0]
        if end > basis.shape[0]:
            basis, image = (torch.cat([old, torch.empty_like(old)]) for old in (basis, image))
        basis[size:end] = fresh
        image[size:end] = fresh @ work
        fresh, size = image[size:end] @ work.T, end
        yield basis[:size], image[:size], size == min(m, n)


def _triplets(left: Float[Tensor, "m rank"], rest: Float[Tensor, "rank n"]) -> Triplets:
    """Return the SVD, in float64, of `left @ rest`, where `left` has orthonormal columns and there are few of them."""
    rest = rest.double()
    values, turn = torch.linalg.eigh(row_gram(rest))
    if float(values[0]) > CLEAN_VECTORS * float(values[-1]):
        turned = turn.flip(1).T @ rest
        s = torch.linalg.vector_norm(turned, dim=1)
        return left.double() @ turn.flip(1), s, turned.div_(s[:, None])
    turn, s, vh = torch.linalg.svd(rest, full_matrices=False)
    return left.double() @ turn, s, vh


def _in_metric(  # noqa: PLR0913 (the arguments of `svd`, checked)
    matrix: Tensor, moment: Tensor, output_weights: Tensor | None, target: _Target, method: str, dtype: torch.dtype
) -> SVD:
    """Return the rank-r matrix closest in the metric of a second moment and of weights of the outputs."""
    work = working_copy(matrix, dtype, order=2, what="matrix")
    moment, _ = check_moment(moment, work)
    if method == "randomised":
        raise DecompositionError("method 'randomised' takes no second moment: use 'auto', 'gram' or 'exact'")
    roots = weight_roots(output_weights, work)
    scaled = work if roots is None else work * roots
    m, n = work.shape
    name = "exact" if method == "exact" else "gram"
    if method == "exact" or m > n:
        find = _exact if method == "exact" else _gram
        left = find(scaled @ root_of(moment), target, 0)[0].to(work.dtype)
    else:
        values, vectors = torch.linalg.eigh((scaled @ moment @ scaled.T).double())
        check_definite(values)
        rank = target.choose(values.flip(0))
        left = vectors[:, -rank:].to(work.dtype)
    rest = left.T @ scaled
    if roots is not None:
        left, carry = torch.linalg.qr(left / roots)
        rest = carry @ rest
    return _result(work, _triplets(left, rest), name, matrix.dtype)


METHODS: MappingProxyType[str, Method] = MappingProxyType({"exact": _exact, "gram": _gram, "randomised": _randomised})
FALLBACK = MappingProxyType({"randomised": ("randomised", "gram")})
