"""Budget, Choice and Plan: plain data that can be printed, edited, stored and compared."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rankfold.errors import BudgetError, PlanError
from rankfold.layers import BLOCKS, TABLE
from rankfold.planning._names import near

Rank = int | tuple[int, ...]
QUANTITIES = ("params", "macs")
VERSION = 1


@dataclass(frozen=True)
class Budget:
    """Fractions of the whole model that a plan may keep.

    Args:
        params: parameters kept, 0 < x <= 1, or None for no limit.
        macs: multiply-adds kept, 0 < x <= 1, or None for no limit.

    Raises:
        BudgetError: no limit at all, or a limit outside 0 < x <= 1.

    Example:
        >>> Budget(macs=0.5).limits
        {'macs': 0.5}
    """

    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        for quantity, share in self.limits.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise BudgetError(f"budget {quantity}={share!r} is not a fraction kept, 0 < {quantity} <= 1")
        if not self.limits:
            raise BudgetError("a budget limits params, macs or both, such as Budget(macs=0.5)")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by quantity."""
        return {quantity: getattr(self, quantity) for quantity in QUANTITIES if getattr(self, quantity) is not None}


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer.

    Args:
        method: "dense" (untouched) or a method of `rankfold.layers`, such as "svd".
        rank: an int >= 1 or a tuple of them; None for "dense".
        options: the layer's keyword arguments beside the rank, such as `{"split": "spatial"}`.
        params: parameters after the change, where known.
        macs: multiply-adds per sample after the change, where known.
        error: predicted relative Frobenius error of the weight, where known.
        reason: why the layer stays dense.
        dense_params: parameters of the dense layer, where known.
        dense_macs: multiply-adds per sample of the dense layer, where known.

    Raises:
        PlanError: an unknown method, a rank that is not an int >= 1, or a rank without a method to use it.
    """

    method: str
    rank: Rank | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    params: int | None = None
    macs: int | None = None
    error: float | None = None
    reason: str = ""
    dense_params: int | None = None
    dense_macs: int | None = None

    def __post_init__(self) -> None:
        if self.method not in methods():
            raise PlanError(f"unknown method {self.method!r}: the methods are {', '.join(sorted(methods()))}")
        object.__setattr__(self, "rank", _checked_rank(self.method, self.rank))
        object.__setattr__(self, "options", _checked_options(self.method, self.options))
        for name in ("params", "macs", "dense_params", "dense_macs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise PlanError(f"{name} of a choice is a whole number, not {value!r}")
        if self.error is not None and not _is_error(self.error):
            raise PlanError(f"error of a choice is a finite number >= 0, not {self.error!r}")
        if not isinstance(self.reason, str):
            raise PlanError(f"reason of a choice is a text, not {self.reason!r}")


def _is_error(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


@functools.cache
def methods() -> frozenset[str]:
    """Return every method that a choice may name, "dense" among them."""
    return frozenset({"dense", *BLOCKS, *(method for _, method in TABLE)})


@functools.cache
def _options_of(method: str) -> Mapping[str, str]:
    """Return the keyword-only arguments beside the rank of the layers of a method, and what they are annotated with."""
    classes: set[Any] = {cls for (_, name), cls in TABLE.items() if name == method}
    classes |= {cls for name, cls in BLOCKS.items() if name == method}
    found = [p for cls in classes for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: str(p.annotation) for p in found if p.name not in ("rank", "seed", "device", "dtype")}


def _checked_rank(method: str, rank: Any) -> Rank | None:
    if method == "dense":
        if rank is not None:
            raise PlanError(f"a dense layer has no rank, not {rank!r}: name a method or leave the rank out")
        return None
    ranks = tuple(rank) if isinstance(rank, list | tuple) else (rank,)
    if not ranks or any(type(r) is not int or r < 1 for r in ranks):
        raise PlanError(f"rank of method {method!r} is an int >= 1 or a tuple of them, not {rank!r}")
    return ranks if isinstance(rank, list | tuple) else ranks[0]


def _checked_options(method: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise PlanError(f"options of a choice are a mapping, not {options!r}")
    known = _options_of(method)
    unknown = set(options) - set(known)
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise PlanError(f"method {method!r} has no option {sorted(map(str, unknown))[0]!r} (its options: {names})")
    checked = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in checked.items():
        fraction = isinstance(value, float) and "float" in known[name]
        numbers = isinstance(value, tuple) and not {*map(type, value)} - {int}
        if not (isinstance(value, str | int) or fraction or numbers):
            raise PlanError(f"option {name}={value!r} is neither a word, a whole number, a flag nor a list of numbers")
    return checked


@dataclass(frozen=True)
class Plan:
    """What becomes of every factorisable layer of a model.

    The totals are those of the whole model: its dense totals less what the layers save. The error of a
    plan is the root mean square of the relative errors over its layers, 0 for a dense one; at a fixed
    model it orders plans as the planner's objective, the sum of squared relative errors, does.

    Args:
        layers: per layer name, its choice.
        budget: the budget the plan was made for, if any.
        dense_params: parameters of the dense model.
        dense_macs: multiply-adds per sample of the dense model, where they were measured.

    Example:
        >>> plan = Plan({"fc": Choice("svd", rank=4)})
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    layers: Mapping[str, Choice]
    budget: Budget | None = None
    dense_params: int | None = None
    dense_macs: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(self.layers))

    @property
    def params(self) -> int | None:
        """Predicted parameters of the whole model; None where a layer's are not known."""
        return self._total("params")

    @property
    def macs(self) -> int | None:
        """Predicted multiply-adds per sample of the whole model; None where a layer's are not known."""
        return self._total("macs")

    @property
    def error(self) -> float | None:
        """Root mean square of the layers' relative errors; None where one is not known."""
        errors = [0.0 if choice.method == "dense" else choice.error for choice in self.layers.values()]
        if any(error is None for error in errors):
            return None
        return math.sqrt(sum(error**2 for error in errors if error) / max(1, len(errors)))

    def _total(self, quantity: str) -> int | None:
        total: int | None = getattr(self, f"dense_{quantity}")
        for choice in self.layers.values():
            if choice.method == "dense":
                continue
            new, old = getattr(choice, quantity), getattr(choice, f"dense_{quantity}")
            if total is None or new is None or old is None:
                return None
            total += new - old
        return total

    def with_choice(self, name: str, choice: Choice) -> Plan:
        """Return the plan with another choice for one layer.

        Raises:
            PlanError: the plan names no such layer.
        """
        if name not in self.layers:
            raise PlanError(f"the plan has no layer {name!r}{near(name, self.layers)}")
        before = self.layers[name]
        known = {key: getattr(before, key) for key in ("dense_params", "dense_macs") if getattr(choice, key) is None}
        return replace(self, layers={**self.layers, name: replace(choice, **known)})

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per layer."""
        head: dict[str, Any] = {"rankfold": VERSION}
        if self.budget is not None:
            head["budget"] = self.budget.limits
        head |= {key: value for key in _TOTALS if (value := getattr(self, key)) is not None}
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        rows = [f"  {json.dumps(name)}: {json.dumps(_choice_data(choice))}" for name, choice in self.layers.items()]
        return "{" + ",\n ".join([*lines, '"layers": {\n' + ",\n".join(rows) + "}"]) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, checking all of it.

        Raises:
            PlanError: not JSON, another version, an unknown key, method or option, a rank that is not an int >= 1.
        """
        data = _load(text)
        if data.get("rankfold") != VERSION or isinstance(data["rankfold"], bool):
            raise PlanError(f"a plan of version {data.get('rankfold')!r} cannot be read: this is version {VERSION}")
        _only_keys(data, {"rankfold", "budget", "layers", *_TOTALS}, "the plan")
        if not isinstance(data.get("layers"), dict):
            raise PlanError('a plan has an object "layers" with one entry per layer')
        for key in _TOTALS:
            if data.get(key) is not None and (type(data[key]) is not int or data[key] < 0):
                raise PlanError(f"{key} of a plan is a whole number, not {data[key]!r}")
        layers = {name: _read_choice(name, choice) for name, choice in data["layers"].items()}
        return cls(layers, _read_budget(data.get("budget")), *(data.get(key) for key in _TOTALS))

    def __str__(self) -> str:
        """Return the plan as an aligned table with its totals."""
        rows = [_row(name or "(model)", choice) for name, choice in self.layers.items()]
        table = [_HEADINGS, *rows]
        widths = [max(len(row[k]) for row in table) for k in range(len(_HEADINGS))]
        lines = ["  ".join(map(_pad, row, widths, _RIGHT)).rstrip() for row in table]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", *_totals(self)])


