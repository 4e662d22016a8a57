"""Find a plan: candidates per layer, then one choice per layer within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from rankfold.errors import PlanError
from rankfold.layers import BLOCKS, Metric, methods_for, refusal, stock_twin, tied_methods
from rankfold.planning._blocks import Blocks
from rankfold.planning._budget import QUANTITIES, Budget
from rankfold.planning._candidates import Job, layer_seed, run
from rankfold.planning._joint import check_blocks, contests
from rankfold.planning._metrics import AUTO, WEIGHTS, check_stats, metric_name, signal
from rankfold.planning._names import selected
from rankfold.planning._objectives import CALIBRATED, OBJECTIVES, SQUARES, WEIGHED
from rankfold.planning._plan import Choice, Plan, methods
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import INITS, RULES, Init, Rule, Select, rule_of
from rankfold.planning._select import Candidates
from rankfold.planning._ties import as_one, metric_of, tied_heads, times_of, with_partners
from rankfold.stats import Stats, count_bytes, count_params, walk


@dataclass(frozen=True)
class _Request:
    """How to look for candidates, once checked."""

    methods: tuple[str, ...]
    quantities: tuple[str, ...]
    multiple: int
    seed: int
    weightless: bool
    metric: str
    objective: str


def plan(  # noqa: PLR0913
    model: nn.Module,
    *,
    budget: Budget | None = None,
    stats: Stats | None = None,
    methods: str | Sequence[str] = ("svd", "tucker"),
    rule: str | Select = "optimal",
    init: Init = "decompose",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    multiple: int = 1,
    seed: int = 0,
    executor: Executor | None = None,
    metric: str = AUTO,
    objective: str = SQUARES,
    blocks: Blocks | None = None,
) -> Plan:
    """Choose method and rank for every layer of a model within a budget; the model is not changed.

    Rule "optimal" minimises sum_l e_l^2 over one choice per layer l, e_l the relative error of its outputs
    (with statistics of data) or of its weight, subject to the budget on the whole model, to a proven gap of at
    most 1e-4 of the sum; leaving a layer dense is always a choice. A choice must make a budgeted quantity of its
    layer smaller and no measured one larger. The sum is a proxy: it takes layers as independent.

    Args:
        model: any module. Layers that can't be replaced are named in the plan with the reason. Where one `nn.Linear`
            has the very weight of one `nn.Embedding`, as in language models, the embedding's choice ("svd") stands for
            both, with the work of both; the head follows it. Other layers with a weight in common stay as they are.
        budget: fractions of the whole model to keep. Only rule "evbmf" or a function goes without.
        stats: from `measure`; needed for a budget on MACs. Without it no MACs are predicted, and layers
            whose weight a parent reads directly can't be told from the others. With moments=True it also says
            what the inputs of the layers are like, and from `rankfold.latency.time_layers` how long they take: needed
            for a budget on latency.
        methods: which methods may be mixed: "svd", "cp", "tucker", "tt".
        rule: "optimal"; "uniform", the same share of cost in every layer; "energy", the same share of the
            squared singular values in every layer, in another metric than the weights the same error; "evbmf", the
            ranks of empirical variational Bayes on the weights, weakened by one factor to meet the budget; or a
            function of the candidates per layer name (dense the first) and of the limits on their sums, that
            returns a choice per name.
        init: what the plan is for, as in `apply`: to "decompose" the weights, or to train from scratch. With
            "random" no weight is read, whatever its values or its device, and no error is predicted: only rule
            "uniform" or a function goes with it. "uniform" then takes, within a share, the first of `methods` that
            has a rank, and of it the largest share of the full rank. It is implied for a model on the meta device.
        include: names or patterns (`*`, `?`) of the only layers to change; all of them if empty.
        exclude: names or patterns of layers to leave dense. As in `include`, naming an embedding or the head that is
            tied to it names both.
        multiple: round ranks to multiples of this.
        seed: seed of whatever is random in a decomposition.
        executor: decompose layers in parallel in this executor's workers; the result is the same.
        metric: what errors are measured in, by `apply` too: "weights"; "outputs", the outputs on the data (centred
            where there is a bias, which takes up the mean); "fisher", the outputs weighted by the gradients of a loss;
            or as published: "fwsvd" (weights, rows by gradients), "asvd" (inputs scaled each alone by
            (E x^2)^(1/4), the square root of their size), "whitening" (second moment of the inputs, no bias, as
            SVD-LLM); "auto": "outputs" where stats has moments, else "weights". A layer whose inputs are not in the
            statistics, an embedding say, is planned on its weight, and its choice says so. Of an embedding with a tied
            head it is the mean of the squared errors of the head's outputs and of the weight.
        objective: the sum over layers that "optimal" makes small: "squares" of the errors; "energy", of
            -log(1 - e^2); "loss", of what e^2 may change the loss by; "tempered", of e^2 times the root of what it
            would change the loss by, for data that are unlike those in use (these two need metric="fisher").
        blocks: solved layers that could each stand for several layers in a row, by the name of the block
            "first:last", from `rankfold.train.flexible_candidates`: each competes with all that the block's layers
            could become one by one. Rule "optimal" and metric "outputs" alone compare them: the sum takes every
            relative error of a layer's outputs to reach the outputs of the model unchanged, so that the error of a
            block's values is one term of it, in the place of the terms of all its layers. `apply` needs the same
            blocks.

    Raises:
        BudgetError: the budget can't be met; says the closest value that can.
        PlanError: an unknown method, rule, metric, objective or name; statistics of another model, or without
            what the metric needs; a rule that reads weights with init="random".
        LayerError: a weight holds NaN or Inf.

    References:
        Kim et al. 2016 (EVBMF ranks); Gusak et al. 2019 (MUSCO, weakened ranks); Zhang et al. 2015 (energies);
        Hsu et al. 2022 (FWSVD); Yuan et al. 2023 (ASVD); Wang et al. 2024 (SVD-LLM).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> found = plan(model, budget=Budget(params=0.5))
        >>> found.params <= 0.5 * found.dense_params
        True
    """
    if budget is None and rule_of(rule).needs_budget:
        raise PlanError(f"rule {rule!r} needs a budget, such as budget=Budget(params=0.5)")
    found = candidates(
        model,
        quantities=tuple(budget.limits) if budget else (),
        stats=stats,
        methods=methods,
        rule=rule,
        init=init,
        include=include,
        exclude=exclude,
        multiple=multiple,
        seed=seed,
        executor=executor,
        metric=metric,
        objective=objective,
        blocks=blocks,
    )
    return found.plan(budget)


def candidates(  # noqa: PLR0913
    model: nn.Module,
    *,
    quantities: str | Sequence[str] = ("params",),
    stats: Stats | None = None,
    methods: str | Sequence[str] = ("svd", "tucker"),
    rule: str | Select = "optimal",
    init: Init = "decompose",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    multiple: int = 1,
    seed: int = 0,
    executor: Executor | None = None,
    metric: str = AUTO,
    objective: str = SQUARES,
    blocks: Blocks | None = None,
) -> Candidates:
    """Return what every layer of a model could become, with cost and error: `.plan(budget)` then is quick.

    Args:
        model: as in `plan`.
        quantities: what the budgets will limit: "params", "macs" or both.
        stats: as in `plan`.
        methods: as in `plan`.
        rule: as in `plan`.
        init: as in `plan`.
        include: as in `plan`.
        exclude: as in `plan`.
        multiple: as in `plan`.
        seed: as in `plan`.
        executor: as in `plan`.
        metric: as in `plan`.
        objective: as in `plan`.
        blocks: as in `plan`.

    Raises:
        PlanError: as `plan` does.
        LayerError: a weight holds NaN or Inf.
    """
    chosen = rule_of(rule)
    limited = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    weightless = _weightless(model, rule, chosen, init)
    metric = _metric(metric, stats, weightless=weightless)
    request = _Request(_methods(methods), limited, multiple, seed, weightless, metric, objective)
    _check(request, stats)
    if blocks:
        check_blocks(rule, limited, metric, init)
    layers = dict(walk(model))
    check_stats(layers, stats)
    ties = tied_heads(model)
    dense = _dense_choices(model, layers, ties, stats, request, (include, exclude))
    jobs = [_job(name, layers, ties, choice, stats, request) for name, choice in dense.items() if not choice.reason]
    proposed = run(chosen.propose, jobs, executor=executor, description="Decomposing layers")
    found = {job.name: _weighed(job, choices, request) for job, choices in zip(jobs, proposed, strict=True)}
    whole = Plan(
        dense,
        None,
        count_params(model),
        stats.macs if stats else None,
        metric=request.metric,
        objective=objective,
        dense_bytes=count_bytes(model),
        dense_latency=stats.times.whole if stats and stats.times else None,
    )
    contested = contests(model, blocks or {}, dense, stats, (limited, objective))
    return Candidates(found, whole, chosen, request.methods, limited, contested)


def _weightless(model: nn.Module, name: str | Select, rule: Rule, init: Init) -> bool:
    """Tell whether no weight is to be read; raise where the rule must."""
    if init not in INITS:
        raise PlanError(f"init={init!r} is neither 'decompose' nor 'random'")
    if init == "random" and rule.needs_weights:
        others = ", ".join(repr(other) for other, row in RULES.items() if not row.needs_weights)
        raise PlanError(f"rule {name!r} reads the weights, and init='random' reads none: use rule {others}")
    return init == "random" or (not rule.needs_weights and all(p.is_meta for p in model.parameters()))


def _metric(metric: str, stats: Stats | None, *, weightless: bool) -> str:
    if weightless and metric in (AUTO, WEIGHTS):
        return WEIGHTS
    if weightless:
        raise PlanError(f"metric {metric!r} measures errors, and there are none where no weight is read: leave it out")
    return metric_name(metric, stats)


def _methods(names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    known = sorted(methods() - {"dense", *(method for _, method in BLOCKS)})  # a block has no layer of its own to plan
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise PlanError(f"unknown method {unknown[0] if unknown else names!r}: the methods are {', '.join(known)}")
    return names


def _check(request: _Request, stats: Stats | None) -> None:
    if type(request.multiple) is not int or request.multiple < 1:
        raise PlanError(f"multiple={request.multiple!r} is not a whole number >= 1")
    unknown = [quantity for quantity in request.quantities if quantity not in QUANTITIES]
    if unknown:
        raise PlanError(f"unknown quantity {unknown[0]!r}: a budget limits {', '.join(QUANTITIES)}")
    if "macs" in request.quantities and stats is None:
        raise PlanError("a budget on MACs needs stats=measure(model, example=…): MACs depend on the input")
    if "macs" in request.quantities and stats is not None and not stats.macs:
        raise PlanError("a budget on MACs means nothing here: the model did none on its example")
    if "latency" in request.quantities and (stats is None or stats.times is None):
        raise PlanError(
            "a budget on latency needs measured times of the layers: stats=rankfold.latency.time_layers(model, stats, "
            "example=…); compress measures them itself"
        )
    if request.objective not in OBJECTIVES or request.objective == CALIBRATED:
        known = ", ".join(name for name in OBJECTIVES if name != CALIBRATED)
        raise PlanError(f"objective {request.objective!r} is none of {known}")
    if request.objective in WEIGHED and request.metric != "fisher":
        raise PlanError(f"objective {request.objective!r} needs metric='fisher' (now {request.metric!r})")


def _dense_choices(  # noqa: PLR0913
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ties: Mapping[str, str],
    stats: Stats | None,
    request: _Request,
    filters: tuple[str | Sequence[str], str | Sequence[str]],
) -> dict[str, Choice]:
    """Return the dense choice of every layer, with a reason where it is the only one."""
    include, exclude = filters
    included = with_partners(selected(layers, include), ties) if include else set(layers)
    excluded = with_partners(selected(layers, exclude), ties)
    refused = structural_refusals(model)
    reasons = {}
    for name, layer in layers.items():
        if name in excluded or name not in included:
            reasons[name] = "excluded" if name in excluded else "not included"
            continue
        unfit = refusal(without_values(layer)) if request.weightless else layer_refusal(name, layer)
        tied = name in ties or name in ties.values()
        structural = "" if tied else refused.get(name)
        usable = tied_methods() if tied else methods_for(layer)
        unusable = _unusable(name, layer, stats, request.methods, usable)
        reasons[name] = structural or unfit or unusable or _untimed(name, stats, request)
    choices = {name: _untouched(name, layer, stats, reasons[name]) for name, layer in layers.items()}
    for embedding, head in ties.items():
        pair = (embedding, head)
        if any(reasons[name] for name in pair):
            unnamed = {name: replace(choices[name], reason=refused[name]) for name in pair if not reasons[name]}
            choices |= unnamed
        else:
            choices |= as_one(choices, pair)
    return choices


def _untouched(name: str, layer: nn.Module, stats: Stats | None, reason: str) -> Choice:
    """Return the dense choice of a layer with all that is known of it."""
    time = stats.times.layers.get(name) if stats and stats.times else None
    known = {
        "params": count_params(layer),
        "macs": stats.layers[name].macs if stats else None,
        "bytes": count_bytes(layer),
        "latency": time.dense if time else None,
    }
    dense: dict[str, Any] = {f"dense_{quantity}": value for quantity, value in known.items()}
    return Choice("dense", error=0.0, reason=reason, **known, **dense)  # type: ignore[arg-type]


def _untimed(name: str, stats: Stats | None, request: _Request) -> str:
    """Return why a layer can't be planned within a budget on latency; "" where it can, or where there is none."""
    if "latency" not in request.quantities or stats is None or stats.times is None or name in stats.times.layers:
        return ""
    return stats.times.left_out.get(name, f"no form of {' or '.join(request.methods)} was timed")


