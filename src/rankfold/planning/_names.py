"""Names of layers, and patterns of names."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from rankfold._common import near
from rankfold.errors import PlanError


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
