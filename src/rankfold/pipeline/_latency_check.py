"""Keep the promise of a latency: time the whole model that a plan makes, and plan again where the sum was wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.errors import BudgetError, PlanError
from rankfold.latency import Timing, steady_clock, time_models
from rankfold.planning import Budget, Candidates, Measured, Plan, budget_error, excess
from rankfold.surgery import apply

TRIES = 4
LATE, EARLY = 1.02, 0.95  # measured over wanted: outside of these a plan is worth another try
TOLERATED = 1.05  # what is kept may be so much above the budget after the last try: measurements scatter
LEAST_FACTOR, LARGEST_FACTOR = 0.05, 4.0
SECONDS = 6.0  # of one comparison of two models


def plan_in_time(
    model: nn.Module, candidates: Candidates, budget: Budget, *, example: Any, timing: Timing | None = None
) -> Plan:
    """Return a plan whose latency was measured to be within the budget.

    The sum over layers is a promise: layers run in other company than alone. The model of the first plan is built with
    random weights and timed next to the dense one. Where it saves more or less than promised, all times of layers are
    scaled by the ratio of the two, or by what lies between two plans on either side, and the plan is made again, three
    times at most. Where the layers can't promise the budget, the plan that comes closest is timed in the same way
    before it is given up. Of the plans that keep the budget the one of least error is returned, with what was promised
    (`latency`) and what was measured (`measured`).

    Args:
        model: the dense model.
        candidates: from `rankfold.planning.candidates`, with "latency" among their quantities.
        budget: fractions of the whole model to keep, latency among them.
        example: the arguments of one call, as the times of the layers were measured with.
        timing: runtime and threads, as the times of the layers were measured in.

    Raises:
        BudgetError: no plan keeps the budget; says the closest latency that was measured.
        PlanError: a budget without latency.
    """
    if budget.latency is None:
        raise PlanError("this plans within a latency: give a budget with one, such as Budget(latency=0.5)")
    timing = timing or Timing()
    tried: list[Plan] = []
    savings: list[tuple[float, float]] = []  # by the times of the layers, and of the whole model
    factor = 1.0
    while len(tried) < TRIES:
        scaled, refused = candidates.slower(factor), None
        try:
            found = scaled.plan(budget)
        except BudgetError as error:
            refused, found = error, _closest(scaled, budget, error.closest)
        if any(_what(found) == _what(plan) for plan in tried):
            break
        if all(choice.method == "dense" for choice in found.layers.values()):
            tried += [] if refused else [found]
            break
        tried.append(replace(found, measured=_measured(model, found, example, timing)))
        share = _kept(tried[-1]) / budget.latency
        if EARLY <= share <= LATE or (refused and share > LATE):
            break
        savings.append((_promised(found) / factor, 1 - _kept(tried[-1])))
        factor = _correction(savings, 1 - budget.latency)
    kept = [plan for plan in tried if _kept(plan) <= min(1.0, TOLERATED * budget.latency)]
    if kept:
        return min(kept, key=lambda plan: -_kept(plan) if plan.error is None else plan.error)
    raise budget_error(min(tried, key=_kept), candidates.rule.name) if tried or not refused else refused


def _closest(candidates: Candidates, budget: Budget, cheapest: Plan | None) -> Plan:
    """Return the best plan within a hair of the least latency that the layers can promise, or else the dense one."""
    if cheapest is None or cheapest.latency is None or excess(cheapest) != {"latency"}:
        return candidates.whole
    share = min(1.0, LATE * cheapest.latency / (cheapest.dense.latency or 1.0))
    return replace(candidates.plan(replace(budget, latency=share)), budget=budget)


def _measured(model: nn.Module, plan: Plan, example: Any, timing: Timing) -> Measured:
    """Time the model of a plan; its speed does not depend on the values of its weights."""
    models = {"dense": model, "small": apply(model, plan, init="random")}
    times = time_models(
        models,
        example,
        runtime=timing.runtime,
        threads=timing.threads,
        seconds=SECONDS,
        clock=steady_clock(model, timing.threads),
    )
    dense, small = times["dense"], times["small"]
    setting = f"{small.runtime}, {small.device}, {small.threads} thread{'s' * (small.threads != 1)}"
    return Measured(1 / small.ratio, dense.median, setting)


def _kept(plan: Plan) -> float:
    return 1.0 if plan.measured is None else plan.measured.kept


def _promised(plan: Plan) -> float:
    """Return the share of the dense time that the layers of a plan promise to save."""
    return 1 - (plan.latency or 0.0) / (plan.dense.latency or 1.0)


def _correction(savings: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return the factor on the times of the layers with which a plan saves as much as it promises.

    The savings promised and measured of the plans so far: between the nearest two on either side of what is wanted the
    truth is taken to be a straight line, and beyond all of them to be proportional to the last.
    """
    promised, true = savings[-1]
    below = max((pair for pair in savings if pair[1] < wanted), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in savings if pair[1] >= wanted), key=lambda pair: pair[1], default=None)
    if below and above and above[0] > below[0]:
        slope = (above[1] - below[1]) / (above[0] - below[0])
        promised, true = below[0] + (wanted - below[1]) / slope, wanted
    return min(max(true / max(promised, 1e-9), LEAST_FACTOR), LARGEST_FACTOR)


def _what(plan: Plan) -> list[Any]:
    """Return what a plan makes of every layer."""
    return [(name, choice.method, choice.rank, dict(choice.options)) for name, choice in plan.layers.items()]
