"""Checks of what a user gives: whole numbers, real numbers, names; and the name that was perhaps meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any

from rankfold.errors import RankfoldError


def whole(name: str, value: Any, least: int = 1, *, error: type[RankfoldError] = RankfoldError, why: str = "") -> int:
    """Return a whole number, of Python or NumPy.

    Args:
        name: what the message calls it.
        value: anything; a bool is not a number.
        least: the smallest that is allowed.
        error: the class of the error.
        why: what the message ends with.

    Raises:
        RankfoldError: of the class given, for any other value.

    Example:
        >>> whole("epochs", 3)
        3
        >>> whole("epochs", 1.5)
        Traceback (most recent call last):
        rankfold.errors.RankfoldError: epochs must be a whole number >= 1, got 1.5
    """
    if _is_a(Integral, value) and value >= least:
        return int(value)
    raise error(f"{name} must be a whole number >= {least}, got {value!r:.80}{why}")


def real(
    name: str,
    value: Any,
    least: float = 0.0,
    most: float = math.inf,
    *,
    ends: str = "[)",
    error: type[RankfoldError] = RankfoldError,
    why: str = "",
) -> float:
    """Return a real number within an interval, of Python or NumPy.

    Args:
        name: what the message calls it.
        value: anything; a bool is not a number, and NaN lies in no interval.
        least: the lower end of the interval.
        most: its upper end.
        ends: "[" or "(" and then "]" or ")": whether each end belongs to it. `inf` is allowed by "]" alone.
        error: the class of the error.
        why: what the message ends with.

    Raises:
        RankfoldError: of the class given, for any other value.

    Example:
        >>> real("energy", 0.9, most=1, ends="(]")
        0.9
        >>> real("lr", 0, ends="()")
        Traceback (most recent call last):
        rankfold.errors.RankfoldError: lr must be a number > 0, got 0
    """
    if _is_a(Real, value):
        above = value >= least if ends[0] == "[" else value > least
        if above and (value <= most if ends[1] == "]" else value < most):
            return float(value)
    raise error(f"{name} must be {_interval(least, most, ends)}, got {value!r:.80}{why}")


def one_of(
    name: str,
    value: Any,
    known: Iterable[str],
    *,
    other: str = "",
    error: type[RankfoldError] = RankfoldError,
) -> str:
    """Return a name that is known.

    Args:
        name: what the message calls it.
        value: anything.
        known: the names, in the order of the message.
        other: what else the caller takes, for the message: "a function of the step".
        error: the class of the error.

    Raises:
        RankfoldError: of the class given, for any other value; it says which name was perhaps meant.

    Example:
        >>> one_of("schedule", "cosin", ("constant", "cosine"))
        Traceback (most recent call last):
        rankfold.errors.RankfoldError: schedule must be 'constant' or 'cosine', got 'cosin': did you mean 'cosine'?
    """
    names = tuple(known)
    if isinstance(value, str) and value in names:
        return value
    *first, last = [*map(repr, names), *([other] if other else [])]
    allowed = f"{', '.join(first)} or {last}" if first else last
    raise error(f"{name} must be {allowed}, got {value!r:.80}{_meant(_close(value, names))}")


def near(name: str, names: Collection[str]) -> str:
    """Return ": did you mean …?" with the names nearest to one that is unknown; "" where there are no names."""
    ordered = sorted(names)
    inside = [other for other in ordered if name and name.strip("*") in other]
    return _meant(_close(name, ordered) or inside[:3] or ordered[:3])


def _is_a(kind: type, value: Any) -> bool:
    """Tell whether a value is a number of a kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _close(name: Any, names: Collection[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=3, cutoff=0.5) if isinstance(name, str) else []


def _meant(names: Collection[str]) -> str:
    return f": did you mean {' or '.join(map(repr, names))}?" if names else ""


def _interval(least: float, most: float, ends: str) -> str:
    low, high = {"[": ">=", "(": ">"}[ends[0]], {"]": "<=", ")": "<"}[ends[1]]
    if most == math.inf:
        return "a finite number" if least == -math.inf else f"a number {low} {least:g}"
    return f"a number with {least:g} {low.replace('>', '<')} x {high} {most:g}"
