"""Candidates: what every layer of a model could become, found once, and the plans that budgets select among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rankfold.errors import BudgetError, PlanError
from rankfold.planning._amounts import amount
from rankfold.planning._budget import Budget
from rankfold.planning._choice import Choice
from rankfold.planning._joint import Contest, in_place, items_of
from rankfold.planning._plan import Plan
from rankfold.planning._rules import Choices, Rule, Select
from rankfold.planning._ties import FOLLOWS

KEPT = "dense is the rule's choice within this budget"
ROUNDING = 1 + 1e-9  # of sums of seconds in another order
NAMED = 3  # layers in the way of a budget that an error lists
UNPAID = "no rank of {} costs less than the layer itself"
UNTIMED = "no rank of {} was measured faster than the layer itself"


@dataclass(frozen=True, eq=False)
class Candidates:
    """What every layer could become, from `candidates`: plans for several budgets need no further decomposition.

    Attributes:
        layers: per name of a layer that may change, its choices: dense the first, or one per level of a rule.
        whole: the plan that changes nothing, with the reason of every layer that can't change.
        rule: how one choice per layer is selected.
        methods: the methods that were tried.
        quantities: what a budget must limit.
        blocks: per name of a block, the layers that could replace it.

    Example:
        >>> import torch
        >>> from rankfold.planning import candidates
        >>> found = candidates(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)))
        >>> [found.plan(Budget(params=share)).params <= share * 8320 for share in (0.5, 0.25)]
        [True, True]
    """

    layers: Mapping[str, tuple[Choice, ...]]
    whole: Plan
    rule: Rule
    methods: tuple[str, ...]
    quantities: tuple[str, ...]
    blocks: Mapping[str, Contest] = field(default_factory=dict)

    def plan(self, budget: Budget | None = None) -> Plan:
        """Return the plan that the rule selects within a budget on exactly these quantities.

        Raises:
            BudgetError: the budget can't be met; says the closest value that can.
            PlanError: a budget on other quantities.
        """
        limited = tuple(budget.limits) if budget else ()
        if budget is None and self.rule.needs_budget:
            raise PlanError(f"rule {self.rule.name!r} needs a budget, such as budget=Budget(params=0.5)")
        if set(limited) != set(self.quantities):
            raise PlanError(
                f"these candidates are for a budget on {' and '.join(self.quantities) or 'nothing'}, not on "
                f"{' and '.join(limited) or 'nothing'}: find others with quantities={limited!r}"
            )
        whole = replace(self.whole, budget=budget)
        unpaid = (UNTIMED if "latency" in self.quantities else UNPAID).format(" or ".join(self.methods))
        choices = _explained(self._select(whole), self.layers, unpaid)
        result = replace(whole, layers=in_place(choices, whole.layers, self.blocks))
        if excess(result):  # it is the cheapest that the rule found
            raise budget_error(result, self.rule.name)
        return result

    def _select(self, whole: Plan) -> dict[str, Choice]:
        """Return the rule's choices by name: of layers, and of blocks in place of theirs."""
        items = {name: items_of(name, one, self.layers, whole, self.quantities) for name, one in self.blocks.items()}
        inside = {member for one in self.blocks.values() for member in one.members}
        alone = {name: choices for name, choices in self.layers.items() if name not in inside}
        groups = {**alone, **{name: tuple(item.total for item in some) for name, some in items.items()}}
        dense = {name: whole.layers[name] if name in alone else self.blocks[name].dense for name in groups}
        selected = _selected(self.rule.select, groups, _limits(whole, dense))
        choices = {name: selected[name] for name in alone}
        for name, some in items.items():
            choices |= next(item.parts for item in some if item.total is selected[name])
        return choices

    def slower(self, factor: float) -> Candidates:
        """Return the candidates with the times of all layers, dense or not, multiplied by a factor."""
        layers = {name: tuple(_slower(choice, factor) for choice in choices) for name, choices in self.layers.items()}
        dense = {name: _slower(choice, factor) for name, choice in self.whole.layers.items()}
        return replace(self, layers=layers, whole=replace(self.whole, layers=dense))


def _slower(choice: Choice, factor: float) -> Choice:
    new, old = (
        one if one.latency is None else replace(one, latency=factor * one.latency)
        for one in (choice.amounts, choice.dense)
    )
    return replace(choice, amounts=new, dense=old)