def _unusable(name: str, layer: nn.Module, stats: Stats | None, names: tuple[str, ...], usable: tuple[str, ...]) -> str:
    if stats is not None and not stats.layers[name].calls:
        return "not called on the example"
    if not set(names) & set(usable):
        tied = " that is tied" if set(names) & set(methods_for(layer)) else ""
        return f"{' and '.join(names)} can't replace a {type(layer).__name__}{tied}"
    return ""


def _job(  # noqa: PLR0913
    name: str,
    layers: Mapping[str, nn.Module],
    ties: Mapping[str, str],
    dense: Choice,
    stats: Stats | None,
    request: _Request,
) -> Job:
    layer, head = layers[name], ties.get(name)
    return Job(
        name=name,
        layer=stock_twin(without_values(layer) if request.weightless else layer),
        dense=dense,
        calls=stats.layers[name].calls if stats else None,
        batch_size=stats.batch_size if stats else 1,
        methods=request.methods if head is None else tuple(m for m in request.methods if m in tied_methods()),
        budgeted=request.quantities,
        multiple=request.multiple,
        seed=layer_seed(name, request.seed),
        weightless=request.weightless,
        metric=metric_of(request.metric, stats, name, head, layers),
        times=times_of(stats, name, head),
        head_calls=() if head is None or stats is None else stats.layers[head].calls,
    )


