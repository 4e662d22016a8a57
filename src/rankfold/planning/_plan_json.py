"""The JSON text of a plan: written, and read with everything in it checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, TypeAlias

from rankfold._common import near
from rankfold.errors import BudgetError, PlanError
from rankfold.planning._amounts import QUANTITIES, Amounts
from rankfold.planning._budget import Budget, Measured
from rankfold.planning._choice import DENSE, PREDICTED, RESERVED, Choice
from rankfold.planning._metrics import WEIGHTS
from rankfold.planning._objectives import SQUARES
from rankfold.planning._planning import Planning

VERSION = 1
Words: TypeAlias = tuple[Any, Any]  # metric and objective of a plan
HEAD = {"rankfold", "budget", "planning", "measured", "metric", "objective", "layers", *DENSE}


def plan_json(head: Mapping[str, Any], layers: Mapping[str, Choice], words: Words) -> str:
    """Return the JSON text of a plan, one line for each entry of its head and for each layer."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"  {json.dumps(name)}: {json.dumps(_choice_data(name, choice, words))}" for name, choice in layers.items()]
    return "{" + ",\n ".join([*lines, '"layers": {\n' + ",\n".join(rows) + "}"]) + "}\n"


def head_data(
    budget: Budget | None,
    planning: Planning | None,
    dense: Amounts,
    measured: Measured | None,
    layers: Mapping[str, Choice],
) -> dict[str, Any]:
    """Return the entries of a plan's JSON before its layers."""
    head: dict[str, Any] = {"rankfold": VERSION}
    if budget is not None:
        head["budget"] = budget.limits
    if planning is not None:
        head["planning"] = planning.to_data()
    head |= {f"dense_{quantity}": value for quantity, value in dense.known()}
    if measured is not None:
        head["measured"] = asdict(measured) | {"for": _digest(layers)}
    return head


def read_plan(text: str) -> dict[str, Any]:
    """Return the arguments of the plan that a JSON text holds.

    What was predicted of a layer is left out where its method, rank or options were edited since, and the latency that
    was measured where any layer's were.

    Raises:
        PlanError: not JSON, another version, an unknown key, method or option, a rank that is not an int >= 1.
    """
    data = _load(text)
    if data.get("rankfold") != VERSION or type(data["rankfold"]) is not int:
        raise PlanError(f"a plan of version {data.get('rankfold')!r} cannot be read: this is version {VERSION}")
    _only_keys(data, HEAD, "the plan")
    if not isinstance(data.get("layers"), dict):
        raise PlanError('a plan has an object "layers" with one entry per layer')
    words = data.get("metric", WEIGHTS), data.get("objective", SQUARES)
    layers = {name: _read_choice(name, choice, words) for name, choice in data["layers"].items()}
    return {
        "layers": layers,
        "budget": _read_budget(data.get("budget")),
        "planning": None if data.get("planning") is None else Planning.from_data(data["planning"]),
        "dense": Amounts(*(data.get(key) for key in DENSE)),
        "measured": _read_measured(data.get("measured"), layers),
        "metric": words[0],
        "objective": words[1],
    }


def _digest(layers: Mapping[str, Choice]) -> str:
    """Return what tells two plans apart by what they make of the layers."""
    told = json.dumps([[name, str(choice)] for name, choice in layers.items() if choice.method != "dense"])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _for(name: str, choice: Choice, words: Words) -> str:
    """Return what predictions belong to: a layer, what becomes of it, what errors are of and what was made small."""
    metric, objective = words
    return f"{name}: {choice}; {choice.metric or metric}, {objective}"


def _choice_data(name: str, choice: Choice, words: Words) -> dict[str, Any]:
    data: dict[str, Any] = {"method": choice.method, **choice.options}
    if choice.rank is not None:
        data["rank"] = choice.rank
    rest: dict[str, Any] = dict(choice.amounts.known())
    rest |= {"error": choice.error, "damage": choice.damage}
    rest = {key: value for key, value in rest.items() if value is not None}
    if rest:
        rest["for"] = _for(name, choice, words)
    rest |= {f"dense_{quantity}": value for quantity, value in choice.dense.known()}
    return data | rest | {key: value for key in ("reason", "metric") if (value := getattr(choice, key))}


def _load(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError, TypeError) as error:
        raise PlanError(f"a plan is JSON text: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"a plan must be a JSON object, got {type(data).__name__}")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        names = [name for name, _ in pairs]
        raise PlanError(f"the plan names {next(n for n in names if names.count(n) > 1)!r} twice")
    return data


def _only_keys(data: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where} has an unknown key {unknown[0]!r}{near(unknown[0], known)}")


def _read_budget(data: Any) -> Budget | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise PlanError(f"budget of a plan must be an object such as {{'macs': 0.5}}, got {data!r}")
    _only_keys(data, set(QUANTITIES), "the budget")
    try:
        return Budget(**data)
    except BudgetError as error:
        raise PlanError(f"the plan's budget is unusable: {error}") from error


def _read_measured(data: Any, layers: Mapping[str, Choice]) -> Measured | None:
    """Return a measured latency, unless it is of other layers than these."""
    if data is None:
        return None
    names = {field.name for field in fields(Measured)}
    if not isinstance(data, dict) or data.keys() - {"for"} != names:
        raise PlanError(f"a measured latency must be an object of {', '.join(sorted(names))}, got {data!r:.80}")
    if not isinstance(data.get("for"), str | None):
        raise PlanError(f'"for" of a measured latency must be a text, got {data["for"]!r:.80}')
    measured = Measured(**{name: data[name] for name in names})
    return measured if data.get("for") in (None, _digest(layers)) else None


def _read_choice(name: str, data: Any, words: Words) -> Choice:
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise PlanError(f'layer {name!r} of the plan must be an object with a "method", got {data!r:.80}')
    if not isinstance(data.get("for"), str | None):
        raise PlanError(f'layer {name!r} of the plan: "for" must be a text, got {data["for"]!r:.80}')
    options = {key: value for key, value in data.items() if key not in RESERVED}
    told = {key: data[key] for key in ("reason", "metric") if key in data}
    dense = Amounts(*(data.get(key) for key in DENSE))
    try:
        bare = Choice(data["method"], data.get("rank"), options, dense=dense, **told)
        predicted: dict[str, Any] = {key: data.get(key) for key in PREDICTED}
        amounts = Amounts(*(predicted.pop(quantity) for quantity in QUANTITIES))
        whole = replace(bare, amounts=amounts, **predicted)
    except PlanError as error:
        raise type(error)(f"layer {name!r} of the plan: {error}") from error
    belongs = _for(name, whole, words)
    if data.get("for") in (None, belongs):
        return whole
    if not data["for"].startswith(f"{name}: "):  # the row of another layer
        return replace(bare, dense=Amounts(), reason="")
    return replace(bare, amounts=dense, error=0.0) if bare.method == "dense" else replace(bare, reason="")
