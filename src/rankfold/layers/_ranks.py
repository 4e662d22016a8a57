"""Ranks of a layer: checked when given, and the candidates worth planning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from rankfold._common import whole
from rankfold.errors import LayerError
from rankfold.layers._contract import Rank

CANDIDATES = 96  # for a single rank: a budget is then met to about a per cent of a layer
CANDIDATES_PER_AXIS = 20  # for a pair of ranks: at most 400 pairs
CROWDING = 1.5
"""Exponent of the spacing, 1 being even: small ranks matter most, but large ones must still meet a budget."""


def check_rank(owner: str, rank: object, full: Rank) -> Rank:
    """Return `rank` in the form of `full` (an int, or a tuple of as many ints), or raise a `LayerError`."""
    wanted = full if isinstance(full, tuple) else (full,)
    given = tuple(rank) if isinstance(rank, (tuple, list)) else (rank,)
    counted = isinstance(rank, (tuple, list)) == isinstance(full, tuple) and len(given) == len(wanted)
    if not counted or not all(type(r) is int for r in given):
        kind = f"a tuple of {len(wanted)} ints" if isinstance(full, tuple) else "an int"
        raise LayerError(f"{owner}: rank={rank!r} is not {kind}; the full rank is {full}")
    if any(r < 1 or r > most for r, most in zip(given, wanted, strict=True)):
        raise LayerError(f"{owner}: rank={rank!r} is out of range; take from 1 up to the full rank {full}")
    return given if isinstance(full, tuple) else given[0]


def spread(limit: int, multiple: int, count: int) -> tuple[int, ...]:
    """Return at most `count` multiples of `multiple`, up to `limit`, denser at the small end."""
    whole("multiple", multiple, error=LayerError, why="; 1 allows every rank")
    steps = limit // multiple
    if steps <= count:
        return tuple(multiple * k for k in range(1, steps + 1))
    picked = {max(1, round(steps * (k / count) ** CROWDING)) for k in range(1, count + 1)}
    return tuple(multiple * k for k in sorted(picked))


def spread_to_full(full: int, multiple: int, count: int) -> tuple[int, ...]:
    """Return `spread(full, …)` that ends in `full` itself, whether or not it is a multiple."""
    return tuple(sorted({*spread(full, multiple, count - 1), full}))


def below(limit: int, ranks: Iterable[Rank], params: Callable[[Rank], int]) -> tuple[Rank, ...]:
    """Return the ranks with fewer than `limit` parameters, in ascending order of parameters."""
    counted = sorted((params(rank), rank) for rank in ranks)
    return tuple(rank for count, rank in counted if count < limit)


def break_even(unit: int, dense: int) -> int:
    """Return the largest rank at which `rank * unit` parameters are fewer than `dense`."""
    return max(0, math.ceil(dense / unit) - 1)


def tail_errors(values: Tensor, ranks: Sequence[int]) -> list[float]:
    """Return the relative error of truncating descending singular values at each rank."""
    energies = values.double().square().flip(0).cumsum(0).flip(0)  # summed from the small end: no cancellation
    tails = [*energies.tolist(), 0.0]
    return [math.sqrt(tails[rank] / tails[0]) if tails[0] else 0.0 for rank in ranks]
