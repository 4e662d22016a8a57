"""Blocks that compete for a budget with what their layers could become one by one: a group of items for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from rankfold.errors import PlanError
from rankfold.planning._amounts import Amounts
from rankfold.planning._blocks import Blocks, SolvedBlock, block_choice, block_modules, check_apart
from rankfold.planning._choice import Choice
from rankfold.planning._layer import pays
from rankfold.planning._objectives import OBJECTIVES
from rankfold.planning._plan import Plan
from rankfold.planning._rules import Choices, costs_of, damage_of
from rankfold.ranks import undominated
from rankfold.stats import Stats

MOST = 600  # combinations of the layers of a block that are all told apart
STEP = 1.03  # among more, damages that differ by less than this ratio are not
NONE = -1e9  # the step of no damage at all
COMPARED = "outputs"  # the metric whose errors are those of a block's values


@dataclass(frozen=True, eq=False)
class Contest:
    """A block that one layer could replace, against the layers that it would replace.

    Attributes:
        members: names of the block's layers.
        dense: the block as it is: its cost, that of its normalisations and activations included.
        choices: one per solved layer that pays.
        solved: these layers, in the same order.
    """

    members: tuple[str, ...]
    dense: Choice
    choices: tuple[Choice, ...]
    solved: tuple[SolvedBlock, ...]


@dataclass(frozen=True, eq=False)
class Item:
    """One way to treat a block.

    Attributes:
        total: its cost and its damage.
        parts: the choice of the block, or one of each of its layers, by name.
    """

    total: Choice
    parts: Mapping[str, Choice]


def check_blocks(rule: Any, quantities: Sequence[str], metric: str, init: str) -> None:
    """Raise a `PlanError` where blocks can't compete with layers."""
    if rule != "optimal":
        raise PlanError(f"blocks= goes with rule 'optimal', which weighs errors against each other, not with {rule!r}")
    if init == "random":
        raise PlanError("blocks= are layers found from data, and init='random' looks at none: leave one of them out")
    if "latency" in quantities:
        raise PlanError(
            "the time of a flexible layer is not measured: blocks= go with a budget on params, macs or bytes"
        )
    if metric not in (COMPARED, "auto"):
        raise PlanError(
            f"blocks= are compared with layers by errors of outputs, and here errors are of {metric}: plan in metric "
            f"{COMPARED!r}, with stats=measure(model, loader, moments=True)"
        )


def contests(
    model: nn.Module, blocks: Blocks, dense: Mapping[str, Choice], stats: Stats | None, settings: tuple[Any, str]
) -> dict[str, Contest]:
    """Return every block with what could replace it; settings are the quantities budgeted and the objective.

    Raises:
        PlanError: a block is unknown, overlaps with another one, has a layer that is not to be changed, or is given
            anything other than layers solved for it.
    """
    if not isinstance(blocks, Mapping):
        raise PlanError(
            f"blocks= maps names to solved layers, as rankfold.train.flexible_candidates(model, {blocks!r}, loader) "
            "returns them"
        )
    check_apart(model, blocks)
    return {name: _contest(model, name, solved, dense, stats, settings) for name, solved in blocks.items()}


def _contest(  # noqa: PLR0913 (private; one caller)
    model: nn.Module,
    name: str,
    solved: Sequence[SolvedBlock],
    dense: Mapping[str, Choice],
    stats: Stats | None,
    settings: tuple[Any, str],
) -> Contest:
    solved = tuple(solved)
    if not solved or not all(isinstance(one, SolvedBlock) for one in solved):
        raise PlanError(f"block {name!r}: solved layers are needed, as rankfold.train.flexible_candidates returns them")
    modules = block_modules(model, name)
    members = tuple(key for key in dense if key in modules)
    kept = [key for key in members if dense[key].reason in ("excluded", "not included")]
    if kept:
        raise PlanError(
            f"block {name!r}: {kept[0]!r} is {dense[kept[0]].reason}: leave the block out, or let it change"
        )
    quantities, objective = settings
    damage = OBJECTIVES[objective]
    choices = [block_choice(model, name, one, stats) for one in solved]
    if damage is not None:
        choices = [replace(choice, damage=damage(choice.error or 0.0, 1.0)) for choice in choices]
    paying = [k for k, choice in enumerate(choices) if pays(choice, quantities)]
    before = choices[0].dense
    whole = Choice("dense", error=0.0, amounts=before, dense=before)
    return Contest(members, whole, tuple(choices[k] for k in paying), tuple(solved[k] for k in paying))


