"""Alternating least squares for CP: a dimension tree over one split of the modes, Cholesky solves.

Inside the CP family a factor is kept as its transpose, `rows[k]` (rank, dim_k), with unit rows, the norms of the
terms apart in `weights` (rank,): each term is then contiguous and no solve has to transpose.
"""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from rankfold._common import Float
from rankfold.decompose._unfold import relative, squared_norm

CHUNK = 1 << 22  # entries of the residual that are formed at a time
CANCELLATION = 1e3  # below this many eps, the squared residual comes from the residual itself
SHIFT = {torch.float64: 1e-12, torch.float32: 1e-7}  # proximal term of a solve: Grams have a diagonal of ones


@dataclass(eq=False)
class Terms:
    """Rank-one terms being fitted: `sum_r weights[r] rows[0][r] o rows[1][r] o ...`, the rows of unit norm."""

    weights: Float[Tensor, " rank"]
    rows: list[Float[Tensor, "rank _"]]

    def set_mode(self, mode: int, scaled: Float[Tensor, "rank dim"]) -> None:
        """Put scaled rows in a mode: their norms become the weights."""
        self.weights, self.rows[mode] = norms_and_directions(scaled)

    def to(self, dtype: torch.dtype) -> Terms:
        """Return the terms in another dtype."""
        return Terms(self.weights.to(dtype), [rows.to(dtype) for rows in self.rows])


def norms_and_directions(rows: Float[Tensor, "rank dim"]) -> tuple[Tensor, Tensor]:
    """Return the norms of rows and the rows divided by them, each in one piece of memory; a zero row stays zero."""
    rows = rows.contiguous()  # solves return columns; products of rows are several times slower on these
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norms[:, 0], rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)


@dataclass(frozen=True, eq=False)
class Split:
    """A tensor unfolded once for all sweeps, as a matrix of the modes `left` by the modes `right`.

    Attributes:
        matrix: entries, (product of the left dims, product of the right dims).
        left: modes of the rows, in the order in which they run.
        right: modes of the columns, in the order in which they run.
        kept: squared norm of `matrix`.
        total: squared norm of the tensor that errors are relative to.
        ceiling: bound on the sum of the squared norms of the terms.
    """

    matrix: Float[Tensor, "left right"]
    left: tuple[int, ...]
    right: tuple[int, ...]
    kept: float
    total: float
    ceiling: float = math.inf


@dataclass(frozen=True, eq=False)
class Run:
    """Where a run of sweeps ended: terms, the relative error after each sweep, whether it converged."""

    terms: Terms
    trace: tuple[float, ...]
    converged: bool


