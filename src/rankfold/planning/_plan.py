"""Budget, Choice and Plan: plain data that can be printed, edited, stored and compared."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rankfold.errors import BudgetError, MethodError, PlanError
from rankfold.layers import BLOCKS, TABLE
from rankfold.planning._budget import QUANTITIES, Budget, Measured, check_amount, is_real
from rankfold.planning._metrics import METRICS, WEIGHTS
from rankfold.planning._names import near
from rankfold.planning._objectives import CALIBRATED, OBJECTIVES, SQUARES, combined
from rankfold.planning._print import plan_text

Rank = int | tuple[int, ...]
VERSION = 1


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer.

    Args:
        method: "dense" (untouched) or a method of `rankfold.layers`, such as "svd".
        rank: an int >= 1 or a tuple of them; None for "dense".
        options: the layer's keyword arguments beside the rank, such as `{"split": "spatial"}`.
        params: parameters after the change, where known.
        macs: multiply-adds per sample after the change, where known.
        error: predicted relative error in the metric, where known: of the weight (Frobenius) or of the outputs.
        reason: why the layer stays dense.
        dense_params: parameters of the dense layer, where known.
        dense_macs: multiply-adds per sample of the dense layer, where known.
        damage: what the choice adds to the sum that the planner made small, where that is not the squared error.
        metric: what the error is measured in, where that is not the plan's metric.
        bytes: bytes of the saved layer after the change, where known.
        dense_bytes: bytes of the saved dense layer, where known.
        latency: seconds in one pass of the model after the change, where known.
        dense_latency: seconds of the dense layer in one pass of the model, where known.

    Raises:
        PlanError: an unknown method or metric, a rank that is not an int >= 1, or a rank without a method to use it.
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
    damage: float | None = None
    metric: str = ""
    bytes: int | None = None
    dense_bytes: int | None = None
    latency: float | None = None
    dense_latency: float | None = None

    def __post_init__(self) -> None:
        if self.method not in methods():
            raise MethodError(
                f"unknown method {self.method!r}: the methods are {', '.join(sorted(methods()))}; if it is one of your "
                "own, the class that implements it must be registered with rankfold.layers.register first"
            )
        object.__setattr__(self, "rank", _checked_rank(self.method, self.rank))
        object.__setattr__(self, "options", _checked_options(self.method, self.options))
        for name in (*QUANTITIES, *_TOTALS):
            check_amount(name, getattr(self, name), "a choice")
        for name in ("error", "damage"):
            if getattr(self, name) is not None and not is_real(getattr(self, name)):
                raise PlanError(f"{name} of a choice is a finite number >= 0, not {getattr(self, name)!r}")
        if self.metric != "":
            _check_word("metric", self.metric, METRICS)
        if not isinstance(self.reason, str):
            raise PlanError(f"reason of a choice is a text, not {self.reason!r}")


def _check_word(what: str, word: Any, table: Mapping[str, Any]) -> None:
    if not isinstance(word, str) or word not in table:
        raise PlanError(f"unknown {what} {word!r}: there are {', '.join(table)}")


def methods() -> frozenset[str]:
    """Return every method that a choice may name, "dense" among them."""
    return frozenset({"dense", *(method for _, method in (*BLOCKS, *TABLE))})


def _options_of(method: str) -> Mapping[str, str]:
    """Return the keyword-only arguments beside the rank of the layers of a method, and what they are annotated with."""
    classes: set[Any] = {cls for (_, name), cls in (*TABLE.items(), *BLOCKS.items()) if name == method}
    return {name: kind for cls in classes for name, kind in _arguments_of(cls).items()}


@functools.cache
def _arguments_of(cls: Any) -> Mapping[str, str]:
    found = [p for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY]
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
    if not options:
        return {}
    known = _options_of(method)
    unknown = set(options) - set(known)
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise PlanError(f"method {method!r} has no option {sorted(map(str, unknown))[0]!r} (its options: {names})")
    if taken := {"method", *_FIELDS} & set(options):
        raise PlanError(f"method {method!r}: an option can't be named {min(taken)!r}, which a plan has a meaning for")
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
        metric: what the errors of the layers are measured in: "weights", "outputs", … (see `plan`).
        objective: what sum over the layers the planner made small: "squares" of the errors, … (see `plan`).
        dense_bytes: bytes of the saved dense model.
        dense_latency: seconds of one pass of the dense model, where it was measured.
        measured: the latency that the compressed model turned out to have, where that was tried.

    Example:
        >>> plan = Plan({"fc": Choice("svd", rank=4)})
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    layers: Mapping[str, Choice]
    budget: Budget | None = None
    dense_params: int | None = None
    dense_macs: int | None = None
    metric: str = WEIGHTS
    objective: str = SQUARES
    dense_bytes: int | None = None
    dense_latency: float | None = None
    measured: Measured | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(self.layers))
        _check_word("metric", self.metric, METRICS)
        _check_word("objective", self.objective, OBJECTIVES)

    @property
    def params(self) -> int | None:
        """Predicted parameters of the whole model; None where a layer's are not known."""
        total: int | None = self._total("params")
        return total

    @property
    def macs(self) -> int | None:
        """Predicted multiply-adds per sample of the whole model; None where a layer's are not known."""
        total: int | None = self._total("macs")
        return total

    @property
    def bytes(self) -> int | None:
        """Predicted bytes of the saved model; None where a layer's are not known."""
        total: int | None = self._total("bytes")
        return total

    @property
    def latency(self) -> float | None:
        """Promised seconds of one pass of the model; None where a layer's are not known."""
        total: float | None = self._total("latency")
        return total

    @property
    def error(self) -> float | None:
        """Root mean square of the layers' relative errors; None where one is not known."""
        errors = [0.0 if choice.method == "dense" else choice.error for choice in self.layers.values()]
        if any(error is None for error in errors):
            return None
        return math.sqrt(sum(error**2 for error in errors if error) / max(1, len(errors)))

    @property
    def output_error(self) -> float | None:
        """Predicted relative error of the model's outputs; None where a layer's error is not known.

        Each layer is taken to keep 1 - e^2 of the energy that reaches it: `sqrt(1 - prod(1 - e^2))`. In a calibrated
        plan e is what was measured at the model's outputs with this layer alone changed, else the layer's own error.
        """
        changed = [choice for choice in self.layers.values() if choice.method != "dense"]
        measured = self.objective == CALIBRATED
        squares = [c.damage if measured else c.error and c.error**2 for c in changed]
        return None if None in squares else combined(square or 0.0 for square in squares)

    def _total(self, quantity: str) -> Any:
        total: Any = getattr(self, f"dense_{quantity}")
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
        known = {key: getattr(before, key) for key in _TOTALS if getattr(choice, key) is None}
        return replace(self, layers={**self.layers, name: replace(choice, **known)})

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per layer."""
        head: dict[str, Any] = {"rankfold": VERSION}
        if self.budget is not None:
            head["budget"] = self.budget.limits
        head |= {key: value for key in _TOTALS if (value := getattr(self, key)) is not None}
        if self.measured is not None:
            head["measured"] = asdict(self.measured)
        head |= {key: value for key, usual in _WORDS.items() if (value := getattr(self, key)) != usual}
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
        _only_keys(data, {"rankfold", "budget", "layers", "measured", *_TOTALS, *_WORDS}, "the plan")
        if not isinstance(data.get("layers"), dict):
            raise PlanError('a plan has an object "layers" with one entry per layer')
        for key in _TOTALS:
            check_amount(key, data.get(key), "a plan")
        layers = {name: _read_choice(name, choice) for name, choice in data["layers"].items()}
        rest: dict[str, Any] = {key: data.get(key) for key in _TOTALS}
        rest |= {key: data.get(key, usual) for key, usual in _WORDS.items()}
        return cls(layers, _read_budget(data.get("budget")), measured=_read_measured(data.get("measured")), **rest)

    def __str__(self) -> str:
        """Return the plan as an aligned table with its totals."""
        return plan_text(self)


_TOTALS = tuple(f"dense_{quantity}" for quantity in QUANTITIES)
_WORDS = {"metric": WEIGHTS, "objective": SQUARES}  # written where they are others
_FIELDS = ("params", "macs", "error", "reason", "dense_params", "dense_macs", "damage", "metric") + (
    "bytes",
    "dense_bytes",
    "latency",
    "dense_latency",
)


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


def _read_measured(data: Any) -> Measured | None:
    if data is None:
        return None
    names = {field.name for field in fields(Measured)}
    if not isinstance(data, dict) or data.keys() != names:
        raise PlanError(f"a measured latency is an object of {', '.join(sorted(names))}, not {data!r:.80}")
    return Measured(**data)


def _read_choice(name: str, data: Any) -> Choice:
    if not isinstance(data, dict) or not isinstance(data.get("method"), str):
        raise PlanError(f'layer {name!r} of the plan is an object with a "method", not {data!r:.80}')
    known = {key: value for key, value in data.items() if key in ("method", "rank", *_FIELDS)}
    options = {key: value for key, value in data.items() if key not in known}
    try:
        return Choice(**known, options=options)
    except PlanError as error:
        raise type(error)(f"layer {name!r} of the plan: {error}") from error
