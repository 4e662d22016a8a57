"""Families of functions of one variable for the activations of a flexible layer, with their derivatives.

Every neuron has a coordinate u that lies in [-1, 1] on the samples. Beyond that range, all families continue linearly.
Constants are left out wherever possible: they belong in the bias behind the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rankfold._common import check_dense, one_of, whole
from rankfold.errors import DecompositionError

Function = Callable[[Tensor], Tensor]
Family = Callable[[Tensor, Tensor, int], Tensor]  # (u, knots, size) -> one more axis of `size` functions


@dataclass(frozen=True)
class Basis:
    """The functions that an activation is a combination of: `g(u) = sum_d c_d phi_d(u)`.

    Args:
        kind: "piecewise" (linear between knots, which each neuron has of its own), "legendre" or "chebyshev"
            (polynomials of degree `size`, without a constant) or "spline" (cubic B-splines on `size - 3` equal
            intervals).
        size: the number of functions.
        element: "relu", "tanh" or "gelu" for one more function, `element(stretch * u + shift)` with a stretch and
            a shift per neuron, so that the basis contains a network's own activation; "" for none.

    Raises:
        DecompositionError: an unknown kind or element, or a size that is too small for the kind.

    Example:
        >>> Basis("legendre", 3).columns, Basis("piecewise", 8, "gelu").columns
        (3, 9)
    """

    kind: str = "piecewise"
    size: int = 8
    element: str = ""

    def __post_init__(self) -> None:
        one_of("basis", self.kind, sorted(KINDS), error=DecompositionError)
        one_of("element", self.element, ("", *ELEMENTS), error=DecompositionError)
        size = whole(f"size of a {self.kind} basis", self.size, KINDS[self.kind].least, error=DecompositionError)
        object.__setattr__(self, "size", size)

    @property
    def columns(self) -> int:
        """The number of coefficients of a neuron."""
        return self.size + bool(self.element)

    @property
    def knots(self) -> int:
        """The number of knots of a neuron: one less than the size if it has any, because the first function is u."""
        return self.size - 1 if self.kind == "piecewise" else 0


@dataclass(frozen=True, eq=False)
class Shapes:
    """What the functions of a basis depend on besides u, neuron by neuron.

    Attributes:
        knots: where a piecewise linear activation may bend (rank, knots).
        stretch: what u is multiplied by inside the element (rank,).
        shift: what is added inside the element (rank,).
    """

    knots: Tensor
    stretch: Tensor
    shift: Tensor


def values_of(basis: Basis, u: Tensor, shapes: Shapes) -> Tensor:
    """Return the values (…, rank, columns) of the functions at u (…, rank)."""
    check_dense(u, "u", meta=True)
    kind = KINDS[basis.kind]
    inside = u.clamp(-1, 1)
    values = kind.values(u if kind.unbounded else inside, shapes.knots, basis.size)
    if not kind.unbounded:
        values = values + kind.slopes(inside, shapes.knots, basis.size) * (u - inside)[..., None]
    if not basis.element:
        return values
    extra = ELEMENTS[basis.element][0](u * shapes.stretch + shapes.shift)
    return torch.cat([values, extra[..., None]], -1)


def slopes_of(basis: Basis, u: Tensor, shapes: Shapes) -> Tensor:
    """Return the derivatives (…, rank, columns) of the functions at u (…, rank)."""
    kind = KINDS[basis.kind]
    slopes = kind.slopes(u if kind.unbounded else u.clamp(-1, 1), shapes.knots, basis.size)
    if not basis.element:
        return slopes
    extra = shapes.stretch * ELEMENTS[basis.element][1](u * shapes.stretch + shapes.shift)
    return torch.cat([slopes, extra[..., None]], -1)


def _hinges(u: Tensor, knots: Tensor, size: int) -> Tensor:
    """Return u and max(0, u - knot)."""
    del size  # given by the knots
    return torch.cat([u[..., None], torch.relu(u[..., None] - knots)], -1)


def _steps(u: Tensor, knots: Tensor, size: int) -> Tensor:
    del size  # given by the knots
    steps = (u[..., None] > knots).to(u.dtype)
    return torch.cat([torch.ones_like(u)[..., None], steps], -1)


def _legendre(u: Tensor, knots: Tensor, size: int) -> Tensor:
    del knots
    found = [torch.ones_like(u), u]
    for n in range(1, size):
        found.append(((2 * n + 1) * u * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found[1:], -1)


def _legendre_slopes(u: Tensor, knots: Tensor, size: int) -> Tensor:
    values = [torch.ones_like(u), *_legendre(u, knots, size).unbind(-1)]
    found = [torch.zeros_like(u), torch.ones_like(u)]
    for n in range(1, size):
        found.append(found[n - 1] + (2 * n + 1) * values[n])
    return torch.stack(found[1:], -1)


def _chebyshev(u: Tensor, knots: Tensor, size: int) -> Tensor:
    del knots
    found = [torch.ones_like(u), u]
    for n in range(1, size):
        found.append(2 * u * found[n] - found[n - 1])
    return torch.stack(found[1:], -1)


def _chebyshev_slopes(u: Tensor, knots: Tensor, size: int) -> Tensor:
    values = [torch.ones_like(u), *_chebyshev(u, knots, size).unbind(-1)]
    found = [torch.zeros_like(u), torch.ones_like(u)]
    for n in range(1, size):
        found.append(2 * values[n] + 2 * u * found[n] - found[n - 1])
    return torch.stack(found[1:], -1)


def _spline_distance(u: Tensor, size: int) -> Tensor:
    """Return the distance from u to the centre of each B-spline, in intervals."""
    intervals = size - 3
    middles = torch.arange(-1, intervals + 2, dtype=u.dtype, device=u.device)
    return (u[..., None] + 1) * (intervals / 2) - middles


def _splines(u: Tensor, knots: Tensor, size: int) -> Tensor:
    """Return the cubic B-splines on equal intervals: `(max(0, 2 - a)^3 - 4 max(0, 1 - a)^3) / 6` at the distance a."""
    del knots
    away = _spline_distance(u, size).abs()
    return (torch.relu(2 - away) ** 3 - 4 * torch.relu(1 - away) ** 3) / 6


def _spline_slopes(u: Tensor, knots: Tensor, size: int) -> Tensor:
    del knots
    distance = _spline_distance(u, size)
    away = distance.abs()
    fall = (4 * torch.relu(1 - away) ** 2 - torch.relu(2 - away) ** 2) / 2
    return distance.sign() * fall * ((size - 3) / 2)


def _gelu_slope(u: Tensor) -> Tensor:
    cumulated = (1 + torch.erf(u / math.sqrt(2))) / 2
    return cumulated + u * torch.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class _Kind:
    """A family of functions: values, derivatives, the least size, and whether it is defined beyond [-1, 1]."""

    values: Family
    slopes: Family
    least: int
    unbounded: bool = False


KINDS: dict[str, _Kind] = {
    "piecewise": _Kind(_hinges, _steps, 1, unbounded=True),
    "legendre": _Kind(_legendre, _legendre_slopes, 1),
    "chebyshev": _Kind(_chebyshev, _chebyshev_slopes, 1),
    "spline": _Kind(_splines, _spline_slopes, 4),
}
ELEMENTS: dict[str, tuple[Function, Function]] = {
    "relu": (torch.relu, lambda u: (u > 0).to(u.dtype)),
    "tanh": (torch.tanh, lambda u: 1 - torch.tanh(u) ** 2),
    "gelu": (torch.nn.functional.gelu, _gelu_slope),
}


def even_knots(basis: Basis, rank: int) -> Tensor:
    """Return evenly spaced knots (rank, knots) inside [-1, 1]."""
    return torch.linspace(-1, 1, basis.knots + 2, dtype=torch.float64)[1:-1].expand(rank, -1).clone()


def quantile_knots(basis: Basis, u: Tensor) -> Tensor:
    """Return knots (rank, knots) at the quantiles of each neuron's samples u (samples, rank)."""
    if basis.knots == 0:
        return u.new_zeros(u.shape[1], 0)
    shares = torch.linspace(0, 1, basis.knots + 2, dtype=u.dtype, device=u.device)[1:-1]
    return torch.quantile(u, shares, dim=0).T.contiguous()


