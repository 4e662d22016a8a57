"""From a model and a budget, or a plan, to a smaller model, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from torch import nn

from rankfold.errors import DataError, PlanError
from rankfold.latency import Timing
from rankfold.pipeline._build import build
from rankfold.pipeline._plan import planned
from rankfold.pipeline._work import Data, check_kinds, work_for_plan
from rankfold.planning import Budget, Plan, Planning
from rankfold.stats import Stats
from rankfold.surgery import with_named_projections


def compress(  # noqa: PLR0913 (twelve at most)
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example: Any = None,
    budget: Budget | None = None,
    plan: Plan | None = None,
    planning: Planning | None = None,
    methods: str | Sequence[str] | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    stats: Stats | None = None,
    timing: Timing | None = None,
    executor: Executor | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a smaller model and the plan it was made by.

    `compress(model, loader, budget=budget)` is `plan(model, loader, budget=budget)` and then
    `compress(model, loader, plan=plan)`, and nothing else. With a loader it does the best it can from the data without
    training: the inputs of all layers are measured, ranks and factors are chosen by the errors of outputs instead of
    weights, the new layers are fitted to the inputs that they get in the smaller model (`recalibrate`), and the
    BatchNorm statistics are measured again where that brings the outputs on the same data nearer to the dense model's.
    `Planning` switches each part off by its name.

    Args:
        model: any module; it is not changed.
        loader: an iterable of batches, a few hundred typical inputs: tensors, tuples with the inputs first, or mappings
            of keyword arguments. It is read several times; an iterator, which can't be, is kept in memory.
        example: instead of a loader, the arguments of one call, from which only shapes are taken. Besides a loader it
            is what latency is measured on, instead of the loader's first batch.
        budget: fractions of the whole model to keep. For a latency, layers are timed (`rankfold.latency.time_layers`),
            and the latency of the whole model is measured at the end (`rankfold.pipeline.plan_in_time`). Only rule
            "evbmf" or a function goes without.
        plan: instead of a budget, a plan that is there: from `plan`, or from JSON, edited perhaps. Its amounts are
            counted again in the plan that is returned.
        planning: methods, rule, metric, objective and the other options; by default `Planning()`. With `plan=` what
            comes after planning alone counts (init, seed, batches, mask, loss, blocks, recalibrate, batchnorm), instead
            of what the plan was made with.
        methods: short for `planning` with these methods, which may be mixed: "svd", "tucker", "cp", "tt", ….
        include: short for `planning` with these names or patterns (`*`, `?`) of the only layers to change.
        exclude: short for `planning` with these names or patterns of layers to leave dense.
        stats: what `measure` found before; it is then not measured again.
        timing: for a budget on latency, runtime, threads and duration of its measurements; by default eager PyTorch as
            it is set, or what the times in `stats` were measured in.
        executor: decompose layers in parallel in this executor's workers; the result is the same.

    Raises:
        BudgetError: the budget can't be met; says the closest value that can.
        PlanError: a plan that doesn't fit the model, or together with options that only make one; see also `plan`.
        DataError: neither loader nor example, or unusable data.
        LayerError: a weight holds NaN or Inf, or the model can't be copied together with its new layers.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> small, found = compress(model, example=torch.ones(1, 64), budget=rankfold.Budget(params=0.5))
        >>> sum(p.numel() for p in small.parameters()) == found.params
        True
    """
    check_kinds(budget=budget, plan=plan, planning=planning)
    if plan is None:
        if loader is None and example is None and stats is None:
            raise DataError("compress needs to see the model run: pass a loader of typical inputs, or example=…")
        planning = (planning or Planning()).given(methods=methods, include=include, exclude=exclude)
        plan, work = planned(model, Data.of(loader, example, planning), budget, stats, timing, executor)
        return build(replace(work, planning=plan.planning or planning), plan), plan
    made = {"budget": budget, "methods": methods, "include": include, "exclude": exclude, "timing": timing}
    given = [name for name, value in made.items() if value is not None]
    if given:
        raise PlanError(f"plan= says already what becomes of every layer: leave {given[0]}= out, or leave plan= out")
    model = with_named_projections(model, plan.layers)
    how = plan.planning if planning is None else planning.after(plan.planning)
    work = work_for_plan(model, Data.of(loader, example, how or Planning()), stats, executor, plan)
    plan = replace(plan.checked(model, work.stats), planning=how)
    return build(work, plan), plan
