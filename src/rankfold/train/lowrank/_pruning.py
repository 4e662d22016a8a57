"""From the ranks found in training to a plan, and to a model of plain low-rank layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.errors import RankfoldError
from rankfold.layers import Options, layer_class, stock_twin
from rankfold.planning import RULES, Amounts, Budget, Choice, Plan, Planning, candidates, layer_refusal
from rankfold.stats import Stats, count_params, measure, walk

NO_SAVING = "its rank of {} saves nothing"


def plan_of_ranks(model: nn.Module, ranks: Mapping[str, tuple[int, Options]], stats: Stats | None = None) -> Plan:
    """Return a plan of plain low-rank layers with these ranks and options.

    A layer stays dense if at its rank it would have more parameters or more MACs (if there are `stats`), or no fewer
    of either.
    """
    choices = {}
    for name, layer in walk(model):
        dense = _dense_choice(name, layer, stats)
        reason = layer_refusal(name, layer) if name in ranks else "not trained for low rank"
        choices[name] = replace(dense, reason=reason) if reason else _low_rank(name, layer, dense, *ranks[name], stats)
    return Plan(choices, dense=Amounts(count_params(model), stats.macs if stats else None))


def plan_of_budget(model: nn.Module, options: Mapping[str, Options], budget: Budget, example: Any) -> Plan:
    """Return the plan of least error within a budget, for layers with these options.

    Raises:
        RankfoldError: a budget on MACs needs an example, and there is none.
        BudgetError: the budget cannot be met even at rank 1.
    """
    if budget.macs is not None and example is None:
        raise RankfoldError("prune(budget=Budget(macs=…)) needs example=: MACs depend on the input")

    def select(candidates: Mapping[str, Sequence[Choice]], limits: Mapping[str, float]) -> Mapping[str, Choice]:
        same_split = {
            name: [choice for choice in choices if choice.method == "dense" or choice.options == options[name]]
            for name, choices in candidates.items()
        }
        return RULES["optimal"].select(same_split, limits)

    stats = None if example is None else measure(model, example=example)
    planning = Planning(methods="svd", rule=select, include=tuple(options))
    found = candidates(model, quantities=tuple(budget.limits), stats=stats, planning=planning)
    return found.plan(budget)


def stats_of(model: nn.Module, example: Any) -> Stats | None:
    """Return the statistics of a model on an example; None without one."""
    return None if example is None else measure(model, example=example)


def _dense_choice(name: str, layer: nn.Module, stats: Stats | None) -> Choice:
    amounts = Amounts(count_params(layer), stats.layers[name].macs if stats else None)
    return Choice("dense", amounts=amounts, dense=amounts, error=0.0)


def _low_rank(name: str, layer: nn.Module, dense: Choice, rank: int, options: Options, stats: Stats | None) -> Choice:
    """Return the choice of this rank, or dense with the reason."""
    twin = stock_twin(layer)
    cls = layer_class(twin, "svd")
    cost = cls.cost(twin, stats.layers[name].calls if stats else (), rank=rank, **options)
    macs = cost.macs // stats.batch_size if stats else None
    params_saved, macs_saved = (dense.params or 0) - cost.params, (dense.macs or 0) - (macs or 0)
    saved = (params_saved, *([] if stats is None else [macs_saved]))
    if min(saved) < 0 or max(saved) == 0:
        return replace(dense, reason=NO_SAVING.format(rank))
    (error,) = cls.errors(twin, [rank], **options)
    return replace(dense, method="svd", rank=rank, options=options, amounts=Amounts(cost.params, macs), error=error)