_TOTALS = ("dense_params", "dense_macs")
_FIELDS = ("params", "macs", "error", "reason", "dense_params", "dense_macs")


def _choice_data(choice: Choice) -> dict[str, Any]:
    data: dict[str, Any] = {"method": choice.method, **choice.options}
    if choice.rank is not None:
        data["rank"] = choice.rank
    return data | {key: value for key in _FIELDS if (value := getattr(choice, key)) not in (None, "")}


def _load(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except (json.JSONDecodeError, RecursionError, TypeError, UnicodeDecodeError) as error:
        raise PlanError(f"a plan is JSON text: {error}") from error
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a JSON object, not {type(data).__name__}")
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
        raise PlanError(f"budget of a plan is an object such as {{'macs': 0.5}}, not {data!r}")
    _only_keys(data, set(QUANTITIES), "the budget")
    try:
        return Budget(**data)
    except BudgetError as error:
        raise PlanError(f"the plan's budget is unusable: {error}") from error


def _read_choice(name: str, data: Any) -> Choice:
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise PlanError(f'layer {name!r} of the plan is an object with a "method", not {data!r:.80}')
    fields = {key: value for key, value in data.items() if key in ("method", "rank", *_FIELDS)}
    options = {key: value for key, value in data.items() if key not in fields}
    try:
        return Choice(**fields, options=options)
    except PlanError as error:
        raise PlanError(f"layer {name!r} of the plan: {error}") from error


_HEADINGS = ("layer", "method", "rank", "params", "MACs", "error", "reason")
_RIGHT = (False, False, True, True, True, True, False)


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def _row(name: str, choice: Choice) -> tuple[str, ...]:
    options = ",".join(_option_text(*item) for item in choice.options.items())
    method = f"{choice.method}({options})" if options else choice.method
    rank = choice.rank if isinstance(choice.rank, tuple) else (choice.rank,)
    return (
        name,
        method,
        "-" if choice.rank is None else "x".join(map(str, rank)),
        _change(choice, "params"),
        _change(choice, "macs"),
        "-" if choice.error is None else f"{choice.error:.4f}",
        choice.reason,
    )


def _option_text(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{name}={'x'.join(map(str, value))}"
    return value if isinstance(value, str) else f"{name}={value}"


def _change(choice: Choice, quantity: str) -> str:
    new, old = getattr(choice, quantity), getattr(choice, f"dense_{quantity}")
    if choice.method == "dense":
        new = old if new is None else new
        return _number(new)
    return f"{_number(old)} -> {_number(new)}"


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


def _totals(plan: Plan) -> list[str]:
    lines = []
    for label, new, old in (("params", plan.params, plan.dense_params), ("MACs", plan.macs, plan.dense_macs)):
        if old is not None:
            share = f" ({new / old:.1%} kept)" if new is not None and old else ""
            lines.append(f"{label}: {_number(old)} -> {_number(new)}{share}")
    changed = sum(choice.method != "dense" for choice in plan.layers.values())
    error = "unknown" if plan.error is None else f"{plan.error:.4f} (root mean square over layers)"
    return [*lines, f"error: {error}", f"layers: {changed} of {len(plan.layers)} factorised"]
