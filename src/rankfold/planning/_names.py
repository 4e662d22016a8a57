"""Names and patterns of layers, and what was perhaps meant by one that matches nothing."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from rankfold.errors import PlanError


def near(name: str, names: Collection[str]) -> str:
    """Return ": did you mean …?" with the names nearest to one that is unknown; "" where none is near."""
    ordered = sorted(names)
    inside = [other for other in ordered if name and name.strip("*") in other]
    close = difflib.get_close_matches(name, ordered, n=3, cutoff=0.5) or inside[:3] or ordered[:3]
    return f": did you mean {' or '.join(map(repr, close))}?" if close else ""


def selected(names: Collection[str], patterns: str | Sequence[str]) -> set[str]:
    """Return the names that are equal to, or match, one of the patterns (`*`, `?`, `[…]`).

    Raises:
        PlanError: a pattern matches no name.
    """
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    found: set[str] = set()
    for pattern in patterns:
        matched = {pattern} & set(names) or {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise PlanError(f"{pattern!r} matches no factorisable layer{near(pattern, names)}")
        found |= matched
    return found
