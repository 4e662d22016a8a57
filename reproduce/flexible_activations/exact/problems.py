"""Random functions that are one layer of neurons with known activations, and how well one is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

KINDS = ("polynomial", "ReLU")
FRESH = 400  # inputs that the solvers do not see
FOUND = 0.99  # least cosine of a neuron's incoming and outgoing weights with the true ones
DEGREE = 3


@dataclass(frozen=True)
class Problem:
    """Samples of `f(x) = left g(right^T x)`, and the truth about it.

    Attributes:
        inputs: (samples, in), standard normal.
        values: (samples, out).
        jacobians: (out, in, samples).
        fresh: other inputs, on the lines between two samples, so that no neuron is asked beyond what it saw.
        wanted: the values there.
        left: true outgoing weights (out, rank).
        right: true incoming weights (in, rank).
    """

    inputs: np.ndarray
    values: np.ndarray
    jacobians: np.ndarray
    fresh: np.ndarray
    wanted: np.ndarray
    left: np.ndarray
    right: np.ndarray


def problem(kind: str, sizes: tuple[int, int, int, int], seed: int) -> Problem:
    """Return a random problem of (in, out, rank, samples): Gaussian weights, polynomials of degree 3 or ReLUs."""
    into, out, rank, samples = sizes
    random = np.random.default_rng(seed)
    left, right = random.standard_normal((out, rank)), random.standard_normal((into, rank))
    right /= np.linalg.norm(right, axis=0)
    g, slope = _activations(kind, rank, random)
    inputs = random.standard_normal((samples, into))
    share = random.random((FRESH, 1))
    fresh = share * inputs[random.integers(samples, size=FRESH)]
    fresh += (1 - share) * inputs[random.integers(samples, size=FRESH)]
    jacobians = np.einsum("ok,ik,jk->oji", left, slope(inputs @ right), right)
    return Problem(inputs, g(inputs @ right) @ left.T, jacobians, fresh, g(fresh @ right) @ left.T, left, right)


Function = Callable[[np.ndarray], np.ndarray]


def _activations(kind: str, rank: int, random: np.random.Generator) -> tuple[Function, Function]:
    if kind == "ReLU":
        offset = 0.5 * random.standard_normal(rank)
        return lambda u: np.maximum(u + offset, 0), lambda u: (u + offset > 0).astype(float)
    c = random.standard_normal((DEGREE, rank)) / np.array([[1.0], [2.0], [6.0]])
    return (
        lambda u: u * (c[0] + u * (c[1] + u * c[2])),
        lambda u: c[0] + u * (2 * c[1] + u * 3 * c[2]),
    )


def cosine(problem: Problem, left: np.ndarray, right: np.ndarray) -> float:
    """Return how well the worst neuron is found: |cos| of its outgoing and of its incoming weights, the lower one.

    Neurons are paired so that the sum of the products of both is largest; scales and signs do not count.
    """
    parts = [np.abs(_unit(true).T @ _unit(found)) for true, found in ((problem.left, left), (problem.right, right))]
    pairs = linear_sum_assignment(parts[0] * parts[1], maximize=True)
    return float(min(part[pairs].min() for part in parts))


def _unit(columns: np.ndarray) -> np.ndarray:
    return columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)


def error(problem: Problem, got: np.ndarray) -> float:
    """Return the relative Frobenius error of values at the fresh inputs, from their mean."""
    return float(np.linalg.norm(got - problem.wanted) / np.linalg.norm(problem.wanted - problem.wanted.mean(0)))