def items_of(name: str, contest: Contest, candidates: Choices, whole: Plan, quantities: Sequence[str]) -> list[Item]:
    """Return the ways to treat a block: its own choices, and the best combinations of its layers' choices.

    Every combination counts that no other one beats in damage and in all costs. Where there are more than `MOST` of
    them, only the cheapest is kept of those whose damages are within the ratio `STEP`, for each quantity.
    """
    ordered = [_undominated(candidates.get(key, (whole.layers[key],)), quantities) for key in contest.members]
    layers = sum(costs_of([whole.layers[member]], quantities) for member in contest.members)
    costs = costs_of([contest.dense], quantities) - layers  # what is neither: normalisations, activations
    damages, picks = np.zeros(1), np.zeros((1, 0), dtype=np.intp)
    for choices in ordered:
        own_costs, own_damages = costs_of(choices, quantities), _damages(choices)
        costs = (costs[:, None] + own_costs[None]).reshape(-1, len(quantities))
        damages = (damages[:, None] + own_damages[None]).reshape(-1)
        before, own = np.divmod(np.arange(len(damages)), len(choices))
        kept = _thinned(costs, damages)
        costs, damages, picks = costs[kept], damages[kept], np.column_stack([picks[before], own])[kept]
    combined = [
        Item(_total(cost, damage, quantities), dict(zip(contest.members, map(_at, ordered, row), strict=True)))
        for cost, damage, row in zip(costs, damages, picks, strict=True)
    ]
    own_totals = costs_of(contest.choices, quantities) if contest.choices else ()
    alone = [
        Item(_total(cost, damage_of(choice), quantities), {name: choice})
        for cost, choice in zip(own_totals, contest.choices, strict=True)
    ]
    return [*combined, *alone]


def _undominated(choices: Sequence[Choice], quantities: Sequence[str]) -> list[Choice]:
    """Return the choices of a layer that no other one beats: products of fewer are quicker."""
    return [choices[int(k)] for k in undominated(costs_of(choices, quantities), _damages(choices)).positions]


def _damages(choices: Sequence[Choice]) -> np.ndarray:
    return np.array([damage_of(choice) for choice in choices])


def _at(choices: Sequence[Choice], index: Any) -> Choice:
    return choices[int(index)]


def _total(cost: np.ndarray, damage: float, quantities: Sequence[str]) -> Choice:
    amounts: dict[str, Any] = {quantity: round(float(value)) for quantity, value in zip(quantities, cost, strict=True)}
    return Choice("dense", damage=float(damage), amounts=Amounts(**amounts))


def _thinned(costs: np.ndarray, damages: np.ndarray) -> np.ndarray:
    """Return the positions of the combinations that are kept."""
    front = undominated(costs, damages)
    if len(front.positions) <= MOST:
        return front.positions
    some = front.damages > 0
    steps = np.where(some, np.floor(np.log(np.where(some, front.damages, 1.0)) / np.log(STEP)), NONE)
    kept: set[int] = set()
    for column in front.costs.T:
        ordered = np.lexsort((column, steps))
        first = np.flatnonzero(np.diff(steps[ordered], prepend=np.nan) != 0)
        kept |= set(ordered[first].tolist())
    return front.positions[sorted(kept)]


def in_place(
    choices: Mapping[str, Choice], layers: Mapping[str, Choice], blocks: Mapping[str, Contest]
) -> dict[str, Choice]:
    """Return all layers in order with the choices made; a block takes the place of its first layer and of the rest."""
    chosen = {contest.members: name for name, contest in blocks.items() if name in choices}
    first = {members[0]: name for members, name in chosen.items()}
    gone = {member for members in chosen for member in members}
    result: dict[str, Choice] = {}
    for key, choice in layers.items():
        if key in first:
            result[first[key]] = choices[first[key]]
        if key not in gone:
            result[key] = choices.get(key, choice)
    return result
