"""Find a plan: candidates per layer, then one choice per layer within the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from torch import nn

from rankfold.errors import BudgetError, PlanError
from rankfold.layers import BLOCKS, methods_for, refusal, stock_twin
from rankfold.planning._candidates import Job, layer_seed, run
from rankfold.planning._names import selected
from rankfold.planning._plan import Budget, Choice, Plan, methods
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import INITS, RULES, Init, Rule, Select, rule_of
from rankfold.stats import Stats, count_params, walk

KEPT = "dense is the rule's choice within this budget"
SHOWN = 3  # so many layers that stand in the way of a budget are put in an error
UNPAID = "no rank of {} costs less than the layer itself"


@dataclass(frozen=True)
class _Request:
    """How to look for candidates, once checked."""

    methods: tuple[str, ...]
    limits: Mapping[str, float]
    multiple: int
    seed: int
    weightless: bool


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
) -> Plan:
    """Choose method and rank for every layer of a model within a budget; the model is not changed.

    Rule "optimal" minimises sum_l e_l^2 over one choice per layer l, e_l the relative Frobenius error of
    its weight, subject to the budget on the whole model, to a proven gap of at most 1e-4 of the sum;
    leaving a layer dense is always a choice. A choice must make a budgeted quantity of its layer smaller
    and no measured one larger. The sum is a proxy: it takes layers as independent and equally important.

    Args:
        model: any module. Layers that can't be replaced are named in the plan with the reason.
        budget: fractions of the whole model to keep. Only rule "evbmf" or a function goes without.
        stats: from `measure`; needed for a budget on MACs. Without it no MACs are predicted, and layers
            whose weight a parent reads directly can't be told from the others.
        methods: which methods may be mixed: "svd", "cp", "tucker", "tt".
        rule: "optimal"; "uniform", the same share of cost in every layer; "energy", the same share of the
            squared singular values in every layer; "evbmf", the ranks of empirical variational Bayes, weakened
            by one factor to meet the budget; or a function of the candidates per layer name (dense the first)
            and of the limits on their sums, that returns a choice per name.
        init: what the plan is for, as in `apply`: to "decompose" the weights, or to train from scratch. With
            "random" no weight is read, whatever its values or its device, and no error is predicted: only rule
            "uniform" or a function goes with it. "uniform" then takes, within a share, the first of `methods` that
            has a rank, and of it the largest share of the full rank. It is implied for a model on the meta device.
        include: names or patterns (`*`, `?`) of the only layers to change; all of them if empty.
        exclude: names or patterns of layers to leave dense.
        multiple: round ranks to multiples of this.
        seed: seed of whatever is random in a decomposition.
        executor: decompose layers in parallel in this executor's workers; the result is the same.

    Raises:
        BudgetError: the budget can't be met; says the closest value that can.
        PlanError: an unknown method, rule or name; statistics of another model; a rule that reads weights
            with init="random".
        LayerError: a weight holds NaN or Inf.

    References:
        Kim et al. 2016 (EVBMF ranks); Gusak et al. 2019 (MUSCO, weakened ranks).

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> found = plan(model, budget=Budget(params=0.5))
        >>> found.params <= 0.5 * found.dense_params
        True
    """
    chosen = rule_of(rule)
    if budget is None and chosen.needs_budget:
        raise PlanError(f"rule {rule!r} needs a budget, such as budget=Budget(params=0.5)")
    weightless = _weightless(model, rule, chosen, init)
    request = _checked(methods, budget, stats, multiple, seed, weightless=weightless)
    layers = dict(walk(model))
    _check_stats(layers, stats)
    dense = _dense_choices(model, layers, stats, request, (include, exclude))
    jobs = [_job(name, layers[name], choice, stats, request) for name, choice in dense.items() if not choice.reason]
    found = run(chosen.propose, jobs, executor=executor, description="Decomposing layers")
    candidates = {job.name: choices for job, choices in zip(jobs, found, strict=True)}
    whole = Plan(dense, budget, count_params(model), stats.macs if stats else None)
    choices = _selected(chosen.select, candidates, _limits(whole, candidates))
    result = replace(whole, layers={**dense, **_explained(choices, candidates, request.methods)})
    _refuse_excess(result, rule if isinstance(rule, str) else "given")
    return result


def _weightless(model: nn.Module, name: str | Select, rule: Rule, init: Init) -> bool:
    """Tell whether no weight is to be read; raise where the rule must."""
    if init not in INITS:
        raise PlanError(f"init={init!r} is neither 'decompose' nor 'random'")
    if init == "random" and rule.needs_weights:
        others = ", ".join(repr(other) for other, row in RULES.items() if not row.needs_weights)
        raise PlanError(f"rule {name!r} reads the weights, and init='random' reads none: use rule {others}")
    return init == "random" or (not rule.needs_weights and all(p.is_meta for p in model.parameters()))


def _checked(
    names: str | Sequence[str],
    budget: Budget | None,
    stats: Stats | None,
    multiple: int,
    seed: int,
    *,
    weightless: bool,
) -> _Request:
    names = (names,) if isinstance(names, str) else tuple(names)
    known = sorted(methods() - {"dense", *BLOCKS})  # a block has no layer of its own to plan
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise PlanError(f"unknown method {unknown[0] if unknown else names!r}: the methods are {', '.join(known)}")
    if type(multiple) is not int or multiple < 1:
        raise PlanError(f"multiple={multiple!r} is not a whole number >= 1")
    limits = budget.limits if budget else {}
    if "macs" in limits and stats is None:
        raise PlanError("a budget on MACs needs stats=measure(model, example=…): MACs depend on the input")
    if "macs" in limits and stats is not None and not stats.macs:
        raise PlanError("a budget on MACs means nothing here: the model did none on its example")
    return _Request(names, limits, multiple, seed, weightless)


def _check_stats(layers: Mapping[str, nn.Module], stats: Stats | None) -> None:
    """Raise where statistics are of another model."""
    if stats is None:
        return
    for name, layer in layers.items():
        if name not in stats.layers:
            raise PlanError(f"the statistics are of another model: they have no layer {name!r}; measure this one")
        seen = stats.layers[name]
        if (seen.kind, seen.params) != (type(layer).__name__, count_params(layer)):
            raise PlanError(
                f"the statistics are of another model: layer {name!r} was a {seen.kind} with {seen.params} parameters "
                f"and is a {type(layer).__name__} with {count_params(layer)}; measure this one"
            )


def _dense_choices(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stats: Stats | None,
    request: _Request,
    filters: tuple[str | Sequence[str], str | Sequence[str]],
) -> dict[str, Choice]:
    """Return the dense choice of every layer, with a reason where it is the only one."""
    include, exclude = filters
    included = selected(layers, include) if include else set(layers)
    excluded = selected(layers, exclude)
    refused = structural_refusals(model)
    choices = {}
    for name, layer in layers.items():
        if name in excluded or name not in included:
            reason = "excluded" if name in excluded else "not included"
        else:
            unfit = refusal(without_values(layer)) if request.weightless else layer_refusal(name, layer)
            reason = refused.get(name) or unfit or _unusable(name, layer, stats, request.methods)
        params, macs = count_params(layer), stats.layers[name].macs if stats else None
        choices[name] = Choice(
            "dense", params=params, macs=macs, error=0.0, reason=reason, dense_params=params, dense_macs=macs
        )
    return choices


def _unusable(name: str, layer: nn.Module, stats: Stats | None, names: tuple[str, ...]) -> str:
    if stats is not None and not stats.layers[name].calls:
        return "not called on the example"
    if not set(names) & set(methods_for(layer)):
        return f"{' and '.join(names)} can't replace a {type(layer).__name__}"
    return ""


def _job(name: str, layer: nn.Module, dense: Choice, stats: Stats | None, request: _Request) -> Job:
    return Job(
        name=name,
        layer=stock_twin(without_values(layer) if request.weightless else layer),
        dense=dense,
        calls=stats.layers[name].calls if stats else None,
        batch_size=stats.batch_size if stats else 1,
        methods=request.methods,
        budgeted=tuple(request.limits),
        multiple=request.multiple,
        seed=layer_seed(name, request.seed),
        weightless=request.weightless,
    )


def _limits(whole: Plan, candidates: Mapping[str, Sequence[Choice]]) -> dict[str, int]:
    """Return what the budget leaves for the layers that may change: its share of the whole less all the rest."""
    limits = {}
    for quantity, allowed in _allowed(whole).items():
        changeable = sum(getattr(whole.layers[name], quantity) for name in candidates)
        limits[quantity] = allowed - (getattr(whole, f"dense_{quantity}") - changeable)
    return limits


def _allowed(whole: Plan) -> dict[str, int]:
    """Return the budget in absolute numbers."""
    limits = whole.budget.limits if whole.budget else {}
    # The millionth lets a fraction that was computed from a whole number reach that number.
    return {
        quantity: int(fraction * getattr(whole, f"dense_{quantity}") + 1e-6) for quantity, fraction in limits.items()
    }


def _selected(
    select: Select, candidates: Mapping[str, Sequence[Choice]], limits: Mapping[str, int]
) -> dict[str, Choice]:
    choices = dict(select(candidates, limits)) if candidates else {}
    if choices.keys() != candidates.keys():
        wrong = sorted(choices.keys() ^ candidates.keys())[0]
        raise PlanError(f"the rule must return one choice for each layer that it was given: see {wrong!r}")
    return choices


def _explained(
    choices: Mapping[str, Choice], candidates: Mapping[str, Sequence[Choice]], names: tuple[str, ...]
) -> dict[str, Choice]:
    """Give every layer that stays dense its reason."""
    explained = {}
    for name, choice in choices.items():
        if choice.method == "dense":
            alone = all(other.method == "dense" for other in candidates[name])
            choice = replace(choice, reason=UNPAID.format(" or ".join(names)) if alone else KEPT)
        explained[name] = choice
    return explained


def _refuse_excess(result: Plan, rule: str) -> None:
    """Raise where a plan exceeds its budget; the plan is then the cheapest that its rule found."""
    allowed = _allowed(result)
    excess = [q for q, limit in allowed.items() if getattr(result, q) > limit]
    if not excess:
        return
    wanted = ", ".join(f"{q}={result.budget.limits[q]:g} ({limit:,})" for q, limit in allowed.items())  # type: ignore[union-attr]
    reached = ", ".join(_reached(result, q) for q in allowed)
    raise BudgetError(
        f"the budget {wanted} can't be met by the {rule} rule: the closest reachable is {reached}; {_obstacles(result)}"
        "raise the budget, add methods or exclude fewer layers"
    )


def _obstacles(result: Plan) -> str:
    """Return which layers could not change and why, the largest first."""
    if not result.layers:
        return "the model has no Linear, convolution or Embedding to factorise; "
    fixed = {name: choice for name, choice in result.layers.items() if choice.reason not in ("", KEPT)}
    largest = sorted(fixed, key=lambda name: -(fixed[name].dense_params or 0))[:SHOWN]
    told = "; ".join(f"{name or 'the model'!r} ({fixed[name].reason})" for name in largest)
    return f"{len(fixed)} of {len(result.layers)} layers can't change, the largest {told}; " if fixed else ""


def _reached(result: Plan, quantity: str) -> str:
    value, dense = getattr(result, quantity), getattr(result, f"dense_{quantity}")
    # Rounded up, so that the value that is read off the message is reachable.
    share = -(-value * 10_000 // dense) / 10_000
    return f"{quantity}={share:.4f} ({value:,} of {dense:,})"
