"""The table of rank rules: how each proposes choices for a layer, and how it selects among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from rankfold._common import one_of
from rankfold.errors import BudgetError, PlanError
from rankfold.planning._choice import Choice
from rankfold.planning._layer import LEVELS, Job, energy_ladder, evbmf_ladder, grid, share
from rankfold.ranks import allocate

# Proven, relative to the sum of squared errors; a hundredth of what the last layer's rank more or less changes.
GAP = 1e-4
RuleName = Literal["optimal", "uniform", "energy", "evbmf"]
Init = Literal["decompose", "random"]
INITS: tuple[Init, ...] = get_args(Init)
Choices = Mapping[str, Sequence[Choice]]
Limits = Mapping[str, float]
Select = Callable[[Choices, Limits], Mapping[str, Choice]]


@dataclass(frozen=True)
class Rule:
    """A rank rule.

    Attributes:
        name: what it is called in an error.
        propose: one layer's job to its candidates.
        select: every layer's candidates and the limits on their sums to one choice per layer. Where
            nothing is within the limits it returns the cheapest, and the planner raises the error.
        needs_budget: whether the rule means anything without limits.
        needs_weights: whether it chooses by the errors or the spectra of the weights.
    """

    name: str
    propose: Callable[[Job], tuple[Choice, ...]]
    select: Select
    needs_budget: bool
    needs_weights: bool


def optimal(candidates: Choices, limits: Limits) -> dict[str, Choice]:
    """Select the choices with the least sum of damages, a multiple-choice knapsack, up to GAP.

    The damage of a choice is its squared relative error where the objective is no other.
    """
    quantities = list(limits)
    costs = [costs_of(choices, quantities) for choices in candidates.values()]
    damages = [np.array([damage_of(choice) for choice in choices]) for choices in candidates.values()]
    try:
        indices = allocate(costs, damages, [float(limits[q]) for q in quantities], gap=GAP).indices
    except BudgetError:
        scale = _units(np.array([limits[q] for q in quantities]))
        indices = tuple(int((cost / scale).sum(axis=1).argmin()) for cost in costs)
    return {name: choices[k] for (name, choices), k in zip(candidates.items(), indices, strict=True)}


def damage_of(choice: Choice) -> float:
    """Return what a choice adds to the sum that is made small: its squared error where nothing else is known."""
    return (choice.error or 0.0) ** 2 if choice.damage is None else choice.damage


def uniform(candidates: Choices, limits: Limits) -> dict[str, Choice]:
    """Select in every layer the best choice within the same share of its dense cost, as large as the limits allow."""
    shares = np.arange(LEVELS, -1, -1) / LEVELS
    return same_level({name: _within(choices, shares, limits) for name, choices in candidates.items()}, limits)


def _within(choices: Sequence[Choice], shares: np.ndarray, limits: Limits) -> list[Choice]:
    """Return, per share, the choice of least error (then least cost) within it; the cheapest where none is.

    Where no weight was read there are no errors, and the candidates come in the order of preference.
    """
    known = all(choice.error is not None for choice in choices)
    ordered = sorted(choices, key=lambda choice: (choice.error, share(choice, list(limits)))) if known else choices
    kept = np.array([share(choice, list(limits)) for choice in ordered])
    fits = kept[None, :] <= shares[:, None]
    return [ordered[k] for k in np.where(fits.any(axis=1), fits.argmax(axis=1), kept.argmin())]


def same_level(candidates: Choices, limits: Limits) -> dict[str, Choice]:
    """Select the first level, the same in every layer, whose sums are within the limits; else the cheapest."""
    quantities = list(limits)
    allowed = np.array([limits[q] for q in quantities])
    totals = sum((costs_of(choices, quantities) for choices in candidates.values()), start=np.zeros((1, 1)))
    fits = (totals <= allowed).all(axis=1)
    level = int(fits.argmax()) if fits.any() else int((totals / _units(allowed)).sum(axis=1).argmin())
    return {name: choices[level] for name, choices in candidates.items()}


def _units(limits: np.ndarray) -> np.ndarray:
    """Return what to count each quantity in: its limit, where there is one to compare with."""
    return np.where(limits > 0, limits, 1)


def costs_of(choices: Sequence[Choice], quantities: Sequence[str]) -> np.ndarray:
    """Return the budgeted quantities of choices, one row per choice."""
    return np.array([[choice.amounts[q] for q in quantities] for choice in choices], dtype=np.float64)


RULES: Mapping[str, Rule] = {
    "optimal": Rule("optimal", grid, optimal, needs_budget=True, needs_weights=True),
    "uniform": Rule("uniform", grid, uniform, needs_budget=True, needs_weights=False),
    "energy": Rule("energy", energy_ladder, same_level, needs_budget=True, needs_weights=True),
    "evbmf": Rule("evbmf", evbmf_ladder, same_level, needs_budget=False, needs_weights=True),
}


def rule_of(rule: str | Select) -> Rule:
    """Return the row of a named rule, or one around a function.

    Raises:
        PlanError: no rule of this name.
    """
    if callable(rule):
        return Rule("given", grid, rule, needs_budget=False, needs_weights=False)
    return RULES[one_of("rule", rule, RULES, other="a function", error=PlanError)]
