"""Refinement of a flexible layer: all of its parameters at once, by Levenberg-Marquardt or by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from rankfold.decompose._bases import Shapes, slopes_of, values_of
from rankfold.decompose._coupled_model import Problem, State, cost_of, squared_errors

SMALL = 1200  # up to this many parameters, Levenberg-Marquardt solves for all of them
MOST_STEPS = {"levenberg-marquardt": 60, "gradient": 300}
STALL = 1e-3  # a step that lowers the cost by less than this share is no progress
SOLVED = 1e-24  # a cost below this is only rounding


@dataclass(frozen=True, eq=False)
class Refined:
    """Where a refinement ended: the best state, its cost, the costs on the way."""

    state: State
    cost: float
    trace: tuple[float, ...]


def pack(state: State) -> Tensor:
    """Return every parameter of a state in one vector: the left factor, then all of each neuron."""
    return torch.cat([state.left.flatten(), torch.cat([part.T for part in _neuron_parts(state)], 1).flatten()])


def unpack(vector: Tensor, like: State) -> State:
    """Return the state that a vector holds, of the sizes of another."""
    rank = like.left.shape[1]
    left, neurons = vector[: like.left.numel()], vector[like.left.numel() :].reshape(rank, -1)
    ends = list(accumulate(len(part) for part in _neuron_parts(like)))
    right, offset, coefficients, knots, stretch, shift = (
        neurons[:, start:end] for start, end in zip([0, *ends], ends, strict=False)
    )
    shapes = Shapes(knots, stretch[:, 0], shift[:, 0])
    return State(left.reshape(like.left.shape), right.T, offset[:, 0], coefficients, shapes)


def _neuron_parts(state: State) -> list[Tensor]:
    """Return (parameters, rank) matrices of what belongs to each neuron."""
    shapes = state.shapes
    main = [state.right, state.offset[None], state.coefficients.T]
    return [*main, shapes.knots.T, shapes.stretch[None], shapes.shift[None]]


def levenberg_marquardt(problem: Problem, state: State, weight: float) -> Refined:
    """Minimise the cost by damped Gauss-Newton steps, the normal matrix summed over chunks of samples."""
    vector, cost, damping = pack(state), cost_of(problem, state, weight), 1e-3
    trace = [cost]
    stalled = 0
    for _ in range(MOST_STEPS["levenberg-marquardt"]):
        normal, gradient = _normal_equations(problem, vector, state, weight)
        found = _damped_step(problem, (vector, cost, damping), (normal, gradient), state, weight)
        stalled = stalled + 1 if cost - found[1] < STALL * cost else 0
        vector, cost, damping = found
        trace.append(cost)
        if stalled == 3 or cost < SOLVED or damping > 1e10:
            break
    return Refined(unpack(vector, state), cost, tuple(trace))


def _damped_step(
    problem: Problem,
    at: tuple[Tensor, float, float],
    equations: tuple[Tensor, Tensor],
    like: State,
    weight: float,
) -> tuple[Tensor, float, float]:
    """Return where a step leads, its cost and the next damping; the damping grows until the cost falls."""
    vector, cost, damping = at
    normal, gradient = equations
    scale = normal.diagonal().clamp_min(normal.diagonal().max() * 1e-12)
    while damping < 1e10:
        step, failed = torch.linalg.solve_ex(normal + damping * scale.diag(), gradient)
        if not failed:
            tried = cost_of(problem, unpack(vector - step, like), weight)
            if tried < cost:
                return vector - step, tried, max(damping / 5, 1e-12)
        damping *= 4
    return vector, cost, damping


def _normal_equations(problem: Problem, vector: Tensor, like: State, weight: float) -> tuple[Tensor, Tensor]:
    """Return `S^T S` and `S^T residual` for the slopes S of all weighted residuals, which are never formed.

    The residual of a sample is a sum of outer products over neurons, so that products of slopes are products of
    small Gram matrices.
    """
    state = unpack(vector, like)
    (gains, gain_slopes), (hidden, hidden_slopes) = _neuron_slopes(problem, state)
    # the bias absorbs the mean of the values
    hidden, hidden_slopes = hidden - hidden.mean(0), hidden_slopes - hidden_slopes.mean(0)
    left, right = state.left, state.right
    scale = weight / problem.squared_values
    normal = scale * _outer_gram(left, torch.ones_like(right[:1]), hidden, hidden_slopes)
    residual = scale * (hidden @ left.T - problem.values)
    parts = [residual.T @ hidden, torch.einsum("ik,ikq->kq", residual @ left, hidden_slopes)]
    gradient = torch.cat([part.flatten() for part in parts])

    scale = 1 / problem.squared_jacobians
    normal += scale * _jacobian_gram(left, right, gains, gain_slopes)
    misfit = scale * (torch.einsum("ok,ik,jk->ioj", left, gains, right) - problem.jacobians)
    by_left = misfit @ right  # samples, out, rank
    by_right = torch.einsum("ioj,ok->ikj", misfit, left)
    inner = torch.einsum("ik,ikq->kq", (by_left * left).sum(1), gain_slopes)
    inner[:, : len(right)] += (by_right * gains[..., None]).sum(0)
    gradient += torch.cat([(by_left * gains[:, None]).sum(0).flatten(), inner.flatten()])
    return normal, gradient


def _outer_gram(left: Tensor, right: Tensor, hidden: Tensor, slopes: Tensor) -> Tensor:
    """Return the products of slopes of `sum_k w_k o v_k h_ik` by left (out, rank) and by what h depends on.

    `hidden` (samples, rank) is h and `slopes` (samples, rank, q) its derivatives by q parameters of each neuron.
    """
    out, rank = left.shape
    right_gram = right.T @ right
    flat = slopes.flatten(1)
    crossed = (hidden.T @ flat).reshape(rank, rank, -1)  # rank, rank, q
    inner = (flat.T @ flat).reshape(rank, slopes.shape[2], rank, -1)
    inner = inner * ((left.T @ left) * right_gram)[:, None, :, None]
    mixed = left[:, None, :, None] * (right_gram[..., None] * crossed)  # out, rank, rank, q
    outer = torch.kron(torch.eye(out).to(left), (hidden.T @ hidden) * right_gram)
    return _assembled(outer, mixed.flatten(2).flatten(0, 1), inner.flatten(2).flatten(0, 1))


def _jacobian_gram(left: Tensor, right: Tensor, gains: Tensor, slopes: Tensor) -> Tensor:
    """Return `_outer_gram` where the first parameters of each neuron are also its column of `right`."""
    (out, rank), into, each = left.shape, len(right), slopes.shape[2]
    left_gram, products = left.T @ left, gains.T @ gains
    crossed = (gains.T @ slopes.flatten(1)).reshape(rank, rank, each)  # rank, rank, q
    inner = left.new_zeros(rank, each, rank, each)
    direct = torch.einsum("kl,bl,klq->kblq", left_gram, right, crossed)
    inner[:, :into] += direct
    inner[..., :into] += direct.permute(2, 3, 0, 1)
    same = torch.einsum("kl,bc->kblc", left_gram * products, torch.eye(into).to(left))
    inner[:, :into, :, :into] += same
    mixed = left.new_zeros(out, rank, rank, each)
    mixed[..., :into] = torch.einsum("al,kl,bk->aklb", left, products, right)
    nothing = left.new_zeros(out * rank, out * rank)
    more = _assembled(nothing, mixed.flatten(2).flatten(0, 1), inner.flatten(2).flatten(0, 1))
    return _outer_gram(left, right, gains, slopes) + more


def _assembled(first: Tensor, mixed: Tensor, second: Tensor) -> Tensor:
    return torch.cat([torch.cat([first, mixed], 1), torch.cat([mixed.T, second], 1)])


def _neuron_slopes(problem: Problem, state: State) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return gains and hidden values (samples, rank), each with its slopes (samples, rank, parameters of a neuron).

    Every entry depends on its own copy of the neuron's parameters, so that one backward pass gives all slopes.
    """
    samples = len(problem.inputs)
    with torch.enable_grad():
        u = (problem.inputs @ state.right + state.offset).requires_grad_()
        own = (state.coefficients, state.shapes.knots, state.shapes.stretch, state.shapes.shift)
        c, *rest = (part.expand(samples, *part.shape).clone().requires_grad_() for part in own)
        shapes = Shapes(*rest)
        results = []
        for functions in (slopes_of(problem.basis, u, shapes), values_of(problem.basis, u, shapes)):
            output = (functions * c).sum(-1)
            found = torch.autograd.grad(output.sum(), (u, c, *rest), retain_graph=True, materialize_grads=True)
            by_u, by_c, by_knots, by_stretch, by_shift = found
            by_right = by_u[..., None] * problem.inputs[:, None]
            pieces = [by_right, by_u[..., None], by_c, by_knots, by_stretch[..., None], by_shift[..., None]]
            results.append((output.detach(), torch.cat(pieces, -1)))
    return results[0], results[1]


