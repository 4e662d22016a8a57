"""Coupled factorisation of a function's Jacobians and values: neurons that each have their own activation."""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import torch
from torch import Tensor

from rankfold._common import Float, one_of, real
from rankfold.decompose._bases import Basis, Shapes, bent_knots, slopes_of, values_of
from rankfold.decompose._coupled_model import (
    SOLVERS,
    Problem,
    State,
    activity,
    coordinates,
    cost_of,
    free_gains,
    left_solved,
    normalised,
    right_step,
    squared_errors,
)
from rankfold.decompose._coupled_refine import REFINEMENTS, SOLVED, Refined, is_small
from rankfold.decompose._coupled_start import STARTS, Neurons, from_neurons
from rankfold.decompose._unfold import check_rank, working_copy
from rankfold.errors import DecompositionError

MOST_SWEEPS = 40
STALL = 1e-4  # a sweep that lowers the cost by less than this share of it ends the alternation
DAMPINGS = (1.0, 0.3, 0.1)  # shares of a step of the directions to try
SUBSETS = 3000  # subsets of columns that a k-rank may look at
BALANCE = (0.1, 100.0)  # bounds on the weight of the values when it is chosen automatically
REBENDS = 3  # how often the knots are placed again during a quick refinement
FINALISTS = 3  # starts that are refined if that is quick


