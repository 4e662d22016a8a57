"""One choice per group at least total damage within limits on cost: the multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from rankfold.errors import BudgetError

Floats = NDArray[np.float64]
ROUNDS = 200  # maximum number of linear programs for the dual
SETTLED = 1e-8  # share of the bound below which the dual has nothing more to gain
TIED = 1e-9  # by how much of a group's highest price equal prices may differ
DEPTH = 2  # groups that are pinned one after the other
STRICT = 1e4  # the solver's absolute tolerance of 1e-6 becomes 1e-10 of a limit
ROOM = 1 + 1e-12  # for rounding in a sum of costs


@dataclass(frozen=True)
class Allocation:
    """A choice for every group.

    Attributes:
        indices: the chosen item of each group.
        damage: sum of their damages.
        cost: sum of their costs, one entry per limit.
        gap: proven bound on how far the damage is above the least possible, relative to the damage.
        optimal: whether the gap is within what was asked for.
    """

    indices: tuple[int, ...]
    damage: float
    cost: tuple[float, ...]
    gap: float
    optimal: bool


@dataclass(frozen=True, eq=False)
class _Group:
    """The items of a group that can be in a best choice; costs (items, limits) are in units of the limit."""

    positions: NDArray[np.intp]
    costs: Floats
    damages: Floats


def allocate(
    costs: Sequence[NDArray[np.number]],
    damages: Sequence[NDArray[np.number]],
    limits: int | float | Sequence[float] | NDArray[np.number],
    *,
    gap: float = 1e-4,
    nodes: int = 10_000,
) -> Allocation:
    """Choose one item per group: least sum of damages within one or several limits on the sums of costs.

    `min sum_g d_g[i_g]` subject to `sum_g c_g[i_g, k] <= limit_k`. Items that are beaten in every respect by another
    one of their group are dropped; the Lagrangian dual bounds the damage from below and gives a first choice; a
    mixed-integer program closes the gap between them.

    Args:
        costs: per group (items,) for one limit, (items, limits) for several; not negative.
        damages: per group (items,), not negative.
        limits: one number, or one per column of the costs.
        gap: relative gap at which the search may end; 1e-9 finds the optimum.
        nodes: size of the search tree at which the search ends with the best choice found and its proven gap: a
            limit that, unlike one on time, gives the same result on every machine.

    Returns:
        The chosen indices with their damage, costs and proven gap.

    Raises:
        BudgetError: even the cheapest items exceed a limit (the message gives the closest cost), an empty
            group, or arrays that do not fit together.

    Reference:
        Sinha and Zoltners 1979 (multiple-choice knapsack, dominance); Everett 1963 (Lagrangian bound).

    Example:
        >>> import numpy as np
        >>> cost, damage = np.array([1, 2, 3]), np.array([9.0, 4.0, 0.0])
        >>> allocate([cost, cost], [damage, damage / 10], 5).indices
        (2, 1)
    """
    bounds = np.atleast_1d(np.asarray(limits, dtype=np.float64))
    groups = _groups(costs, damages, bounds)
    multipliers, bound = _dual(groups)
    choice = _rounded(groups, multipliers)
    found = math.inf if choice is None else _damage(groups, choice)
    if found - bound > gap * max(found, 1e-300):
        better, proven = _program(groups, multipliers, found, gap, nodes)
        if better is not None and _damage(groups, better) < found:
            choice, found = better, _damage(groups, better)
        bound = max(bound, proven)
    if choice is None:
        raise BudgetError(f"no choice within the limits {bounds.tolist()} was found: raise one of them")
    rest = max(0.0, (found - bound) / found) if found > 0 else 0.0
    indices = tuple(int(group.positions[i]) for group, i in zip(groups, choice, strict=True))
    used = np.sum([np.atleast_1d(cost[i]) for cost, i in zip(costs, indices, strict=True)], axis=0)
    return Allocation(indices, found, tuple(float(x) for x in used), rest, rest <= gap)


def _in_units(costs: Floats, bounds: Floats) -> Floats:
    """Return costs divided by the limits; where a limit is zero any cost is twice too much."""
    return np.where(bounds > 0, costs / np.where(bounds > 0, bounds, 1.0), 2.0 * (costs > 0))


def _groups(costs: Sequence[NDArray[np.number]], damages: Sequence[NDArray[np.number]], bounds: Floats) -> list[_Group]:
    if len(costs) != len(damages) or not len(costs):
        raise BudgetError(f"one array of costs and one of damages per group: {len(costs)} and {len(damages)} given")
    if not np.isfinite(bounds).all() or (bounds < 0).any():
        raise BudgetError(f"limits are finite and not negative: {bounds.tolist()}")
    groups, tables = [], []
    for g, (cost, damage) in enumerate(zip(costs, damages, strict=True)):
        table = np.asarray(cost, dtype=np.float64)
        table = table[:, None] if table.ndim == 1 else table
        harm = np.asarray(damage, dtype=np.float64)
        if harm.ndim != 1 or len(harm) == 0 or table.shape != (len(harm), len(bounds)):
            raise BudgetError(f"group {g}: costs {table.shape} and damages {harm.shape} for {len(bounds)} limits")
        if not (np.isfinite(table).all() and np.isfinite(harm).all() and (table >= 0).all() and (harm >= 0).all()):
            raise BudgetError(f"group {g}: costs and damages are finite and not negative")
        tables.append(table)
        groups.append(undominated(_in_units(table, bounds), harm))
    _check_feasible(tables, bounds)
    return groups


def undominated(costs: Floats, damages: Floats) -> _Group:
    """Drop every item that another one matches or beats in damage and in all costs."""
    order = np.lexsort((*costs.T[::-1], damages))
    if costs.shape[1] == 1:
        ahead = np.append(math.inf, np.minimum.accumulate(costs[order, 0])[:-1])
        order = order[costs[order, 0] < ahead]
        return _Group(order, costs[order], damages[order])
    kept: list[int] = []
    front, size = np.empty_like(costs), 0
    for i in order:  # ascending damage: an item is dominated by an earlier one that costs no more
        if not (front[:size] <= costs[i]).all(axis=1).any():
            kept.append(int(i))
            front[size], size = costs[i], size + 1
    positions = np.array(kept, dtype=np.intp)
    return _Group(positions, costs[positions], damages[positions])


def _check_feasible(tables: list[Floats], bounds: Floats) -> None:
    """Raise where the cheapest items exceed a limit, each limit by itself."""
    least = np.sum([table.min(axis=0) for table in tables], axis=0)
    for k, (cheapest, limit) in enumerate(zip(least, bounds, strict=True)):
        if cheapest > limit * ROOM:
            raise BudgetError(
                f"limit {k} is {limit:g}, but the cheapest choices cost {cheapest:g}: that is the closest"
            )


def _damage(groups: list[_Group], choice: Sequence[int]) -> float:
    return math.fsum(group.damages[i] for group, i in zip(groups, choice, strict=True))


def _relaxed(groups: list[_Group], multipliers: Floats) -> tuple[list[int], Floats, float]:
    """Return the best choice with costs priced in, its total costs, and the lower bound that it proves."""
    choice = [int(np.argmin(group.damages + group.costs @ multipliers)) for group in groups]
    cost = _total(groups, choice)
    return choice, cost, _damage(groups, choice) + float(multipliers @ (cost - 1))


def _dual(groups: list[_Group]) -> tuple[Floats, float]:
    """Return the multipliers of the linear relaxation, which maximise the Lagrangian bound, and that bound.

    Column generation (Dantzig and Wolfe 1960): a linear program over few items of each group prices the costs, the
    items that are best at these prices join, until none is new. Few ever matter: those on the hull near the optimum.
    """
    columns = [_seeds(group) for group in groups]
    best, bound = np.zeros(groups[0].costs.shape[1]), -math.inf
    for _ in range(ROUNDS):
        solved = _linear_program([_only(group, sorted(kept)) for group, kept in zip(groups, columns, strict=True)])
        if solved is None:  # too few items for all limits at once
            columns = [set(range(len(group.damages))) for group in groups]
            solved = _linear_program(groups)
        multipliers, value = solved or (best, -math.inf)
        choice, _, proven = _relaxed(groups, multipliers)
        if proven > bound:
            best, bound = multipliers, proven
        fresh = [i for i, kept in zip(choice, columns, strict=True) if i not in kept]
        if not fresh or value - bound <= SETTLED * abs(value):
            break
        for i, kept in zip(choice, columns, strict=True):
            kept.add(i)
    return best, bound


def _seeds(group: _Group) -> set[int]:
    """Return the items of least damage, of least cost for each limit, and of least cost for all together."""
    costs = group.costs
    return {int(i) for i in (group.damages.argmin(), *costs.argmin(axis=0), costs.sum(axis=1).argmin())}


def _only(group: _Group, kept: Sequence[int] | NDArray[np.intp]) -> _Group:
    """Return a group of some items; their positions are those in the group."""
    positions = np.asarray(kept, dtype=np.intp)
    return _Group(positions, group.costs[positions], group.damages[positions])


def _linear_program(groups: list[_Group]) -> tuple[Floats, float] | None:
    """Return the multipliers and the value of the linear relaxation; None where it has no solution."""
    harm, table, one_each, unit = _rows(groups)
    limits = np.ones(table.shape[1])
    result = linprog(
        harm / unit, A_ub=csr_matrix(table.T), b_ub=limits, A_eq=one_each, b_eq=np.ones(len(groups)), bounds=(0, None)
    )
    return None if result.x is None else (np.maximum(-result.ineqlin.marginals, 0) * unit, result.fun * unit)


def _rows(groups: list[_Group]) -> tuple[Floats, Floats, csr_matrix, float]:
    """Return damages and costs of all items, the matrix that adds up the items of each group, and a unit of damage."""
    owner = np.repeat(np.arange(len(groups)), [len(group.damages) for group in groups])
    one_each = csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(groups), len(owner)))
    harm = np.concatenate([group.damages for group in groups])
    return harm, np.concatenate([group.costs for group in groups]), one_each, max(float(harm.max()), 1e-300)


def _total(groups: list[_Group], choice: Sequence[int]) -> Floats:
    return np.asarray(np.sum([group.costs[i] for group, i in zip(groups, choice, strict=True)], axis=0))


def _rounded(groups: list[_Group], multipliers: Floats, depth: int = DEPTH) -> list[int] | None:
    """Return a choice within the limits near the linear relaxation, with a damage close to it where steps are small.

    Next to the relaxed choice, repaired, the group that the relaxation splits between the most distant items is
    pinned to either of them, and the other groups are relaxed and rounded again around it.
    """
    best = _repair(groups, _relaxed(groups, multipliers)[0])
    ends = [_ends(group, multipliers) for group in groups]
    jumps = [float(np.ptp(group.costs[list(pair)], axis=0).max()) for group, pair in zip(groups, ends, strict=True)]
    split = int(np.argmax(jumps))
    for item in ends[split] if depth and jumps[split] > 0 else ():
        pinned = [_only(group, [item]) if g == split else group for g, group in enumerate(groups)]
        around, bound = _dual(pinned)
        if best is not None and bound >= _damage(groups, best):
            continue
        choice = _rounded(pinned, around, depth - 1)
        choice = choice and [item if g == split else i for g, i in enumerate(choice)]
        if choice and (best is None or _damage(groups, choice) < _damage(groups, best)):
            best = choice
    return best


def _ends(group: _Group, multipliers: Floats) -> tuple[int, int]:
    """Return the cheapest and the most expensive of the items with the least price."""
    price = group.damages + group.costs @ multipliers
    tied = np.flatnonzero(price <= price.min() + TIED * price.max())
    costs = group.costs[tied].sum(axis=1)
    return int(tied[costs.argmin()]), int(tied[costs.argmax()])


def _repair(groups: list[_Group], choice: list[int]) -> list[int] | None:
    """Return a choice within the limits near the given one: give up least damage per cost, then spend what is left."""
    choice = list(choice)
    for down in (True, False):
        while (cost := _total(groups, choice)).max() > ROOM or not down:
            step = _best_step(groups, choice, cost, down=down)
            if step is None and down:
                return None
            if step is None:
                break
            choice[step[0]] = step[1]
    return choice


def _best_step(groups: list[_Group], choice: list[int], cost: Floats, *, down: bool) -> tuple[int, int] | None:
    """Return (group, item): the cheapest way towards the limits, or the most damage undone within them."""
    best, step = math.inf, None
    for g, group in enumerate(groups):
        change = group.costs - group.costs[choice[g]]
        harm = group.damages - group.damages[choice[g]]
        over = np.maximum(cost - 1, 0)
        if down:
            relief = np.minimum(-change, over).clip(min=0).sum(axis=1) - np.maximum(cost + change - 1 - over, 0).sum(
                axis=1
            )
            score = np.where(relief > 1e-15, np.maximum(harm, 0) / np.maximum(relief, 1e-300), math.inf)
        else:
            fits = (cost + change <= ROOM).all(axis=1) & (harm < 0)
            score = np.where(fits, harm, math.inf)
        i = int(score.argmin())
        if score[i] < best:
            best, step = float(score[i]), (g, i)
    return step


def _program(
    groups: list[_Group], multipliers: Floats, found: float, gap: float, nodes: int
) -> tuple[list[int] | None, float]:
    """Return the choice of the mixed-integer program and the lower bound it proved, in units of damage.

    Items whose reduced price alone lifts the bound above a known choice cannot be part of a better one.
    """
    bound = _relaxed(groups, multipliers)[2]
    fewer = []
    for group in groups:
        price = group.damages + group.costs @ multipliers
        fewer.append(_only(group, np.flatnonzero(bound + price - price.min() <= found * (1 + 1e-9))))
    harm, table, one_each, unit = _rows(fewer)
    result = milp(
        harm / unit,
        integrality=np.ones(len(harm)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_matrix(table.T * STRICT), -np.inf, STRICT),
        ],
        options={"mip_rel_gap": gap / 2, "node_limit": nodes},
    )
    proven = result.mip_dual_bound * unit if result.get("mip_dual_bound") is not None else -math.inf
    if result.x is None:
        return None, proven
    ends = np.cumsum([0, *(len(group.damages) for group in fewer)])
    choice = [
        int(group.positions[result.x[a:b].argmax()]) for group, a, b in zip(fewer, ends[:-1], ends[1:], strict=True)
    ]
    return _repair(groups, choice), proven  # the solver's own tolerance on a limit is coarser than ours