def gradient(problem: Problem, state: State, weight: float) -> Refined:
    """Minimise the cost by L-BFGS (Liu and Nocedal 1989), its gradient by automatic differentiation."""
    start = pack(state)
    scale = start.abs().clamp_min(start.abs().mean())
    best, trace = (cost_of(problem, state, weight), start), [cost_of(problem, state, weight)]

    def evaluate(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        vector = (torch.from_numpy(point).to(start) * scale).requires_grad_()
        with torch.enable_grad():
            jacobian, value = squared_errors(problem, unpack(vector, state))
            cost = jacobian + weight * value
            (slope,) = torch.autograd.grad(cost, vector)
        reached = float(cost.detach())
        if reached < best[0]:
            best = (reached, vector.detach())
        trace.append(best[0])
        return reached, (slope * scale).double().cpu().numpy()

    limits = {"maxiter": MOST_STEPS["gradient"], "maxfun": 2 * MOST_STEPS["gradient"], "maxcor": 20}
    minimize(evaluate, (start / scale).double().cpu().numpy(), jac=True, method="L-BFGS-B", options=limits)
    return Refined(unpack(best[1], state), max(best[0], 0.0), tuple(trace))


def none(problem: Problem, state: State, weight: float) -> Refined:
    """Leave the state as it is."""
    cost = cost_of(problem, state, weight)
    return Refined(state, cost, (cost,))


def auto(problem: Problem, state: State, weight: float) -> Refined:
    """Refine by Levenberg-Marquardt where the parameters are few, by L-BFGS elsewhere."""
    return (levenberg_marquardt if is_small(state) else gradient)(problem, state, weight)


def is_small(state: State) -> bool:
    """Tell whether a state has so few parameters that refining it is quick."""
    return len(pack(state)) <= SMALL


REFINEMENTS: dict[str, Callable[[Problem, State, float], Refined]] = {
    "auto": auto,
    "levenberg-marquardt": levenberg_marquardt,
    "gradient": gradient,
    "none": none,
}