@dataclass(frozen=True, eq=False)
class Coupled:
    """A function as one layer of neurons: `f(x) = left g(right^T x + offset) + bias`, `g_k(u) = sum_d c_kd phi_d(u)`.

    Attributes:
        left: outgoing weights (out, rank).
        right: incoming weights (in, rank), scaled so that the samples' coordinates span [-1, 1].
        offset: added to the coordinates (rank,).
        bias: added to the values (out,).
        coefficients: of each activation in its functions (rank, columns).
        basis: which functions.
        shapes: the knots, and the stretch and shift of the element, neuron by neuron.
        cost: squared Jacobian error plus `weight` times the squared value error.
        value_error: relative Frobenius error of the values, from their mean.
        jacobian_error: relative Frobenius error of the Jacobians.
        weight: of the values in the cost, relative to the Jacobians.
        start: the name of the start that was kept.
        spread: the cost that each start reached before refinement, by name; repeated names are numbered.
        trace: cost after each sweep and each step of the refinement of the start that was kept.
        kruskal: k-ranks of `left`, `right` and the gains at the samples; lower bounds where there are many neurons.

    Example:
        >>> import torch
        >>> x = torch.randn(3, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> w, v = torch.eye(4, 2, dtype=torch.float64), torch.eye(3, 2, dtype=torch.float64)
        >>> jacobians = torch.einsum("ok,ki,jk->oji", w, 3 * (v.T @ x) ** 2, v)
        >>> f = coupled(jacobians, w @ (v.T @ x) ** 3, x, 2, basis=Basis("legendre", 3))
        >>> f.rank, f.unique, f.cost < 1e-10, torch.allclose(f.evaluate(x), w @ (v.T @ x) ** 3, atol=1e-6)
        (2, True, True, True)
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "in rank"]
    offset: Float[Tensor, " rank"]
    bias: Float[Tensor, " out"]
    coefficients: Float[Tensor, "rank columns"]
    basis: Basis
    shapes: Shapes = field(repr=False)
    cost: float = math.nan
    value_error: float = math.nan
    jacobian_error: float = math.nan
    weight: float = 1.0
    start: str = ""
    spread: dict[str, float] = field(default_factory=dict)
    trace: tuple[float, ...] = field(default=(), repr=False)
    kruskal: tuple[int, int, int] = (0, 0, 0)

    @property
    def rank(self) -> int:
        """The number of neurons."""
        return self.left.shape[1]

    @property
    def unique(self) -> bool:
        """Whether Kruskal's condition holds: the k-ranks sum to at least `2 rank + 2`, so that the CP is unique.

        False says nothing where a k-rank is a lower bound. (Kruskal 1977.)
        """
        return sum(self.kruskal) >= 2 * self.rank + 2

    def evaluate(self, inputs: Float[Tensor, "in samples"]) -> Float[Tensor, "out samples"]:
        """Return the values of the layer."""
        functions = values_of(self.basis, inputs.T @ self.right + self.offset, self.shapes)
        return self.left @ (functions * self.coefficients).sum(-1).T + self.bias[:, None]

    def jacobians(self, inputs: Float[Tensor, "in samples"]) -> Float[Tensor, "out in samples"]:  # noqa: F821, UP037 (a shape)
        """Return the Jacobians of the layer."""
        slopes = slopes_of(self.basis, inputs.T @ self.right + self.offset, self.shapes)
        return torch.einsum("ok,ik,jk->oji", self.left, (slopes * self.coefficients).sum(-1), self.right)


def coupled(  # noqa: PLR0913 (one keyword per choice of the algorithm)
    jacobians: Tensor,
    values: Tensor,
    inputs: Tensor,
    rank: int,
    *,
    basis: Basis | None = None,
    starts: Sequence[str] = ("algebraic", "cp", "random"),
    initial: Neurons | None = None,
    solver: str = "joint",
    refine: str = "auto",
    weight: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Coupled:
    """Write a function as one layer of `rank` neurons, each with its own activation, from samples of it.

    `min ||J - [[W, V, H]]||^2 / ||J||^2 + weight ||F - W Z^T - b 1^T||^2 / ||F - mean||^2` with
    `H_ik = g_k'(u_ik)`, `Z_ik = g_k(u_ik)`, `u_ik = v_k^T x_i + a_k`: the Jacobians are a CP whose third factor is
    tied to the values by common coefficients. Every start alternates between W, V and the coefficients; since
    the step of V treats H as fixed, it is shortened until the cost falls. The best starts are then refined in all
    parameters at once, and the best of all is kept.

    Use it for a stretch of a network without branches. Where the Jacobians are nearly constant the function is
    linear and an SVD does the same for less.

    Args:
        jacobians: (out, in, samples), any float dtype and device.
        values: (out, samples).
        inputs: (in, samples).
        rank: the number of neurons, at most the number of samples.
        basis: the functions that activations are made of; by default piecewise linear with 7 knots.
        starts: names out of "algebraic" (generalised eigenvalues; only where rank <= in and out), "cp" (CP of the
            Jacobians from its best start), "linear" (SVD of the mean Jacobian) and "random" (CP from one random
            start); a name may occur several times.
        initial: neurons of a network as one more start; if there are more than `rank`, the most important of them.
        solver: "joint" solves for the coefficients of all neurons together, "projection" fits each neuron's to free
            gains and free hidden values.
        refine: "levenberg-marquardt", "gradient" (L-BFGS), "auto" (by the number of parameters) or "none".
        weight: of the values, relative to the Jacobians; None starts with 1 and, before the refinement, balances
            their parts of the cost.
        seed: of the random numbers in the starts.
        dtype: to compute in: torch.float64 or torch.float32.

    Returns:
        The layer in the dtype of `jacobians`, with its diagnostics.

    Raises:
        DecompositionError: rank below 1 or above the number of samples, NaN or Inf entries, sizes that do not
            belong together, an unknown name, no start.

    References:
        Dreesen, Ishteva and Schoukens 2015 (Jacobians as a CP); Zniyed, Usevich, Miron and Brie 2021 (coupled
        factorisation for neural networks).

    Example:
        >>> import torch
        >>> x = torch.randn(4, 80, generator=torch.Generator().manual_seed(0))
        >>> f = coupled(torch.ones(3, 4, 80), torch.ones(3, 4) @ x, x, 1)
        >>> f.rank, f.value_error < 1e-3
        (1, True)
    """
    problem = _problem(jacobians, values, inputs, rank, basis or Basis(), dtype)
    _check_names(starts, initial, solver, refine)
    if weight is not None:
        real("weight", weight, ends="()", error=DecompositionError, why=" (or leave it out)")
    begun = _begun(problem, rank, starts, initial, seed)
    if not begun:
        raise DecompositionError(f'rank {rank} is beyond the "algebraic" start here: add "cp" or "random" to starts')
    runs = {name: _alternate(problem, state, weight or 1.0, solver) for name, state in begun.items()}
    ranked = sorted(runs, key=lambda name: runs[name].cost)
    balance = weight or _balanced(problem, runs[ranked[0]].state)
    refined: dict[str, Refined] = {}
    for name in ranked[: FINALISTS if is_small(runs[ranked[0]].state) else 1]:
        refined[name] = _refined(problem, runs[name].state, balance, solver, refine)
        if refined[name].cost < SOLVED:
            break
    best = min(refined, key=lambda name: refined[name].cost)
    result = _result(problem, refined[best].state, balance, values.mean(1), jacobians.dtype)
    spread = {name: run.cost for name, run in runs.items()}
    return replace(result, start=best, spread=spread, trace=runs[best].trace + refined[best].trace)


def _problem(jacobians: Tensor, values: Tensor, inputs: Tensor, rank: int, basis: Basis, dtype: torch.dtype) -> Problem:
    j = working_copy(jacobians, dtype, order=3, what="jacobians").permute(2, 0, 1).contiguous()
    f = working_copy(values, dtype, order=2, what="values").T.contiguous()
    x = working_copy(inputs, dtype, order=2, what="inputs").T.contiguous()
    samples, out, into = j.shape
    if tuple(f.shape) != (samples, out) or tuple(x.shape) != (samples, into):
        raise DecompositionError(
            f"Jacobians (out, in, samples) = {tuple(jacobians.shape)} need values {(out, samples)} and inputs "
            f"{(into, samples)}, not {tuple(values.shape)} and {tuple(inputs.shape)}"
        )
    check_rank(rank, samples, "rank of a function sampled this often")
    f = f - f.mean(0)
    squares = [float(part.square().sum()) or 1.0 for part in (j, f)]
    return Problem(x, f, j, basis, squares[0], squares[1])


def _check_names(starts: Sequence[str], initial: Neurons | None, solver: str, refine: str) -> None:
    if isinstance(starts, str) or any(name not in STARTS for name in starts) or (not starts and initial is None):
        raise DecompositionError(f"starts is a sequence of names out of {sorted(STARTS)}, not {starts!r}")
    if initial is not None and not isinstance(initial, Neurons):
        raise DecompositionError(f"initial must be Neurons, got {type(initial).__name__}")
    for what, name, table in (("solver", solver, SOLVERS), ("refine", refine, REFINEMENTS)):
        one_of(what, name, table, error=DecompositionError)


def _begun(problem: Problem, rank: int, starts: Sequence[str], initial: Neurons | None, seed: int) -> dict[str, State]:
    """Return the starts by name, "random", "random 2", …; those that do not apply are left out."""
    begun: dict[str, State] = {}
    for count, name in enumerate(starts):
        before = list(starts[:count]).count(name)
        state = STARTS[name](problem, rank, seed + 1000 * before)
        if state is not None:
            begun[f"{name} {before + 1}" if before else name] = state
    if initial is not None:
        begun["initial"] = from_neurons(problem, rank, initial, seed)
    return begun


def _alternate(problem: Problem, state: State, weight: float, solver: str) -> Refined:
    """Sweep until the cost stalls; move the knots to where the gains bend, sweep again, and keep the better run."""
    run = _sweeps(problem, SOLVERS[solver](problem, state, weight), weight, solver)
    if problem.basis.knots == 0:
        return run
    again = _sweeps(problem, _bent(problem, run.state, weight, solver), weight, solver)
    return Refined(again.state, again.cost, run.trace + again.trace) if again.cost < run.cost else run


def _refined(problem: Problem, state: State, weight: float, solver: str, refine: str) -> Refined:
    """Refine, move the knots to where the gains now bend (small steps cannot take one past a sample), refine again."""
    run = REFINEMENTS[refine](problem, state, weight)
    if problem.basis.knots == 0 or refine == "none":
        return run
    for _ in range(REBENDS if is_small(run.state) else 1):
        again = REFINEMENTS[refine](problem, _bent(problem, run.state, weight, solver), weight)
        if not again.cost < (1 - STALL) * run.cost:
            break
        run = Refined(again.state, again.cost, run.trace + again.trace)
    return run


def _bent(problem: Problem, state: State, weight: float, solver: str) -> State:
    """Return the state with its knots where the gains that fit the Jacobians bend."""
    knots = bent_knots(problem.basis, coordinates(problem, state), free_gains(problem, state))
    return SOLVERS[solver](problem, replace(state, shapes=replace(state.shapes, knots=knots)), weight)


def _sweeps(problem: Problem, state: State, weight: float, solver: str) -> Refined:
    best, trace = state, [cost_of(problem, state, weight)]
    for _ in range(MOST_SWEEPS):
        state = _sweep(problem, state, weight, solver)
        cost = cost_of(problem, state, weight)
        if cost < min(trace):
            best = state
        trace.append(cost)
        if not cost < (1 - STALL) * trace[-2]:
            break
    return Refined(best, min(trace), tuple(trace))


def _sweep(problem: Problem, state: State, weight: float, solver: str) -> State:
    """Return the state after one solve for W, one step of V and the solve for the coefficients that follows it."""
    solve = SOLVERS[solver]
    state = solve(problem, left_solved(problem, state, weight), weight)
    cost = cost_of(problem, state, weight)
    target = right_step(problem, state)
    for damping in DAMPINGS:
        right = state.right + damping * (target - state.right)
        moved = solve(problem, normalised(problem, state, right), weight)
        if cost_of(problem, moved, weight) < cost:
            return moved
    return state


def _balanced(problem: Problem, state: State) -> float:
    """Return the weight at which Jacobians and values contribute equally to the cost."""
    jacobian, value = (float(error.clamp_min(1e-15)) for error in squared_errors(problem, state))
    return min(max(jacobian / value, BALANCE[0]), BALANCE[1])


def _result(problem: Problem, state: State, weight: float, mean: Tensor, dtype: torch.dtype) -> Coupled:
    jacobian, value = (math.sqrt(max(float(error), 0.0)) for error in squared_errors(problem, state))
    now = activity(problem, state)
    hidden = values_of(problem.basis, coordinates(problem, state), state.shapes).mean(0)
    bias = mean.to(state.left) - state.left @ (hidden * state.coefficients).sum(-1)
    shapes = state.shapes
    return Coupled(
        left=state.left.to(dtype),
        right=state.right.to(dtype),
        offset=state.offset.to(dtype),
        bias=bias.to(dtype),
        coefficients=state.coefficients.to(dtype),
        basis=problem.basis,
        shapes=Shapes(shapes.knots.to(dtype), shapes.stretch.to(dtype), shapes.shift.to(dtype)),
        cost=jacobian**2 + weight * value**2,
        value_error=value,
        jacobian_error=jacobian,
        weight=weight,
        kruskal=(k_rank(state.left), k_rank(state.right), k_rank(now.gains)),
    )


def k_rank(matrix: Tensor) -> int:
    """Return the largest k such that any k columns are independent; a lower bound where there are too many subsets.

    Example:
        >>> k_rank(torch.eye(3)), k_rank(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
        (3, 1)
    """
    norms = torch.linalg.vector_norm(matrix, dim=0)
    if not bool((norms > 0).all()):
        return 0
    unit = (matrix / norms).double()
    columns = unit.shape[1]
    most = int(torch.linalg.matrix_rank(unit, rtol=1e-8))
    if most == columns:
        return most
    found = 1
    for size in range(2, most + 1):
        if math.comb(columns, size) > SUBSETS:
            break
        subsets = torch.tensor(list(combinations(range(columns), size)))
        stacks = unit.T[subsets.to(unit.device)]  # subsets, size, rows
        if int(torch.linalg.matrix_rank(stacks, rtol=1e-8).min()) < size:
            break
        found = size
    return found
