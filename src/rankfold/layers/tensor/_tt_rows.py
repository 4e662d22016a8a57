"""Rows of a table that is a tensor train: products of gathered slices, in an order found from sizes alone.

Neighbouring cores are merged before the look-up where they have fewer slices than there are rows to look up: the two
halves of a table of a million rows have about a thousand slices each, which leaves one product per row. The table
itself, with all cores merged, is never built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from rankfold.layers.tensor._tt_contract import merge
from rankfold.layers.tensor._tt_order import Chain

Pair = tuple[int, int]

ROWS = (1, 8, 64, 512, 4096, 32768)
"""Row counts that schedules are made for; a call takes the next larger one."""

TYPICAL_ROWS = 512
"""The row count that a schedule is made for where the number of rows is a symbol of an exported program."""

# The cost model, in multiply-adds: the worth of moving one entry, of one small product in a batch, and of one call.
MOVE, PRODUCT, LAUNCH = 8.0, 4e3, 4e5


@dataclass(frozen=True)
class RowSchedule:
    """An order of work for the rows of a table.

    Attributes:
        groups: (start, stop) of the cores that are merged before the look-up, from left to right.
        from_left: which end the products of gathered slices start at.
        fixed_macs: multiply-adds of merging, once per call.
        row_macs: multiply-adds per row.
        score: the cost model's estimate, in multiply-adds.
        merges: the order of the products that merge each group, from `Chain.merge`.
    """

    groups: tuple[Pair, ...]
    from_left: bool
    fixed_macs: int
    row_macs: int
    score: float
    merges: tuple[tuple[int, ...], ...] = field(repr=False)

    def macs(self, rows: int) -> int:
        """Return the multiply-adds for a number of rows."""
        return self.fixed_macs + rows * self.row_macs


def row_schedules(chain: Chain) -> tuple[RowSchedule, ...]:
    """Return a schedule for every entry of `ROWS`."""
    return tuple(schedule_rows(chain, rows) for rows in ROWS)


def bucket_of(rows: int | torch.SymInt) -> int:
    """Return the position in `ROWS` of the schedule that serves this many rows."""
    # comparing a symbol would specialise the program to its range
    count = rows if isinstance(rows, int) else TYPICAL_ROWS
    return next((k for k, limit in enumerate(ROWS) if count <= limit), len(ROWS) - 1)


@lru_cache(maxsize=4096)
def schedule_rows(chain: Chain, rows: int) -> RowSchedule:
    """Return the cheapest grouping and direction for a number of rows."""
    return min((_shortest(chain, rows, from_left) for from_left in (True, False)), key=lambda schedule: schedule.score)


def _shortest(chain: Chain, rows: int, from_left: bool) -> RowSchedule:
    """The cheapest groups from one end, two at least: a shortest path over the bonds 0 ... d."""
    order = len(chain.in_shape)
    best: list[tuple[float, tuple[Pair, ...]]] = [(0.0, ())]
    for stop in range(1, order + 1):
        arrivals = [
            (best[start][0] + _score(chain, (start, stop), rows, from_left), (*best[start][1], (start, stop)))
            for start in range(stop)
            if stop - start == 1 or (stop - start < order and math.prod(chain.in_shape[start:stop]) <= rows)
        ]
        best.append(min(arrivals))
    score, groups = best[order]
    merges = [chain.merge(*group) for group in groups]
    return RowSchedule(
        groups,
        from_left,
        sum(merge.macs for merge in merges),
        sum(_row_macs(chain, group, from_left) for group in groups),
        score,
        tuple(merge.order for merge in merges),
    )


def _slice(chain: Chain, group: Pair) -> int:
    """The entries of one slice of merged cores."""
    start, stop = group
    return chain.ranks[start] * math.prod(chain.out_shape[start:stop]) * chain.ranks[stop]


def _row_macs(chain: Chain, group: Pair, from_left: bool) -> int:
    """The multiply-adds of the product with what is done already; the first group has none."""
    start, stop = group
    done = chain.out_shape[:start] if from_left else chain.out_shape[stop:]
    return math.prod(done) * _slice(chain, group) if done else 0


def _score(chain: Chain, group: Pair, rows: int, from_left: bool) -> float:
    start, stop = group
    macs = _row_macs(chain, group, from_left)
    moved = chain.core(start, stop) + rows * _slice(chain, group)
    calls = LAUNCH * (stop - start + 1)
    return chain.merge(start, stop).macs + MOVE * moved + rows * (macs + PRODUCT * (macs > 0)) + calls


def table_rows(cores: Sequence[Tensor], radices: Sequence[int], indices: Tensor, schedule: RowSchedule) -> Tensor:
    """Return the rows of a table: slices gathered by the digits of each index, multiplied in a batch.

    Args:
        cores: (r, dim_k, radix_k, r') each; the first r and the last r' are 1.
        radices: those of the digits of an index, the most significant first.
        indices: (rows,), each at least 0 and below the product of the radices.
        schedule: from `schedule_rows`.

    Returns:
        (rows, product of the dims).
    """
    slices = []
    for (start, stop), order in zip(schedule.groups, schedule.merges, strict=True):
        below = math.prod(radices[stop:])
        digits = torch.div(indices, below, rounding_mode="floor") if below > 1 else indices
        digits = digits % math.prod(radices[start:stop]) if start else digits
        by_index = merge(cores[start:stop], order).permute(2, 0, 1, 3).contiguous()  # radix, r, dim, r'
        slices.append(by_index.index_select(0, digits))  # rows, r, dim, r'
    return (_from_left if schedule.from_left else _from_right)(slices)


def _from_left(slices: Sequence[Tensor]) -> Tensor:
    state, width = slices[0].flatten(1, 2), slices[0].shape[2]  # rows, D, r
    for part in slices[1:]:
        state, width = torch.bmm(state, part.flatten(2)), width * part.shape[2]  # rows, D, dim r'
        state = state.reshape(-1, width, part.shape[3])
    return state.flatten(1)


def _from_right(slices: Sequence[Tensor]) -> Tensor:
    state, width = slices[-1].flatten(2), slices[-1].shape[2]  # rows, r, D
    for part in reversed(slices[:-1]):
        state, width = torch.bmm(part.flatten(1, 2), state), width * part.shape[2]  # rows, r dim, D
        state = state.reshape(-1, part.shape[1], width)
    return state.flatten(1)
