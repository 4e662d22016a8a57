"""What the options that several commands share stand for: an input, a search for a plan, a smaller model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import typer
from torch import nn

from rankfold._common import batch_arguments
from rankfold.cli._sources import SourceError, called, example_of, fitting_input
from rankfold.errors import DataError
from rankfold.pipeline import Data, compress, planner
from rankfold.planning import SQUARES, Budget, Plan
from rankfold.planning import plan as make_plan
from rankfold.stats import Stats
from rankfold.stats import measure as measure_model
from rankfold.surgery import apply


def input_of(example: str | None, dtype: str, data: str | None, *, batches: int | None = None) -> dict[str, Any]:
    """Return what a model is measured with, as keyword arguments of `measure`.

    Of a generator so many batches are kept, to be read as often as it takes.
    """
    if (example is None) == (data is None):
        raise SourceError("give one of --example 1,3,224,224 and --data package.module:function")
    if example is not None:
        return {"example": example_of(example, dtype)}
    loader = called(str(data))
    return {"loader": list(islice(loader, batches)) if isinstance(loader, Iterator) and batches else loader}


def one_example(given: dict[str, Any]) -> Any:
    """Return one batch as an example."""
    if "example" in given:
        return given["example"]
    for batch in given["loader"]:
        args, kwargs = batch_arguments(batch)
        return args or kwargs
    raise DataError("the loader is empty: it must yield at least one batch")


def search(  # noqa: PLR0913
    params: float | None,
    macs: float | None,
    bytes_: float | None,
    latency: float | None,
    methods: str,
    rule: str,
    include: list[str] | None,
    exclude: list[str] | None,
    multiple: int,
    metric: str,
) -> dict[str, Any]:
    """Return the options of the planner as keyword arguments of `plan`."""
    limits = {"params": params, "macs": macs, "bytes": bytes_, "latency": latency}
    given = {quantity: share for quantity, share in limits.items() if share is not None}
    if not given and rule != "evbmf":  # which finds ranks without a budget
        raise SourceError("say how much to keep: --params 0.5, --macs 0.5, --bytes 0.5, --latency 0.5 or several")
    return {
        "budget": Budget(**given) if given else None,
        "methods": words(methods),
        "rule": rule,
        "include": tuple(include or ()),
        "exclude": tuple(exclude or ()),
        "multiple": multiple,
        "metric": metric,
    }


def refuse_search(ctx: typer.Context) -> None:
    """Refuse the options of the planner beside a plan that is there."""
    for name in (*inspect.signature(search).parameters, "recalibrate"):
        if was_given(ctx, name):
            raise SourceError(f"--plan already says what becomes of every layer: leave --{name.strip('_')} out")


def was_given(ctx: typer.Context, name: str) -> bool:
    """Tell whether an option was typed."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def planned(
    source: nn.Module, given: Mapping[str, Any], options: Mapping[str, Any], *, batches: int | None, seed: int
) -> Plan:
    """Measure a model and plan it; data are read as a whole where the metric is not of the weights.

    A latency is that of the first batch, and kept in the whole model, as `compress` does.
    """
    moments = options["metric"] != "weights" and options.get("init") != "random"
    budget: Budget | None = options["budget"]
    if budget is None or "latency" not in budget.limits:
        return make_plan(source, stats=measured(source, given, batches=batches, moments=moments), seed=seed, **options)
    data = Data.of(given.get("loader"), given.get("example"), batches, None)
    kept = given if data.loader is None else {"loader": data.loader}
    stats = measured(source, kept, batches=batches, moments=moments)
    words = {name: value for name, value in options.items() if name != "budget"}
    found = planner(
        source, data, tuple(budget.limits), None, stats=stats, objective=SQUARES, seed=seed, executor=None, **words
    )
    return found(budget)


def measured(source: nn.Module, given: Mapping[str, Any], *, batches: int | None, moments: bool) -> Stats:
    """Measure a model on its example, or on its data and with the inputs of the layers if these are wanted."""
    wanted: dict[str, Any] = {"moments": True, "batches": batches} if moments and "loader" in given else {}
    with fitting_input():
        return measure_model(source, **given, **wanted)


def compressed(  # noqa: PLR0913
    source: nn.Module,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    recalibrate: bool,
    batches: int | None,
    seed: int,
) -> tuple[nn.Module, Plan]:
    """Make a model smaller within a budget."""
    with fitting_input():
        return compress(source, **given, **options, recalibrate=recalibrate, batches=batches, seed=seed)


def applied(source: nn.Module, ready: Plan, given: Mapping[str, Any], *, batches: int | None, seed: int) -> nn.Module:
    """Make a model smaller by a plan; one that was made from data needs them again."""
    if ready.metric == "weights":
        return apply(source, ready, seed=seed)
    if "loader" not in given:
        raise SourceError(f"this plan is in the metric {ready.metric!r}: give the data again with --data")
    stats = measured(source, given, batches=batches, moments=True)
    return apply(source, ready, stats=stats, seed=seed)


def words(text: str) -> tuple[str, ...]:
    """Return the words of a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
