"""The model behind `coupled`: what a flexible layer predicts, how far it is off, and its linear sub-problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rankfold.decompose._bases import Basis, Shapes, slopes_of, values_of

RIDGE = 1e-11  # of the mean of a normal matrix's diagonal


@dataclass(frozen=True, eq=False)
class Problem:
    """Samples of a function: inputs x (samples, in), values (samples, out), Jacobians (samples, out, in).

    The values are centred, as a bias is free; `squared_jacobians` and `squared_values` are what the squared errors
    are relative to.
    """

    inputs: Tensor
    values: Tensor
    jacobians: Tensor
    basis: Basis
    squared_jacobians: float
    squared_values: float


@dataclass(frozen=True, eq=False)
class State:
    """A flexible layer in the making: `left g(right^T x + offset)`, each coordinate within [-1, 1] on the samples."""

    left: Tensor  # out, rank
    right: Tensor  # in, rank
    offset: Tensor  # rank
    coefficients: Tensor  # rank, columns
    shapes: Shapes


@dataclass(frozen=True, eq=False)
class Activity:
    """Functions and activations at the samples; the values of both are centred over the samples."""

    functions: Tensor  # samples, rank, columns
    slopes: Tensor  # samples, rank, columns
    hidden: Tensor  # samples, rank
    gains: Tensor  # samples, rank: the derivatives of the activations


def coordinates(problem: Problem, state: State) -> Tensor:
    """Return the coordinate of each neuron at each sample (samples, rank)."""
    return problem.inputs @ state.right + state.offset


def activity(problem: Problem, state: State) -> Activity:
    """Return what the neurons do at the samples."""
    u = coordinates(problem, state)
    functions = values_of(problem.basis, u, state.shapes)
    functions = functions - functions.mean(0)
    slopes = slopes_of(problem.basis, u, state.shapes)
    c = state.coefficients
    return Activity(functions, slopes, (functions * c).sum(-1), (slopes * c).sum(-1))


def projections(problem: Problem, left: Tensor, right: Tensor) -> Tensor:
    """Return `w_k^T J_i v_k` (samples, rank)."""
    return (_times(problem, right) * left).sum(1)


def _times(problem: Problem, right: Tensor) -> Tensor:
    """Return `J_i V` (samples, out, rank)."""
    return (problem.jacobians.flatten(0, 1) @ right).reshape(*problem.values.shape, -1)


def squared_errors(problem: Problem, state: State) -> tuple[Tensor, Tensor]:
    """Return the relative squared errors of the Jacobians and of the values; differentiable.

    `||J - [[W, V, H]]||^2 = ||J||^2 - 2 sum H * M + sum_i h_i^T (W^T W * V^T V) h_i` with M the `projections`.
    """
    now = activity(problem, state)
    gram = (state.left.T @ state.left) * (state.right.T @ state.right)
    crossed = (now.gains * projections(problem, state.left, state.right)).sum()
    fitted = ((now.gains @ gram) * now.gains).sum()
    residual = problem.values - now.hidden @ state.left.T
    jacobian = (problem.squared_jacobians - 2 * crossed + fitted) / problem.squared_jacobians
    return jacobian, residual.square().sum() / problem.squared_values


def cost_of(problem: Problem, state: State, weight: float) -> float:
    """Return the squared relative error of the Jacobians plus `weight` times that of the values."""
    jacobian, value = squared_errors(problem, state)
    cost = float(jacobian.clamp_min(0) + weight * value)
    return cost if cost == cost else float("inf")


def normalised(problem: Problem, state: State, right: Tensor) -> State:
    """Return the state with other directions, their coordinates scaled and moved onto [-1, 1]."""
    raw = problem.inputs @ right
    low, high = raw.amin(0), raw.amax(0)
    half = ((high - low) / 2).clamp_min(torch.finfo(raw.dtype).tiny ** 0.5)
    return replace(state, right=right / half, offset=-(low + high) / (2 * half))


def solve(matrix: Tensor, target: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return `matrix^-1 target` for a symmetric matrix that is at least positive semidefinite."""
    scale = matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    shifted = matrix + ridge * scale * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        found: Tensor = torch.linalg.lstsq(shifted, target).solution
        return found
    return torch.cholesky_solve(target, factor)


def left_solved(problem: Problem, state: State, weight: float) -> State:
    """Return the state with the best left factor for its neurons."""
    now = activity(problem, state)
    value = weight / problem.squared_values
    target = (_times(problem, state.right) * now.gains[:, None]).sum(0) / problem.squared_jacobians
    target = target + value * problem.values.T @ now.hidden
    gram = (now.gains.T @ now.gains) * (state.right.T @ state.right) / problem.squared_jacobians
    gram = gram + value * now.hidden.T @ now.hidden
    return replace(state, left=solve(gram, target.T).T)