def bent_knots(basis: Basis, u: Tensor, slopes: Tensor) -> Tensor:
    """Return knots (rank, knots) that cut each neuron's slope, as a function of u, into nearly constant pieces.

    Greedy: the next knot is the cut that most reduces the squared deviation from the means of the pieces; once there is
    nothing left to gain, the longest piece is halved.

    Args:
        basis: a piecewise basis.
        u: coordinates of the samples (samples, rank).
        slopes: the derivative of each activation there (samples, rank).
    """
    order = u.argsort(dim=0)
    sorted_u, sorted_slopes = u.gather(0, order).T.contiguous(), slopes.gather(0, order).T.contiguous()
    samples = sorted_u.shape[1]
    scale = sorted_slopes.square().sum(1, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    sums = torch.cat([torch.zeros_like(scale), sorted_slopes.cumsum(1)], 1)
    position = torch.arange(1, samples, device=u.device)
    cuts = torch.stack([torch.zeros_like(scale), torch.full_like(scale, samples)], -1)[:, 0].long()
    for _ in range(min(basis.knots, samples - 1)):
        gain = _gain(sums, cuts, position, scale)
        cuts = torch.cat([cuts, position[gain.argmax(1)][:, None]], 1).sort(1).values
    inner = cuts[:, 1:-1]
    knots = (sorted_u.gather(1, inner - 1) + sorted_u.gather(1, inner)) / 2
    missing = basis.knots - knots.shape[1]
    return torch.cat([knots, knots[:, -1:].expand(-1, missing)], 1) if missing > 0 else knots


def _gain(sums: Tensor, cuts: Tensor, position: Tensor, scale: Tensor) -> Tensor:
    """Return the share of the deviation that a cut before each sample removes, plus a tiny bonus for long pieces."""
    places = position.expand(len(cuts), -1).contiguous()
    right = torch.searchsorted(cuts, places, right=False).clamp(1, cuts.shape[1] - 1)
    start, end = cuts.gather(1, right - 1), cuts.gather(1, right)
    before, after = places - start, end - places
    left_sum = sums.gather(1, places) - sums.gather(1, start)
    right_sum = sums.gather(1, end) - sums.gather(1, places)
    mean_gap = left_sum / before - right_sum / after.clamp_min(1)
    halves = (before * after).to(scale.dtype) / (before + after)
    gain = halves * mean_gap**2 / scale + 1e-9 * halves / len(position)
    return torch.where(after > 0, gain, torch.full_like(gain, -1.0))
