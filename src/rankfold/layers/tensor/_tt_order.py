"""The order in which a tensor train is contracted: found from sizes alone, by a model of the time of each step.

A sweep goes through the cores from the left or from the right, neighbours merged into groups `[i, j)`. Each group is
one step: a batch of matrix products per row. One group of all cores is the dense matrix, two groups are merged halves,
and d groups the plain sweep of Novikov et al. (2015); the best groups are a shortest path from 0 to d. The cores of a
group are merged by the fastest tree of products, as in matrix chain multiplication. The model adds up the time of the
products (slow with a short inner size or few columns), of moving data, and of calls; its constants fit float32 on one
core with AVX-512. Only their ratios matter. `benchmarks/is_the_contraction_schedule_right.py` checks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from rankfold.layers._build import LARGEST_MERGE

BATCHES = (1, 4, 32, 256, 2048, 16384)
"""Row counts that schedules are made for: a call takes the next larger one, or the last where rows are symbolic."""

CHUNK = 2**19
"""Entries that an intermediate may have: rows are taken in chunks below it. A single row is never split."""

# The cost model: multiply-adds in a second, and the seconds of a call, a small product of a batch, an entry moved
# in cache, an entry moved beyond it or into fresh memory, an entry of a product larger than `LARGEST_MERGE`.
RATE, LAUNCH, PRODUCT, MOVE, FETCH, BEYOND = 48e9, 5e-6, 6e-8, 1e-10, 1e-9, 1e-6

TIE = 0.97
"""In training, a sweep starts from the right only if it takes less than this share of the time from the left, which
wins ties when measured."""

TINY = 400
"""Multiply-adds below which the products of a batch are plain loops."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Chain:
    """The sizes of a train's cores (ranks[k], out_shape[k], in_shape[k], ranks[k + 1])."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def shapes(self) -> list[tuple[int, int, int, int]]:
        """The shape of every core."""
        return list(zip(self.ranks, self.out_shape, self.in_shape, self.ranks[1:], strict=False))

    def core(self, start: int, stop: int) -> int:
        """Return the entries of the merged cores `start` to `stop - 1`."""
        sides = math.prod(self.out_shape[start:stop]) * math.prod(self.in_shape[start:stop])
        return self.ranks[start] * sides * self.ranks[stop]

    def merge(self, start: int, stop: int) -> Merge:
        """Return the fastest way to merge the cores `start` to `stop - 1`."""
        return _merges(self)[start, stop]


@dataclass(frozen=True)
class Merge:
    """How neighbouring cores are merged into one, product by product.

    Attributes:
        order: position, among the parts that remain, of the one that is joined with the next.
        joins: the products (rows, bond, columns).
        seconds: the cost model's time.
    """

    order: tuple[int, ...] = ()
    joins: tuple[tuple[int, int, int], ...] = ()
    seconds: float = 0.0

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return sum(map(math.prod, self.joins))

    @property
    def made(self) -> list[int]:
        """Entries of each product."""
        return [rows * columns for rows, _, columns in self.joins]


@lru_cache(maxsize=4096)
def _merges(chain: Chain) -> dict[Pair, Merge]:
    """The fastest way to merge each range of cores: a dynamic programme over the place of the last product."""
    count = len(chain.out_shape)
    best = {(k, k + 1): Merge() for k in range(count)}
    for length in range(2, count + 1):
        for start in range(count - length + 1):
            stop, ways = start + length, []
            for k in range(start + 1, stop):
                left, right, bond = best[start, k], best[k, stop], chain.ranks[k]
                join = (chain.core(start, k) // bond, bond, chain.core(k, stop) // bond)
                order = (*left.order, *(at + 1 for at in right.order), 0)  # the merged left is one part
                seconds = left.seconds + right.seconds + _joining(*join)
                ways.append(Merge(order, (*left.joins, *right.joins, join), seconds))
            best[start, stop] = min(ways, key=lambda way: way.seconds)
    return best


def _joining(rows: int, bond: int, columns: int) -> float:
    """Seconds of a product of two parts: the result is written, reordered and read."""
    made = rows * columns
    slow = MOVE if made <= CHUNK else FETCH if made <= LARGEST_MERGE else BEYOND
    return _product(rows, bond, columns) + 5 * LAUNCH + 3 * slow * made


@dataclass(frozen=True)
class Step:
    """What one group does to a row: `batch` products (rows x inner) @ (inner x columns)."""

    batch: int
    rows: int
    inner: int
    columns: int

    @classmethod
    def of(cls, chain: Chain, group: Pair, from_left: bool, columns: int = 1) -> Step:
        """Return the step of the cores `group`; each row may carry several columns along."""
        start, stop = group
        m, n = math.prod(chain.out_shape[start:stop]), math.prod(chain.in_shape[start:stop])
        before, after = chain.ranks[start], chain.ranks[stop]
        if from_left:
            done, left = math.prod(chain.out_shape[:start]), math.prod(chain.in_shape[stop:])
            return cls(done, m * after, before * n, left * columns)
        done, left = math.prod(chain.out_shape[stop:]), math.prod(chain.in_shape[:start])
        return cls(left, before * m, n * after, done * columns)

    @property
    def macs(self) -> int:
        """Multiply-adds per row."""
        return self.batch * self.rows * self.inner * self.columns

    @property
    def taken(self) -> int:
        """Entries of the state before the step, per row."""
        return self.batch * self.inner * self.columns

    @property
    def given(self) -> int:
        """Entries of the state after the step, per row."""
        return self.batch * self.rows * self.columns

    @property
    def scattered(self) -> int:
        """Entries of the gradients of the matrix before they are summed over a batch, per row."""
        return self.batch * self.rows * self.inner if self.columns > 1 else 0

    def largest(self, training: bool) -> int:
        """Return the entries of the largest tensor that the step makes, per row."""
        return max(self.given, self.scattered) if training else self.given

    def seconds(self, rows: int, training: bool) -> float:
        """Return the model's time for a number of rows, backward included in training."""
        products = [(self.rows, self.inner, self.columns)]
        if training:
            products += [(self.inner, self.rows, self.columns), (self.rows, self.columns, self.inner)]
        if self.columns == 1:  # one product for all rows
            many = rows * self.batch
            shapes = [(many, self.inner, self.rows), (many, self.rows, self.inner), (self.inner, many, self.rows)]
            time = sum(_product(*shape) for shape in shapes[: len(products)])
        else:
            time = rows * self.batch * sum(_product_of_batch(*shape) for shape in products)
        moved = (3 if training else 1) * (self.taken + self.given) + (2 * self.scattered if training else 0)
        beyond = self.largest(training) > CHUNK
        calls = -(-rows * self.largest(training) // CHUNK) * len(products)
        return time + rows * moved * (FETCH if beyond else MOVE) + LAUNCH * calls


def _product(rows: int, inner: int, columns: int) -> float:
    """Seconds of a matrix product: less than the full rate where a size is small."""
    share = rows / (rows + 4) * inner / (inner + 6) * columns / (columns + 6)
    return rows * inner * columns / (RATE * share)


def _product_of_batch(rows: int, inner: int, columns: int) -> float:
    """Seconds of one product of a batch; rows of fewer than 16 columns leave vector units idle."""
    macs = rows * inner * columns
    if macs < TINY:
        return rows * columns * (3e-9 + 0.75e-9 * inner)
    wide = columns / (columns + 3) if columns >= 16 else columns / 55
    return PRODUCT + macs / (RATE * rows / (rows + 4) * inner / (inner + 6) * wide)


class Turn(NamedTuple):
    """What a call needs to know about a group: its cores, how they are merged, and its step for one column."""

    start: int
    stop: int
    order: tuple[int, ...]
    batch: int
    rows: int
    inner: int
    columns: int


@dataclass(frozen=True)
class Sweep:
    """An order of contraction: groups of cores to merge, taken from the left or from the right.

    Attributes:
        groups: (start, stop) of each merged group, from left to right.
        from_left: which end the sweep starts at.
        chunk: rows taken at a time; 0 for all at once.
        recompute: whether backward recomputes the intermediates instead of keeping them.
        fixed_macs: multiply-adds of merging, once per call.
        row_macs: multiply-adds per row and column.
        score: the cost model's time, in multiply-adds at the full rate.
        turns: what is done with each group, in the order of use.
    """

    groups: tuple[Pair, ...]
    from_left: bool
    chunk: int = 0
    recompute: bool = False
    fixed_macs: int = 0
    row_macs: int = 0
    score: float = 0.0
    turns: tuple[Turn, ...] = ()

    def macs(self, rows: int) -> int:
        """Return the multiply-adds of a forward pass for a number of rows."""
        return self.fixed_macs + rows * self.row_macs

    def steps(self, chain: Chain, columns: int = 1) -> list[Step]:
        """Return the steps in their order."""
        groups = self.groups if self.from_left else self.groups[::-1]
        return [Step.of(chain, group, self.from_left, columns) for group in groups]

    def kept(self, chain: Chain, columns: int = 1) -> int:
        """Return the entries of the intermediates that backward needs, per row."""
        return sum(step.taken for step in self.steps(chain, columns)[1:])


def bucket(rows: int | torch.SymInt) -> int:
    """Return the position in `BATCHES` of the schedule that serves this many rows."""
    last = len(BATCHES) - 1
    if not isinstance(rows, int):  # a symbol of an exported program: comparing it would fix its range
        return last
    for k, limit in enumerate(BATCHES):
        if rows <= limit:
            return k
    return last


@lru_cache(maxsize=4096)
def schedule_sweep(
    chain: Chain, rows: int, *, both_ends: bool = True, training: bool = False, columns: int = 1
) -> Sweep:
    """Return the order that the cost model finds fastest, each row carrying a number of columns."""
    left = _shortest(chain, rows, True, training, columns)
    if not both_ends:
        return left
    right = _shortest(chain, rows, False, training, columns)
    return right if right.score < (TIE if training else 1) * left.score else left


def order_of(chain: Chain, groups: tuple[Pair, ...], from_left: bool, *, training: bool, columns: int = 1) -> Sweep:
    """Return the sweep of given groups: its chunks and its multiply-adds."""
    steps = [Step.of(chain, group, from_left, columns) for group in groups]
    largest = max(step.largest(training) for step in steps)
    chunk = max(CHUNK // largest, 1) if len(groups) > 1 else 0
    fixed = sum(chain.merge(*group).macs for group in groups)
    macs = sum(step.macs for step in steps) // columns
    turns = [
        Turn(*group, chain.merge(*group).order, step.batch, step.rows, step.inner, step.columns // columns)
        for group, step in zip(groups, steps, strict=True)
    ]
    used = tuple(turns if from_left else turns[::-1])
    return Sweep(groups, from_left, chunk, fixed_macs=fixed, row_macs=macs, turns=used)


def _shortest(chain: Chain, rows: int, from_left: bool, training: bool, columns: int) -> Sweep:
    """The fastest groups of a sweep from one end: a shortest path over the bonds 0 ... d."""
    seconds = _seconds(chain, rows, from_left, training, columns)
    best: list[tuple[float, tuple[Pair, ...]]] = [(0.0, ())]
    for stop in range(1, len(chain.out_shape) + 1):
        arrivals = [
            (best[start][0] + seconds(start, stop), (*best[start][1], (start, stop)))
            for start in range(stop)
            if stop - start == 1 or max(chain.merge(start, stop).made) <= LARGEST_MERGE
        ]
        best.append(min(arrivals))
    score, groups = best[-1]
    order = order_of(chain, groups, from_left, training=training, columns=columns)
    return replace(order, score=score * RATE)


def _seconds(chain: Chain, rows: int, from_left: bool, training: bool, columns: int) -> Callable[[int, int], float]:
    """The cost model of one group: merging it, once per call, and its step."""
    passes = 3 if training else 1

    def cost(start: int, stop: int) -> float:
        merging = chain.merge(start, stop).seconds
        if from_left and stop - start == 1:  # from the right a core is used as it lies in memory
            slow = FETCH if chain.core(start, stop) > CHUNK else MOVE
            merging += LAUNCH + 2 * slow * chain.core(start, stop)
        step = Step.of(chain, (start, stop), from_left, columns)
        return passes * (merging + LAUNCH) + step.seconds(rows, training)

    return cost
