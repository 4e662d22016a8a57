"""Where the search for a flexible layer begins: neurons from the Jacobians' CP, at random, or from a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankfold._common import check_dense, one_of
from rankfold.decompose._bases import ELEMENTS, Shapes, quantile_knots
from rankfold.decompose._coupled_model import Problem, State, coordinates, normalised
from rankfold.decompose._cp import cp
from rankfold.decompose._svd import svd
from rankfold.errors import DecompositionError


@dataclass(frozen=True, eq=False)
class Neurons:
    """A layer of a network as a start: `left activation(right^T x + offset)`.

    Attributes:
        left: outgoing weights (out, width).
        right: incoming weights (in, width).
        offset: biases of the neurons (width,).
        activation: "relu", "tanh" or "gelu".

    Raises:
        DecompositionError: weights or biases that are not dense tensors, an unknown activation.
    """

    left: Tensor
    right: Tensor
    offset: Tensor
    activation: str = "relu"

    def __post_init__(self) -> None:
        for name in ("left", "right", "offset"):
            check_dense(getattr(self, name), name)
        one_of("activation", self.activation, ELEMENTS, error=DecompositionError)


def begin(problem: Problem, left: Tensor, right: Tensor) -> State:
    """Return a state with these factors, knots at the quantiles of its coordinates, and no coefficients yet."""
    rank = left.shape[1]
    ones = left.new_ones(rank)
    shapes = Shapes(left.new_zeros(rank, 0), 2 * ones, 0 * ones)
    state = State(left, right, 0 * ones, left.new_zeros(rank, problem.basis.columns), shapes)
    state = normalised(problem, state, right)
    knots = quantile_knots(problem.basis, coordinates(problem, state))
    return replace(state, shapes=replace(shapes, knots=knots))


def from_cp(problem: Problem, rank: int, seed: int, starts: Sequence[str] = ("algebraic", "hosvd", "random")) -> State:
    """Start from the CP of the Jacobians, without its third factor."""
    limit = problem.jacobians.numel() // max(problem.jacobians.shape)
    found = cp(problem.jacobians, min(rank, limit), starts=starts, iterations=150, seed=seed)
    left, right = found.factors[1], found.factors[2]
    missing = rank - left.shape[1]
    if missing:
        more = _directions(problem, missing, seed)
        left, right = torch.cat([left, more[0]], 1), torch.cat([right, more[1]], 1)
    return begin(problem, left, right)


def algebraic(problem: Problem, rank: int, seed: int) -> State | None:
    """Start from generalised eigenvectors of mixtures of Jacobians; None if the rank exceeds their size."""
    if rank > min(problem.jacobians.shape[1:]):
        return None
    try:
        return from_cp(problem, rank, seed, ("algebraic",))
    except DecompositionError:  # singular mixtures
        return None


def random(problem: Problem, rank: int, seed: int) -> State:
    """Start from Gaussian factors after sweeps with free gains at the samples: CP from one random start."""
    return from_cp(problem, rank, seed, ("random",))


def _directions(problem: Problem, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(dim, rank, generator=generator, dtype=torch.float64) for dim in problem.jacobians.shape[1:]]
    left, right = (draw.to(problem.values) for draw in draws)
    return left, right / torch.linalg.vector_norm(right, dim=0)


def slices(problem: Problem, rank: int, seed: int) -> State:
    """Start from the singular vectors of the mean Jacobian, the best linear map, and random directions beyond."""
    mean = problem.jacobians.mean(0)
    kept = min(rank, *mean.shape)
    found = svd(mean, kept)
    more = _directions(problem, rank, seed)
    left = torch.cat([found.u, more[0][:, kept:]], 1)
    return begin(problem, left, torch.cat([found.vh.T, more[1][:, kept:]], 1))


def from_neurons(problem: Problem, rank: int, neurons: Neurons, seed: int) -> State:
    """Start from the neurons of a network that move the values most, each with a knot where it bends.

    If there are fewer than the rank, random ones are added.
    """
    left, right, offset = (part.to(problem.values) for part in (neurons.left, neurons.right, neurons.offset))
    missing = rank - left.shape[1]
    if missing > 0:
        more = _directions(problem, missing, seed)
        left, right = torch.cat([left, more[0]], 1), torch.cat([right, more[1]], 1)
        offset = torch.cat([offset, offset.new_zeros(missing)])
    hidden = ELEMENTS[neurons.activation][0](problem.inputs @ right + offset)
    importance = torch.linalg.vector_norm(left, dim=0) * hidden.std(0)
    chosen = importance.sort(descending=True, stable=True).indices[:rank].sort().values
    state = begin(problem, left[:, chosen], right[:, chosen])
    t = problem.inputs @ right[:, chosen] + offset[chosen]
    half, centre = (t.amax(0) - t.amin(0)) / 2, (t.amax(0) + t.amin(0)) / 2
    half = half.clamp_min(torch.finfo(half.dtype).tiny ** 0.5)
    return replace(state, shapes=Shapes(_with_kink(state.shapes.knots, -centre / half), half, centre))


def _with_kink(knots: Tensor, kink: Tensor) -> Tensor:
    """Return the knots with the nearest one moved to each neuron's kink."""
    if knots.shape[1] == 0:
        return knots
    nearest = (knots - kink[:, None]).abs().argmin(1, keepdim=True)
    return knots.scatter(1, nearest, kink[:, None])


Start = Callable[[Problem, int, int], State | None]
STARTS: dict[str, Start] = {"algebraic": algebraic, "cp": from_cp, "linear": slices, "random": random}
