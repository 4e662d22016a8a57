"""Check the numbers and names that a user passes, and suggest the name that was perhaps meant."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from rankfold.errors import RankfoldError


def whole(name: str, value: Any, least: int = 1, *, error: type[RankfoldError] = RankfoldError, why: str = "") -> int:
    """Return a whole number as an int; NumPy's integers are accepted.

    Args:
        name: name of the value in the error message.
        value: any object; a bool does not count as a number.
        least: smallest number allowed.
        error: class of the error.
        why: end of the error message.

    Raises:
        RankfoldError: the value is anything else.

    Example:
        >>> whole("epochs", 3)
        3
        >>> whole("epochs", 1.5)
        Traceback (most recent call last):
        rankfold.errors.RankfoldError: epochs must be a whole number >= 1, got 1.5
    """
    if is_whole(value, least):
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
    """Return a real number within an interval as a float; NumPy's numbers are accepted.

    Args:
        name: name of the value in the error message.
        value: any object; a bool does not count as a number, and NaN is in no interval.
        least: lower end of the interval.
        most: upper end of the interval.
        ends: brackets of the interval: "[" or "(", then "]" or ")". Infinity is allowed only by "]".
        error: class of the error.
        why: end of the error message.

    Raises:
        RankfoldError: the value is anything else.

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
    """Return a value that is one of the known names.

    Args:
        name: name of the value in the error message.
        value: any object.
        known: the known names, in the order in which the error message lists them.
        other: what else the caller accepts, for the error message, such as "a function of the step".
        error: class of the error.

    Raises:
        RankfoldError: the value is anything else; the message suggests the name that was perhaps meant.

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


def some(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list that may be long, and how many more there are.

    Example:
        >>> some(["a", "b", "c", "d"], most=2)
        'a, b and 2 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_whole(value: Any, least: float = 1) -> bool:
    """Tell whether a value is a whole number from `least` on, of Python or NumPy; a bool is not."""
    return bool(_is_a(Integral, value) and value >= least)


def near(name: str, names: Collection[str]) -> str:
    """Return ": did you mean …?" with the names nearest to an unknown one; "" if there are no names."""
    ordered = sorted(names)
    inside = [other for other in ordered if name and name.strip("*") in other]
    return _meant(_close(name, ordered) or inside[:3] or ordered[:3])


def _is_a(kind: type, value: Any) -> bool:
    """Tell whether a value is a number of some kind; a bool is not."""
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