def split_modes(tensor: Tensor, whole: Split | None = None, max_degeneracy: float = math.inf) -> Split:
    """Unfold a tensor where the two halves of the modes have the smallest sum of sizes.

    A sweep costs two products of the tensor with a Khatri-Rao matrix whatever the split; the split decides
    how large these matrices and the partial products are: for 256 x 256 x 9, 256 and 9 * 256 rows.

    Args:
        tensor: of order >= 2.
        whole: the split of the tensor that this one is a compressed core of.
        max_degeneracy: bound on the squared norms of the terms, relative to that of the tensor.
    """
    order = tensor.ndim
    subsets = [half for size in range(1, order // 2 + 1) for half in combinations(range(order), size)]

    def cost(half: tuple[int, ...]) -> int:
        rows = math.prod(tensor.shape[k] for k in half)
        return rows + tensor.numel() // rows

    left = min(subsets, key=cost)
    right = tuple(k for k in range(order) if k not in left)
    # the long modes run fastest, so that the partial contractions walk along memory
    left, right = (tuple(sorted(half, key=lambda k: (tensor.shape[k], k))) for half in (left, right))
    rows = math.prod(tensor.shape[k] for k in left)
    matrix = tensor.permute(*left, *right).reshape(rows, -1).contiguous()
    kept = squared_norm(matrix)
    if whole is not None:
        return Split(matrix, left, right, kept, whole.total, whole.ceiling)
    return Split(matrix, left, right, kept, kept, max_degeneracy * kept)


def row_products(rows: Sequence[Float[Tensor, "rank _"]]) -> Float[Tensor, "rank _"]:
    """Return the transposed Khatri-Rao product: every rank's outer product, flattened."""
    return reduce(lambda a, b: (a[:, :, None] * b[:, None, :]).flatten(1), rows)


def products(split: Split, rows: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (mode, MTTKRP^T) for every mode once, `rows` being free to change in between.

    MTTKRP is `X_(n) (khatri-rao of the other factors)`; its transpose (rank, dim_n) is yielded, computed from the
    rows as they are at that moment. The tensor is read twice; all else works on partial products.
    """
    halves = ((split.left, split.right, split.matrix.T), (split.right, split.left, split.matrix))
    for modes, others, matrix in halves:
        yield from _descend(row_products([rows[k] for k in others]) @ matrix, modes, rows)


def _descend(partial: Tensor, modes: tuple[int, ...], rows: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Contract a partial product (rank, product of the dims of `modes`) down to each single mode."""
    if len(modes) == 1:
        yield modes[0], partial
        return
    first, last = modes[: len(modes) // 2], modes[len(modes) // 2 :]
    size = math.prod(rows[k].shape[1] for k in first)
    cube = partial.reshape(partial.shape[0], size, -1)
    # a row vector times a matrix, whichever side is contracted: column vectors are an order slower in bmm
    yield from _descend(torch.bmm(row_products([rows[k] for k in first])[:, None, :], cube)[:, 0], last, rows)
    yield from _descend(torch.bmm(row_products([rows[k] for k in last])[:, None, :], cube.mT)[:, 0], first, rows)


class Grams:
    """Inner products of the rows of each mode, updated as the modes are."""

    def __init__(self, rows: Sequence[Float[Tensor, "rank _"]]) -> None:
        self._of = [r @ r.T for r in rows]

    def without(self, mode: int) -> Float[Tensor, "rank rank"]:
        """Return the Hadamard product of all Grams but one: the matrix of that mode's normal equations."""
        return reduce(torch.mul, [gram for k, gram in enumerate(self._of) if k != mode])

    def update(self, mode: int, rows: Float[Tensor, "rank _"]) -> None:
        """Take a mode's new rows."""
        self._of[mode] = rows @ rows.T


def sweep(split: Split, terms: Terms, grams: Grams) -> float:
    """Update every mode of the terms and their Grams once; return the squared residual against `split.matrix`."""
    for mode, product in products(split, terms.rows):
        gram = grams.without(mode)
        scaled = solve(gram, product, terms.rows[mode] * terms.weights[:, None])
        terms.set_mode(mode, scaled)
        if float(torch.dot(terms.weights, terms.weights)) > split.ceiling:
            scaled = solve_within(gram, product, split.ceiling)
            terms.set_mode(mode, scaled)
        grams.update(mode, terms.rows[mode])
    squared = split.kept + fit_change(gram, product, scaled)  # of the mode that was updated last
    if squared < CANCELLATION * torch.finfo(split.matrix.dtype).eps * split.kept:
        return squared_residual(split, terms)
    return squared


def fit_change(gram: Tensor, product: Tensor, scaled: Tensor) -> float:
    """Return `||X^||^2 - 2 <X, X^>` from the last mode's normal equations; dot products run in float64."""
    image = 2 * product.double() - (gram @ scaled).double()
    return -float(torch.vdot(image.flatten(), scaled.double().flatten()))


def solve(
    gram: Float[Tensor, "rank rank"], product: Float[Tensor, "rank dim"], previous: Float[Tensor, "rank dim"]
) -> Float[Tensor, "rank dim"]:
    """Minimise `<U, gram U> - 2 <product, U> + shift ||U - previous||^2` by Cholesky, solving for the change of U.

    The proximal term has no part in the fixed point and cannot raise the residual (a plain ridge does both);
    rounding in the solve only scales with the change. Where Cholesky breaks down, the change is solved for in the
    eigenspaces that carry information.
    """
    change = torch.addmm(product, gram, previous, alpha=-1)
    shift = torch.full_like(gram[0], SHIFT[gram.dtype])
    lower, failed = torch.linalg.cholesky_ex(gram + shift.diag())
    if not failed:
        if 2 * product.shape[1] < len(gram):
            return previous + torch.cholesky_solve(change, lower)
        return torch.addmm(previous, torch.cholesky_inverse(lower), change)  # faster than two triangular solves
    values, vectors = eigen(gram)
    useful = values > values[-1] * len(gram) * torch.finfo(gram.dtype).eps
    inverse = torch.where(useful, 1 / torch.where(useful, values, 1.0), 0.0)
    return previous + vectors @ (inverse[:, None] * (vectors.T @ change))


def solve_within(
    gram: Float[Tensor, "rank rank"], product: Float[Tensor, "rank dim"], ceiling: float
) -> Float[Tensor, "rank dim"]:
    """Minimise `<U, gram U> - 2 <product, U>` subject to `||U||^2 <= ceiling`: a ridge found by bisection."""
    spectrum = Spectrum(gram, product)
    low, high = spectrum.levels
    return spectrum.solution(bisect(lambda level: spectrum.squared_norm(level) <= ceiling, low, high)).to(gram)


def solve_to_fit(
    gram: Float[Tensor, "rank rank"], product: Float[Tensor, "rank dim"], fitted: float
) -> Float[Tensor, "rank dim"]:
    """Minimise `||U||^2` subject to `2 <product, U> - <U, gram U> >= fitted`: the largest ridge that still fits.

    If nothing fits that well, the smallest ridge is used: a plain step.
    """
    spectrum = Spectrum(gram, product)
    low, high = spectrum.levels
    return spectrum.solution(bisect(lambda level: spectrum.fitted(level) >= fitted, high, low)).to(gram)


class Spectrum:
    """Ridge solutions `(gram + mu I)^-1 product` for any mu, from one eigendecomposition in float64.

    The others' rows being of unit norm, `||U||^2` is the sum of the squared norms of the terms.
    """

    def __init__(self, gram: Float[Tensor, "rank rank"], product: Float[Tensor, "rank dim"]) -> None:
        values, self._vectors = eigen(gram.double())
        self._values = values.clamp_min(0)
        self._rotated = self._vectors.T @ product.double()
        self._energy = self._rotated.square().sum(1)
        scale = max(float(self._values[-1]), torch.finfo(torch.float64).tiny)
        self.levels = (math.log(1e-14 * scale), math.log(1e6 * scale))

    def squared_norm(self, level: float) -> float:
        """Return `||U||^2` at `mu = exp(level)`."""
        return float((self._energy / (self._values + math.exp(level)).square()).sum())

    def fitted(self, level: float) -> float:
        """Return `||X||^2 - ||X - X^||^2` at `mu = exp(level)`, `sum_k energy_k (e_k + 2 mu) / (e_k + mu)^2`."""
        ridge = math.exp(level)
        return float((self._energy * (self._values + 2 * ridge) / (self._values + ridge).square()).sum())

    def solution(self, level: float) -> Float[Tensor, "rank dim"]:
        """Return U at `mu = exp(level)`."""
        return self._vectors @ (self._rotated / (self._values + math.exp(level))[:, None])


def bisect(holds: Callable[[float], bool], start: float, end: float) -> float:
    """Return the point from start to end at which `holds` becomes true, on the true side; `end` if it never does."""
    for _ in range(50):
        middle = (start + end) / 2
        start, end = (start, middle) if holds(middle) else (middle, end)
    return end


def eigen(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues and orthonormal eigenvectors of symmetric matrices."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values, vectors


def squared_residual(split: Split, terms: Terms) -> float:
    """Return the squared residual summed from its entries, a block of rows at a time."""
    left = row_products([terms.rows[k] for k in split.left]) * terms.weights[:, None]
    right = row_products([terms.rows[k] for k in split.right])
    step = max(1, CHUNK // split.matrix.shape[1])
    blocks = zip(torch.split(split.matrix, step), torch.split(left, step, dim=1), strict=True)
    return sum(squared_norm(torch.addmm(block, part.T, right, alpha=-1)) for block, part in blocks)


def run_sweeps(split: Split, terms: Terms, iterations: int, tolerance: float) -> Run:
    """Sweep until the error falls by less than `tolerance` of itself, or is nothing but rounding."""
    floor = 4 * torch.finfo(split.matrix.dtype).eps
    lost = split.total - split.kept
    trace: list[float] = []
    grams = Grams(terms.rows)
    for _ in range(iterations):
        trace.append(relative(sweep(split, terms, grams) + lost, split.total))
        if trace[-1] <= floor or (len(trace) > 1 and trace[-2] - trace[-1] <= tolerance * trace[-2]):
            return Run(terms, tuple(trace), True)
    return Run(terms, tuple(trace), False)
