"""The first half of the road: from a model and a budget to a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.errors import DataError, PlanError
from rankfold.latency import Timing, time_layers
from rankfold.pipeline._damage import measure_damage
from rankfold.pipeline._latency_check import plan_in_time
from rankfold.pipeline._work import Data, Work, check_kinds, work_for_planning
from rankfold.planning import AUTO, CALIBRATED, SQUARES, Budget, Candidates, Plan, Planning, candidates, rule_of
from rankfold.stats import Stats

TRIED = 4  # batches that a calibrated plan tries each layer on


def plan(  # noqa: PLR0913 (twelve at most)
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example: Any = None,
    budget: Budget | None = None,
    planning: Planning | None = None,
    methods: str | Sequence[str] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    stats: Stats | None = None,
    timing: Timing | None = None,
    executor: Executor | None = None,
) -> Plan:
    """Choose method and rank for every layer of a model within a budget; the model is not changed.

    It is the first half of `compress`, which is `plan` and then `compress(model, loader, plan=plan)`. What it needs to
    know of the model it measures by itself: with a loader the inputs of all layers, so that errors are those of outputs
    instead of weights; for a budget on latency the times of the layers, and of the whole model that the plan makes.

    Args:
        model: any module. Layers that can't be replaced are named in the plan with the reason. Where one `nn.Linear`
            has the very weight of one `nn.Embedding`, as in language models, the embedding's choice ("svd") counts for
            both, with the work of both; the head follows it. Other layers with a weight in common stay as they are.
        loader: an iterable of batches, a few hundred typical inputs: tensors, tuples with the inputs first, or mappings
            of keyword arguments. It is read several times; an iterator, which can't be, is kept in memory.
        example: instead of a loader, the arguments of one call, from which only shapes are taken. Besides a loader it
            is what latency is measured on, instead of the loader's first batch.
        budget: fractions of the whole model to keep. Only rule "evbmf" or a function goes without.
        planning: methods, rule, metric, objective and the other options; by default `Planning()`.
        methods: short for `planning` with these methods, which may be mixed: "svd", "tucker", "cp", "tt", ….
        include: short for `planning` with these names or patterns (`*`, `?`) of the only layers to change.
        exclude: short for `planning` with these names or patterns of layers to leave dense.
        stats: what `measure` found before; it is then not measured again. Without it, a loader and an example no MACs
            are predicted, and layers whose weight a parent reads directly can't be told from the others.
        timing: for a budget on latency, runtime, threads and duration of its measurements; by default eager PyTorch as
            it is set, or what the times in `stats` were measured in.
        executor: decompose layers in parallel in this executor's workers; the result is the same.

    Raises:
        BudgetError: the budget can't be met; says the closest value that can.
        PlanError: an unknown layer; statistics of another model, or without what the metric or the budget needs; a rule
            that reads weights with init="random".
        DataError: a budget on latency without anything to run the model on, or unusable data.
        LayerError: a weight holds NaN or Inf.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> found = plan(model, budget=Budget(params=0.5))
        >>> found.params <= 0.5 * found.dense.params
        True
    """
    check_kinds(budget=budget, planning=planning)
    planning = (planning or Planning()).given(methods=methods, include=include, exclude=exclude)
    return planned(model, Data.of(loader, example, planning), budget, stats, timing, executor)[0]


def planned(  # noqa: PLR0913 (the two callers have more)
    model: nn.Module,
    data: Data,
    budget: Budget | None,
    stats: Stats | None,
    timing: Timing | None,
    executor: Executor | None,
) -> tuple[Plan, Work]:
    """Return the plan of a model, and what was measured on the way."""
    rule = rule_of(data.planning.rule)
    if budget is None and rule.needs_budget:
        raise PlanError(f"rule {rule.name!r} needs a budget, such as budget=Budget(params=0.5)")
    limited = tuple(budget.limits) if budget else ()
    work = work_for_planning(model, data, stats, executor, limited)
    return planner(work, limited, timing)(budget), work


def planner(work: Work, quantities: Sequence[str], timing: Timing | None = None) -> Callable[[Budget | None], Plan]:
    """Return a function from a budget on some quantities to a plan; the layers are decomposed once, here.

    The plan of a budget on latency keeps it in the whole model, where there is something to run that on; from times in
    the statistics alone it keeps it in the sum over the layers.
    """
    if "latency" not in quantities:
        return _candidates(work, quantities).plan
    example, stats = work.data.shown(), work.stats
    if stats is not None and stats.times is not None and example is None:
        return _candidates(work, quantities).plan
    if example is None or stats is None:
        raise DataError("a budget on latency is measured on an example: pass example=… or a loader")
    if stats.times is None:
        methods = tuple(work.planning.methods)
        stats = time_layers(work.model, stats, example=example, methods=methods, timing=timing)
    elif timing is None:
        timing = Timing(runtime=stats.times.setting.runtime, threads=stats.times.setting.threads)
    found = _candidates(replace(work, stats=stats), quantities)
    return lambda budget: plan_in_time(work.model, found, budget or Budget(latency=1.0), example=example, timing=timing)


def _candidates(work: Work, quantities: Sequence[str]) -> Candidates:
    """Return what the layers could become; calibrated on the first batches where that is the objective."""
    planning, data = work.planning, work.data
    automatic = planning.objective == AUTO
    calibrated = _tells(work) if automatic else planning.objective == CALIBRATED
    if calibrated and data.loader is None:
        raise PlanError(f"objective {CALIBRATED!r} measures the outputs of the model on data: pass a loader")
    found = candidates(
        work.model,
        quantities=tuple(quantities),
        stats=work.stats,
        planning=replace(planning, objective=SQUARES) if calibrated else planning,
        executor=work.executor,
        blocks=work.blocks,
    )
    made = replace(found.whole.planning or planning, objective=planning.objective)
    found = replace(found, whole=replace(found.whole, planning=made))
    if not calibrated or data.loader is None:
        return found
    limit = TRIED if planning.batches is None else min(TRIED, planning.batches)
    try:
        return measure_damage(found, work.model, data.loader, stats=work.stats, batches=limit)
    except DataError:
        if automatic:  # outputs that can't be compared say nothing of the layers
            return found
        raise


def _tells(work: Work) -> bool:
    """Tell whether there is data to calibrate on, and a rule and a metric that ask for it."""
    planning, stats = work.planning, work.stats
    measured = stats is not None and any(layer.moments is not None for layer in stats.layers.values())
    asked = planning.rule == "optimal" and planning.metric != "weights" and planning.init != "random"
    return work.data.loader is not None and measured and asked