def _limits(whole: Plan, changeable: Mapping[str, Choice]) -> dict[str, float]:
    """Return the limits on the layers that may change: the budget of the whole model less what the rest takes."""
    limits = {}
    for quantity, allowed in _allowed(whole).items():
        own = sum(choice.amounts[quantity] for choice in changeable.values())
        limits[quantity] = allowed - (whole.dense[quantity] - own)
    return limits


def _allowed(whole: Plan) -> dict[str, float]:
    """Return the budget in absolute numbers."""
    limits = whole.budget.limits if whole.budget else {}
    exact = {quantity: fraction * whole.dense[quantity] for quantity, fraction in limits.items()}
    # Plus a millionth: a fraction computed from a whole number must reach that number despite rounding.
    return {quantity: x if quantity == "latency" else int(x + 1e-6) for quantity, x in exact.items()}


def _selected(select: Select, candidates: Choices, limits: Mapping[str, float]) -> dict[str, Choice]:
    returned = select(candidates, limits) if candidates else {}
    if not isinstance(returned, Mapping):
        raise PlanError(f"the rule must return a mapping from names to choices, got {returned!r:.80}")
    choices = dict(returned)
    if choices.keys() != candidates.keys():
        wrong = sorted(choices.keys() ^ candidates.keys())[0]
        raise PlanError(f"the rule must return one choice for each layer that it was given: see {wrong!r}")
    for name, choice in choices.items():
        if not any(choice is one for one in candidates[name]) and choice not in candidates[name]:
            raise PlanError(
                f"the rule must return one of the choices that it was given, got {choice!r:.80} for {name!r}"
            )
    return choices


def _explained(choices: Mapping[str, Choice], candidates: Choices, unpaid: str) -> dict[str, Choice]:
    """Give every layer that stays dense its reason."""
    explained = {}
    for name, choice in choices.items():
        if choice.method == "dense" and name in candidates:
            alone = all(other.method == "dense" for other in candidates[name])
            choice = replace(choice, reason=unpaid if alone else KEPT)
        explained[name] = choice
    return explained


def budget_error(closest: Plan, rule: str) -> BudgetError:
    """Return the error of a budget that can't be met, with the plan of that budget that a rule came closest with."""
    limits = closest.budget.limits if closest.budget else {}
    allowed = _allowed(closest)
    wanted = ", ".join(f"{q}={limits[q]:g} ({amount(q, limit)})" for q, limit in allowed.items())
    reached = ", ".join(_reached(closest, q) for q in allowed)
    return BudgetError(
        f"the budget {wanted} can't be met by the {rule} rule: the closest reachable is {reached}; "
        f"{_obstacles(closest)}raise the budget, add methods or exclude fewer layers",
        closest,
    )


def excess(plan: Plan) -> set[str]:
    """Return the quantities of its budget that a plan exceeds."""
    return {quantity for quantity, limit in _allowed(plan).items() if plan.amounts[quantity] > limit * ROUNDING}


def _obstacles(result: Plan) -> str:
    """Return which layers could not change and why, the largest first."""
    if not result.layers:
        return "the model has no Linear, convolution or Embedding to factorise; "
    followers = {name for name, choice in result.layers.items() if choice.reason.startswith(FOLLOWS)}
    left = {name: c for name, c in result.layers.items() if name not in followers}
    fixed = {name: choice for name, choice in left.items() if choice.reason not in ("", KEPT)}
    largest = sorted(fixed, key=lambda name: -(fixed[name].dense.params or 0))[:NAMED]
    told = "; ".join(f"{name or 'the model'!r} ({fixed[name].reason})" for name in largest)
    return f"{len(fixed)} of {len(left)} layers can't change, the largest {told}; " if fixed else ""


def _reached(result: Plan, quantity: str) -> str:
    value, dense = result.amounts[quantity], result.dense[quantity]
    share, told = value / dense, f"{amount(quantity, value)} of {amount(quantity, dense)}"
    if quantity == "latency" and result.measured:
        share, told = min(1.0, result.measured.kept), f"measured: {result.measured}"  # the dense model is always there
    # Rounded up, so that the value in the message can be reached.
    return f"{quantity}={math.ceil(share * 10_000) / 10_000:.4f} ({told})"
