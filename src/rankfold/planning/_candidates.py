"""What every layer of a model could become: the candidates that the plans of all budgets are selected from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from torch import nn

from rankfold._common import one_of
from rankfold.errors import PlanError
from rankfold.layers import Metric, methods_for, refusal, stock_twin, tied_methods
from rankfold.planning._amounts import QUANTITIES, Amounts
from rankfold.planning._blocks import Blocks
from rankfold.planning._choice import Choice
from rankfold.planning._joint import check_blocks, contests
from rankfold.planning._layer import Job, layer_seed, run, untouched
from rankfold.planning._metrics import AUTO, WEIGHTS, check_stats, metric_name, signal
from rankfold.planning._names import selected
from rankfold.planning._objectives import CALIBRATED, OBJECTIVES, SQUARES, WEIGHED
from rankfold.planning._plan import Plan
from rankfold.planning._planning import Planning
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import RULES, Rule, rule_of
from rankfold.planning._select import Candidates
from rankfold.planning._ties import as_one, metric_of, tied_heads, times_of, with_partners
from rankfold.stats import Stats, count_bytes, count_params, walk


@dataclass(frozen=True)
class _Request:
    """How to look for candidates, once checked."""

    planning: Planning
    quantities: tuple[str, ...]
    weightless: bool
    metric: str
    objective: str


def candidates(
    model: nn.Module,
    *,
    quantities: str | Sequence[str] = ("params",),
    stats: Stats | None = None,
    planning: Planning | None = None,
    executor: Executor | None = None,
    blocks: Blocks | None = None,
) -> Candidates:
    """Return what every layer of a model could become, with cost and error: `.plan(budget)` then is quick.

    A choice must make a budgeted quantity of its layer smaller and no measured one larger. Rule "optimal" minimises
    sum_l e_l^2 over one choice per layer l, e_l the relative error of its outputs (with statistics of data) or of its
    weight, subject to the budget on the whole model, to a proven gap of at most 1e-4 of the sum; leaving a layer dense
    is always a choice. The sum is a proxy: it takes layers as independent.

    Args:
        model: any module; it is not changed. Layers that can't be replaced are named in the plan with the reason. Where
            one `nn.Linear` has the very weight of one `nn.Embedding`, as in language models, the embedding's choice
            ("svd") counts for both, with the work of both; the head follows it. Other layers with a weight in common
            stay as they are. Of an embedding with a tied head the error in a metric of data is the mean of the squared
            errors of the head's outputs and of the weight.
        quantities: what the budgets will limit: "params", "macs", "bytes", "latency" or several.
        stats: from `measure`; needed for a budget on MACs. Without it no MACs are predicted, and layers whose weight a
            parent reads directly can't be told from the others. With moments=True it also says what the inputs of the
            layers are like, and from `rankfold.latency.time_layers` how long they take: needed for a budget on latency.
        planning: methods, rule, metric, objective and the rest; by default `Planning()`. Objective "auto" is "squares"
            here, since nothing runs.
        executor: decompose layers in parallel in this executor's workers; the result is the same.
        blocks: solved layers that could each replace several layers in a row, by the name of the block "first:last",
            from `rankfold.train.flexible_candidates`: each competes with all that the block's layers could become one
            by one. Rule "optimal" and metric "outputs" alone compare them: the sum takes every relative error of a
            layer's outputs to reach the outputs of the model unchanged, so that the error of a block's values is one
            term of it, in the place of the terms of all its layers. `apply` needs the same blocks.

    Raises:
        PlanError: an unknown quantity or layer; statistics of another model, or without what the metric or the budget
            needs; a rule that reads weights with init="random".
        LayerError: a weight holds NaN or Inf.

    Example:
        >>> import torch
        >>> from rankfold.planning import Budget
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> found = candidates(model, planning=Planning(methods="svd", multiple=8)).plan(Budget(params=0.5))
        >>> found.params <= 0.5 * found.dense.params
        True
    """
    planning = planning or Planning()
    chosen = rule_of(planning.rule)
    limited = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    weightless = _weightless(model, planning, chosen)
    if weightless:
        planning = replace(planning, init="random")
    metric = _metric(planning.metric, stats, weightless=weightless)
    objective = SQUARES if planning.objective == AUTO else planning.objective
    request = _Request(planning, limited, weightless, metric, objective)
    _check(request, stats)
    if blocks:
        check_blocks(planning.rule, limited, metric, planning.init)
    layers = dict(walk(model))
    check_stats(layers, stats)
    ties = tied_heads(model)
    dense = _dense_choices(model, layers, ties, stats, request)
    jobs = [_job(name, layers, ties, choice, stats, request) for name, choice in dense.items() if not choice.reason]
    proposed = run(chosen.propose, jobs, executor=executor, description="Decomposing layers")
    found = {job.name: _weighed(job, choices, request) for job, choices in zip(jobs, proposed, strict=True)}
    seconds = stats.times.whole if stats and stats.times else None
    amounts = Amounts(count_params(model), stats.macs if stats else None, count_bytes(model), seconds)
    whole = Plan(dense, planning=planning, dense=amounts, metric=metric, objective=objective)
    contested = contests(model, blocks or {}, dense, stats, (limited, objective))
    return Candidates(found, whole, chosen, tuple(planning.methods), limited, contested)


def _weightless(model: nn.Module, planning: Planning, rule: Rule) -> bool:
    """Tell whether no weight is to be read; raise where the rule must."""
    if planning.init == "random" and rule.needs_weights:
        others = ", ".join(repr(other) for other, row in RULES.items() if not row.needs_weights)
        raise PlanError(f"rule {rule.name!r} reads the weights, and init='random' reads none: use rule {others}")
    return planning.init == "random" or (not rule.needs_weights and all(p.is_meta for p in model.parameters()))


def _metric(metric: str, stats: Stats | None, *, weightless: bool) -> str:
    if weightless and metric in (AUTO, WEIGHTS):
        return WEIGHTS
    if weightless:
        raise PlanError(f"metric {metric!r} measures errors, and there are none where no weight is read: leave it out")
    return metric_name(metric, stats)


def _check(request: _Request, stats: Stats | None) -> None:
    for quantity in request.quantities:
        one_of("quantity", quantity, QUANTITIES, error=PlanError)
    if "macs" in request.quantities and stats is None:
        raise PlanError("a budget on MACs needs example=…, a loader or stats=measure(…): MACs depend on the input")
    if "macs" in request.quantities and stats is not None and not stats.macs:
        raise PlanError("a budget on MACs means nothing here: the model did none on its example")
    if "latency" in request.quantities and (stats is None or stats.times is None):
        raise PlanError(
            "a budget on latency needs measured times of the layers: stats=rankfold.latency.time_layers(model, stats, "
            "example=…); `plan` and `compress` measure them by themselves"
        )
    if request.objective == CALIBRATED:
        known = ", ".join(name for name in OBJECTIVES if name != CALIBRATED)
        raise PlanError(f"objective {CALIBRATED!r} runs the model, which `plan` and `compress` do; here it is {known}")
    if request.objective in WEIGHED and request.metric != "fisher":
        raise PlanError(f"objective {request.objective!r} needs metric='fisher' (now {request.metric!r})")


def _dense_choices(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ties: Mapping[str, str],
    stats: Stats | None,
    request: _Request,
) -> dict[str, Choice]:
    """Return the dense choice of every layer, with a reason where it is the only one."""
    include, exclude = request.planning.include, request.planning.exclude
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
        unusable = _unusable(name, layer, stats, request.planning.methods, usable)
        reasons[name] = structural or unfit or unusable or _untimed(name, stats, request)
    choices = {name: untouched(name, layer, stats, reasons[name] or "") for name, layer in layers.items()}
    for embedding, head in ties.items():
        pair = (embedding, head)
        if any(reasons[name] for name in pair):
            unnamed = {name: replace(choices[name], reason=refused[name]) for name in pair if not reasons[name]}
            choices |= unnamed
        else:
            choices |= as_one(choices, pair)
    return choices


def _untimed(name: str, stats: Stats | None, request: _Request) -> str:
    """Return why a layer can't be planned within a budget on latency; "" where it can, or where there is none."""
    if "latency" not in request.quantities or stats is None or stats.times is None or name in stats.times.layers:
        return ""
    return stats.times.left_out.get(name, f"no form of {' or '.join(request.planning.methods)} was timed")


def _unusable(name: str, layer: nn.Module, stats: Stats | None, names: Sequence[str], usable: tuple[str, ...]) -> str:
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
        methods=tuple(m for m in request.planning.methods if head is None or m in tied_methods()),
        budgeted=request.quantities,
        multiple=request.planning.multiple,
        seed=layer_seed(name, request.planning.seed),
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
