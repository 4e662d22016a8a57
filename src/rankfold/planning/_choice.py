"""Choice: what becomes of one layer, as plain data."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankfold._common import one_of
from rankfold.errors import MethodError, PlanError
from rankfold.layers import BLOCKS, TABLE, Rank
from rankfold.planning._amounts import QUANTITIES, Amounts, is_real
from rankfold.planning._metrics import METRICS

PREDICTED = (*QUANTITIES, "error", "damage")  # what belongs to one method, rank and options
DENSE = tuple(f"dense_{quantity}" for quantity in QUANTITIES)
OWN = "one of your own, once the class that implements it is registered with rankfold.layers.register"
RESERVED = {"method", "rank", "reason", "metric", "for", *PREDICTED, *DENSE}  # keys of a choice in a plan's JSON


@dataclass(frozen=True)
class Choice:
    """What becomes of one layer.

    Args:
        method: "dense" (untouched) or a method of `rankfold.layers`, such as "svd".
        rank: an int >= 1 or a tuple of them; None for "dense".
        options: the layer's keyword arguments other than the rank, such as `{"split": "spatial"}`.
        amounts: parameters, multiply-adds per sample, bytes and seconds after the change, where known.
        dense: the same of the dense layer, where known.
        error: predicted relative error in the metric, where known: of the weight (Frobenius) or of the outputs.
        reason: why the layer stays dense.
        damage: what the choice adds to the sum that the planner made small, where that is not the squared error.
        metric: what the error is measured in, where that is not the plan's metric.

    Raises:
        PlanError: an unknown method or metric, a rank that is not an int >= 1, or a rank without a method to use it.

    Example:
        >>> Choice("svd", rank=8, amounts=Amounts(params=1024)).params
        1024
    """

    method: str
    rank: Rank | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    amounts: Amounts = Amounts()
    dense: Amounts = Amounts()
    error: float | None = None
    reason: str = ""
    damage: float | None = None
    metric: str = ""

    def __post_init__(self) -> None:
        one_of("method", self.method, sorted(methods()), other=OWN, error=MethodError)
        object.__setattr__(self, "rank", _checked_rank(self.method, self.rank))
        object.__setattr__(self, "options", _checked_options(self.method, self.options))
        self.amounts.check("a choice")
        self.dense.check("a choice", "dense_")
        for name in ("error", "damage"):
            if getattr(self, name) is not None and not is_real(getattr(self, name)):
                raise PlanError(f"{name} of a choice must be a finite number >= 0, got {getattr(self, name)!r}")
        if self.metric != "":
            one_of("metric", self.metric, METRICS, error=PlanError)
        if not isinstance(self.reason, str):
            raise PlanError(f"reason of a choice must be a text, got {self.reason!r}")

    @property
    def params(self) -> int | None:
        """Parameters after the change; None where they are not known."""
        return self.amounts.params

    @property
    def macs(self) -> int | None:
        """Multiply-adds per sample after the change; None where they are not known."""
        return self.amounts.macs

    @property
    def bytes(self) -> int | None:
        """Bytes of the saved layer after the change; None where they are not known."""
        return self.amounts.bytes

    @property
    def latency(self) -> float | None:
        """Seconds in one pass of the model after the change; None where they are not known."""
        return self.amounts.latency

    def __str__(self) -> str:
        """Return method, rank and options in a few words, "svd 64 split=spatial" say."""
        rank = "" if self.rank is None else f" {joined(self.rank)}"
        return f"{self.method}{rank}" + "".join(
            f" {key}={joined(value)}" for key, value in sorted(self.options.items())
        )


def option_text(name: str, value: Any) -> str:
    """Return an option as it is printed in tables: a word alone says which option it is."""
    return value if isinstance(value, str) else f"{name}={joined(value)}"


def joined(value: Any) -> str:
    """Return a value as it is printed in tables: a tuple with crosses between its numbers."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def methods() -> frozenset[str]:
    """Return every method that a choice may name, "dense" among them."""
    return frozenset({"dense", *(method for _, method in (*BLOCKS, *TABLE))})


def _options_of(method: str) -> Mapping[str, str]:
    """Return the keyword-only arguments other than the rank of a method's layers, with their annotations."""
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
        raise PlanError(f"rank of method {method!r} must be an int >= 1 or a tuple of them, got {rank!r}")
    return ranks if isinstance(rank, list | tuple) else ranks[0]


def _checked_options(method: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise PlanError(f"options of a choice must be a mapping, got {options!r}")
    if not options:
        return {}
    known = _options_of(method)
    unknown = set(options) - set(known)
    if unknown:
        names = ", ".join(sorted(known)) or "none"
        raise PlanError(f"method {method!r} has no option {sorted(map(str, unknown))[0]!r} (its options: {names})")
    if taken := RESERVED & set(options):
        raise PlanError(f"method {method!r}: an option can't be named {min(taken)!r}, which a plan has a meaning for")
    checked = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name, value in checked.items():
        if known[name] == "bool" and type(value) is not bool:
            raise PlanError(f"option {name} must be True or False, got {value!r}")
        fraction = isinstance(value, float) and "float" in known[name]
        numbers = isinstance(value, tuple) and not {*map(type, value)} - {int}
        if not (isinstance(value, str | int) or fraction or numbers):
            raise PlanError(f"option {name} must be a word, a whole number, a flag or a list of numbers, got {value!r}")
    return checked