def _weighed(job: Job, choices: tuple[Choice, ...], request: _Request) -> tuple[Choice, ...]:
    """Give the choices of a layer their damage where that is not the squared error, and what the error is of."""
    damage = OBJECTIVES[request.objective]
    if job.metric is None and request.metric != WEIGHTS:
        choices = tuple(c if c.method == "dense" else replace(c, metric=WEIGHTS) for c in choices)
    if damage is None or job.weightless:
        return choices
    calls = job.head_calls or job.calls
    weighed = request.objective in WEIGHED
    weight = signal(job.name, job.layer, job.metric, calls, job.batch_size) if weighed else 1.0
    return tuple(replace(choice, damage=damage(choice.error or 0.0, weight)) for choice in choices)


def planned_metric(
    plan: Plan, name: str, stats: Stats | None, layers: Mapping[str, nn.Module], head: str | None = None
) -> Metric | None:
    """Return the metric that a plan decomposes one of its layers in; None on its weight.

    Args:
        plan: the plan.
        name: one of its layers.
        stats: what the plan was made from.
        layers: the layers of the model.
        head: the name of the head that is tied to the layer, where there is one.

    Raises:
        PlanError: the statistics lack what was there when the plan was made.
    """
    wanted = plan.layers[name].metric or plan.metric
    if wanted == WEIGHTS:
        return None
    metric_name(wanted, stats)
    found = metric_of(wanted, stats, name, head, layers)
    if found is None:
        raise PlanError(f"layer {name!r} is planned in the metric {wanted!r}: the statistics hold none of its inputs")
    return found
