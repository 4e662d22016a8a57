"""Ranks from the singular values of one matrix: energy, stable rank, variational Bayes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar

from rankfold._common import real
from rankfold.errors import DecompositionError

Values = NDArray[np.float64]
GRID = 400


@dataclass(frozen=True, eq=False)
class EVBMF:
    """The part of a spectrum that stands out of noise.

    Attributes:
        rank: number of components kept; 0 where nothing stands out.
        noise: variance of the noise in an entry of the matrix.
        values: the kept singular values, shrunk to their posterior means (rank,).
    """

    rank: int
    noise: float
    values: Values = field(repr=False)


def energy(values: ArrayLike, keep: float) -> int:
    """Return the smallest rank whose leading values hold the share `keep` of the energy, `sum s_i^2`.

    Args:
        values: singular values, in any order: a list, an array or a tensor on the CPU.
        keep: 0 < keep <= 1. The relative error of that rank is at most `sqrt(1 - keep)`.

    Returns:
        A rank between 1 and the number of values.

    Raises:
        DecompositionError: `keep` outside its range; no values, or negative, NaN or Inf ones.

    Example:
        >>> energy([3.0, 2.0, 1.0], 0.9)
        2
    """
    real("keep", keep, most=1, ends="(]", error=DecompositionError)
    squares = _checked(values) ** 2
    total = squares.sum()
    if total == 0:
        return 1
    # Sums of what is cut off, from the small end, keep their digits where `keep` is close to 1.
    cut = np.cumsum(squares[::-1])[::-1]
    fits = np.flatnonzero(np.append(cut[1:], 0.0) <= (1 - keep) * total)
    return int(fits[0]) + 1


def stable_rank(values: ArrayLike) -> float:
    """Return `||A||_F^2 / ||A||_2^2 = sum s_i^2 / s_1^2`: between 1 and the rank, insensitive to small singular values.

    Args:
        values: singular values, in any order.

    Returns:
        The stable rank; 0 for a zero matrix.

    Raises:
        DecompositionError: no values, or negative, NaN or Inf ones.

    Reference:
        Rudelson and Vershynin 2007.

    Example:
        >>> stable_rank([2.0, 1.0, 1.0])
        1.5
    """
    checked = _checked(values)
    return float(((checked / checked[0]) ** 2).sum()) if checked[0] > 0 else 0.0


def evbmf(values: ArrayLike, shape: tuple[int, int], *, noise: float | None = None) -> EVBMF:
    """Return the rank of a matrix under low rank plus Gaussian noise: empirical variational Bayes, global solution.

    For an L x M matrix (L <= M, alpha = L / M) a component is kept where its singular value exceeds
    `sqrt(M * noise * x)`, `x = (1 + t)(1 + alpha / t)`, with t the root of `Phi(t) + Phi(t / alpha) = 0`,
    `Phi(z) = ln(1 + z) / z - 1/2`. The root is solved for: the constant 2.5129 sqrt(alpha) in common use is exact at
    alpha = 1 only. An unknown noise minimises the free energy: a logarithmic grid, then a search around its best.
    Spectra of trained networks with heavy tails are not low rank plus noise: expect a rank that is too small there.

    Args:
        values: singular values of the matrix, in any order; missing ones are zeros.
        shape: of the matrix, either way round.
        noise: variance of the noise in an entry, where it is known.

    Returns:
        The rank (0 on pure noise), the variance of the noise, the shrunk singular values.

    Raises:
        DecompositionError: more values than the smaller side, a noise that is not above 0, negative, NaN or Inf values.

    Reference:
        Nakajima, Sugiyama, Babacan and Tomioka, JMLR 14 (2013): the global analytic solution.

    Example:
        >>> evbmf([10.0, 9.0, 1.1, 1.0, 0.9, 0.8], (6, 40), noise=0.02).rank
        2
    """
    checked = _checked(values)
    small, large = sorted(shape)
    if not 1 <= len(checked) <= small:
        raise DecompositionError(f"a matrix of shape {tuple(shape)} has {small} singular values, not {len(checked)}")
    if noise is not None:
        real("noise", noise, ends="()", error=DecompositionError)
    scale = checked[0]
    if scale == 0:
        return EVBMF(0, noise or 0.0, np.empty(0))
    model = _FreeEnergy(checked[checked > 1e-12 * scale] / scale, small, large)
    variance = model.minimiser() if noise is None else noise / scale**2
    kept = model.values[model.values > math.sqrt(large * variance * model.edge)]
    ratio = variance / kept**2
    inner = 1 - (small + large) * ratio
    shrunk = kept / 2 * (inner + np.sqrt(np.maximum(inner**2 - 4 * small * large * ratio**2, 0)))
    return EVBMF(len(kept), float(variance * scale**2), shrunk * scale)


class _FreeEnergy:
    """Free energy of the model as a function of the variance of the noise."""

    def __init__(self, values: Values, small: int, large: int) -> None:
        self.values, self.small, self.large = values, small, large
        self.alpha = small / large
        threshold = _threshold(self.alpha)
        self.edge = (1 + threshold) * (1 + self.alpha / threshold)

    def __call__(self, variance: Values) -> Values:
        """Return the free energy at each variance (some, ) -> (some, )."""
        x = self.values**2 / (self.large * variance[:, None])
        excess = np.maximum(x - (1 + self.alpha), 2 * math.sqrt(self.alpha))
        tau = (excess + np.sqrt(np.maximum(excess**2 - 4 * self.alpha, 0))) / 2
        gain = np.log1p(tau) + self.alpha * np.log1p(tau / self.alpha) - tau
        terms = x - np.log(x) + np.where(x > self.edge, gain, 0)
        return np.asarray(terms.sum(axis=1) + (self.small - len(self.values)) * np.log(variance))

    def bounds(self) -> tuple[float, float]:
        """Return the interval that holds the minimiser."""
        squares = self.values**2
        upper = squares.sum() / (self.small * self.large)
        most = min(math.ceil(self.small / (1 + self.alpha)) - 1, len(squares))
        beyond = squares[most:]
        if len(beyond) == 0:
            return 1e-12 * upper, upper
        lower = max(beyond[0] / (self.large * self.edge), beyond.sum() / ((self.small - most) * self.large))
        return min(max(lower, 1e-12 * upper), upper), upper

    def minimiser(self) -> float:
        """Return the variance of least free energy: it has kinks, so a grid first, then a bounded search."""
        lower, upper = self.bounds()
        if not lower < upper:
            return upper
        grid = np.geomspace(lower, upper, GRID)
        best = int(self(grid).argmin())
        around = np.log(grid[max(best - 1, 0)]), np.log(grid[min(best + 1, GRID - 1)])
        fine = minimize_scalar(lambda log: self(np.exp([log]))[0], bounds=around, method="bounded")
        candidates = np.array([grid[best], math.exp(fine.x)])
        return float(candidates[self(candidates).argmin()])


def _threshold(alpha: float) -> float:
    """Return the root t of `Phi(t) + Phi(t / alpha)`: the sum falls from 1 to -1."""
    return float(
        brentq(lambda t: math.log1p(t) / t + math.log1p(t / alpha) * alpha / t - 1, 1e-6 * math.sqrt(alpha), 10.0)
    )


def _checked(values: ArrayLike) -> Values:
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # a sparse tensor, one on a GPU or with a graph, words
        raise DecompositionError(
            "singular values must be numbers in a list, an array or a dense tensor on the CPU, got "
            f"{type(values).__name__} ({error}): pass values.detach().cpu().float(), "
            "or values.to_dense() of a sparse tensor"
        ) from error
    checked = np.sort(given.ravel())[::-1]
    if checked.size == 0 or not np.isfinite(checked).all() or checked[-1] < 0:
        raise DecompositionError("singular values are one or more finite numbers, none below 0")
    return checked