def right_step(problem: Problem, state: State) -> Tensor:
    """Return the directions that fit the Jacobians best while the gains at the samples stay as they are."""
    gains = activity(problem, state).gains
    rows = torch.einsum("ioj,ok->ikj", problem.jacobians, state.left)  # samples, rank, in
    target = torch.einsum("ikj,ik->jk", rows, gains)
    gram = (gains.T @ gains) * (state.left.T @ state.left)
    found = solve(gram, target.T).T
    norms = [torch.linalg.vector_norm(matrix, dim=0) for matrix in (state.right, found)]
    same: Tensor = found * (norms[0] / norms[1].clamp_min(torch.finfo(found.dtype).tiny))
    return same


def free_gains(problem: Problem, state: State) -> Tensor:
    """Return the gains (samples, rank) that fit the Jacobians best for these factors, tied to no function."""
    gram = (state.left.T @ state.left) * (state.right.T @ state.right)
    return solve(gram, projections(problem, state.left, state.right).T, ridge=1e-9).T


def joint(problem: Problem, state: State, weight: float) -> State:
    """Return the state with the coefficients of all neurons that are best together: one linear least-squares problem.

    The block of neurons k, l of the normal matrix is `(w_k w_l)(v_k v_l) Phi'_k^T Phi'_l / ||J||^2` plus
    `weight (w_k w_l) Phi_k^T Phi_l / ||F||^2`.
    """
    now = activity(problem, state)
    rank, columns = state.coefficients.shape
    slopes, functions = now.slopes.flatten(1), now.functions.flatten(1)  # samples, rank * columns
    outer = state.left.T @ state.left
    value = weight / problem.squared_values
    gram = _spread((state.right.T @ state.right) * outer, columns) * (slopes.T @ slopes) / problem.squared_jacobians
    gram = gram + value * _spread(outer, columns) * (functions.T @ functions)
    crossed = projections(problem, state.left, state.right) / problem.squared_jacobians
    target = torch.einsum("ikd,ik->kd", now.slopes, crossed)
    target = target + value * torch.einsum("ikd,ik->kd", now.functions, problem.values @ state.left)
    observations = problem.values.numel() + problem.jacobians.numel()
    found = smoothed(problem.basis, gram, target.flatten(), 1 + weight, observations)
    return replace(state, coefficients=found.reshape(rank, columns))


def projection(problem: Problem, state: State, weight: float) -> State:
    """Return the state with each neuron's coefficients fitted to free gains and free hidden values on their own."""
    now = activity(problem, state)
    gains = free_gains(problem, state)
    hidden = solve(state.left.T @ state.left, state.left.T @ problem.values.T, ridge=1e-9).T
    value = weight * gains.square().sum() / hidden.square().sum().clamp_min(torch.finfo(gains.dtype).tiny)
    gram = torch.einsum("ikd,ike->kde", now.slopes, now.slopes)
    gram = gram + value * torch.einsum("ikd,ike->kde", now.functions, now.functions)
    target = torch.einsum("ikd,ik->kd", now.slopes, gains)
    target = target + value * torch.einsum("ikd,ik->kd", now.functions, hidden)
    return replace(
        state, coefficients=torch.stack([solve(a, b[:, None])[:, 0] for a, b in zip(gram, target, strict=True)])
    )


SOLVERS: dict[str, Callable[[Problem, State, float], State]] = {"joint": joint, "projection": projection}


def _spread(matrix: Tensor, columns: int) -> Tensor:
    return matrix.repeat_interleave(columns, 0).repeat_interleave(columns, 1)


def smoothed(basis: Basis, gram: Tensor, target: Tensor, total: float, observations: int) -> Tensor:
    """Return `(gram + s P)^-1 target`: P penalises the bends of splines, and s comes from cross-validation.

    P sums the squared second differences of each neuron's coefficients; s minimises the generalised cross-validation
    score `residual / (observations - degrees of freedom)^2` (Golub, Heath and Wahba 1979) over a grid. Other
    families have no penalty.
    """
    if basis.kind != "spline":
        return solve(gram, target[:, None])[:, 0]
    size = len(gram)
    second = torch.zeros(basis.size - 2, basis.columns, dtype=gram.dtype, device=gram.device)
    for row in range(basis.size - 2):
        second[row, row : row + 3] = second.new_tensor([1.0, -2.0, 1.0])
    penalty = torch.kron(torch.eye(size // basis.columns).to(gram), second.T @ second)
    scale = gram.diagonal().mean()
    factor = torch.linalg.cholesky(gram + 1e-9 * scale * torch.eye(size, dtype=gram.dtype, device=gram.device))
    half = torch.linalg.solve_triangular(factor, penalty, upper=False)
    roughness, modes = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.T, upper=False))
    strengths = modes.T @ torch.linalg.solve_triangular(factor, target[:, None], upper=False)[:, 0]
    grid = torch.logspace(-12, 2, 57, dtype=gram.dtype, device=gram.device) * scale
    kept = 1 / (1 + grid[:, None] * roughness.clamp_min(0))  # grid, size
    residual = (total - (strengths**2 * kept * (2 - kept)).sum(1)).clamp_min(0)
    scores = residual / (observations - kept.sum(1)).clamp_min(1) ** 2
    best = kept[scores.argmin()]
    found: Tensor = torch.linalg.solve_triangular(factor.T, (modes @ (strengths * best))[:, None], upper=True)
    return found[:, 0]
