"""In which order a tensor train is contracted: planned on integers, by a model of the time of each step.

A sweep takes the cores, neighbours merged into groups `[i, j)`, from the left or from the right. Each group is one
step, a batch of matrix products per row. One group of all cores is the dense matrix, two are merged halves, d the
plain sweep of Novikov et al. (2015); the groups are the shortest path from 0 to d. The model counts the time of the
products (short inner sizes and few columns are slow), what is moved, and calls; its constants fit float32 on one core
with AVX-512. Only their ratios matter. `benchmarks/is_the_contraction_plan_right.py` checks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

BATCHES = (1, 4, 32, 256, 2048, 16384)
"""Rows that plans are made for; a call takes the plan of the next one, the last where rows are symbolic."""

LARGEST_MERGE = 2**24
"""Entries that merged cores may have: a dense weight beyond this is never rebuilt in a forward pass."""

CHUNK = 2**19
"""Entries that an intermediate may have: rows are taken in chunks below it. A single row is never split."""

# The cost model: multiply-adds in a second, and the seconds of a call, a small product of a batch, an entry moved
# in cache, an entry moved beyond it or into fresh memory.
RATE, LAUNCH, PRODUCT, MOVE, FETCH = 48e9, 5e-6, 6e-8, 1e-10, 1e-9

TIE = 0.97
"""In training from the right only where that takes less than this share of the time: measured, the left wins ties."""

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

    def joins(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the products (rows, bond, columns) that `merge` makes of the cores `start` to `stop - 1`."""
        if self.ranks[start] <= self.ranks[stop]:
            grown = [(self.core(start, k), self.core(k, k + 1), self.ranks[k]) for k in range(start + 1, stop)]
        else:
            grown = [(self.core(k - 1, k), self.core(k, stop), self.ranks[k]) for k in range(start + 1, stop)]
        return [(left // bond, bond, right // bond) for left, right, bond in grown]

    def merging(self, start: int, stop: int) -> int:
        """Return the multiply-adds of merging the cores `start` to `stop - 1` as `merge` does."""
        return sum(math.prod(join) for join in self.joins(start, stop))


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


@dataclass(frozen=True)
class Sweep:
    """An order of contraction: groups of cores to merge, taken from the left or from the right.

    Attributes:
        groups: (start, stop) of each merged group, from left to right.
        from_left: which end the sweep starts at.
        chunk: rows taken at a time; 0 where all are.
        recompute: whether intermediates are computed again in backward instead of kept.
        fixed_macs: multiply-adds of merging, once per call.
        row_macs: multiply-adds per row and column.
        score: the cost model's time, in multiply-adds at the full rate.
    """

    groups: tuple[Pair, ...]
    from_left: bool
    chunk: int = 0
    recompute: bool = False
    fixed_macs: int = 0
    row_macs: int = 0
    score: float = 0.0

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
    """Return which entry of `BATCHES` the plan for this many rows is made for."""
    last = len(BATCHES) - 1
    if not isinstance(rows, int):  # a symbol of an exported program: comparing it would fix its range
        return last
    for k, limit in enumerate(BATCHES):
        if rows <= limit:
            return k
    return last


@lru_cache(maxsize=4096)
def plan_sweep(chain: Chain, rows: int, *, both_ends: bool = True, training: bool = False, columns: int = 1) -> Sweep:
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
    fixed = sum(chain.merging(*group) for group in groups)
    macs = sum(step.macs for step in steps) // columns
    return Sweep(groups, from_left, chunk, fixed_macs=fixed, row_macs=macs)


def _shortest(chain: Chain, rows: int, from_left: bool, training: bool, columns: int) -> Sweep:
    """The fastest groups of a sweep from one end: a shortest path over the bonds 0 ... d."""
    seconds = _seconds(chain, rows, from_left, training, columns)
    best: list[tuple[float, tuple[Pair, ...]]] = [(0.0, ())]
    for stop in range(1, len(chain.out_shape) + 1):
        arrivals = [
            (best[start][0] + seconds(start, stop), (*best[start][1], (start, stop)))
            for start in range(stop)
            if stop - start == 1 or chain.core(start, stop) <= LARGEST_MERGE
        ]
        best.append(min(arrivals))
    score, groups = best[-1]
    order = order_of(chain, groups, from_left, training=training, columns=columns)
    return Sweep(groups, from_left, order.chunk, False, order.fixed_macs, order.row_macs, score * RATE)


def _seconds(chain: Chain, rows: int, from_left: bool, training: bool, columns: int) -> Callable[[int, int], float]:
    """The cost model of one group: merging it, once per call, and its step."""
    passes = 3 if training else 1

    def cost(start: int, stop: int) -> float:
        joins = chain.joins(start, stop)
        made = [left * right for left, _, right in joins]  # written, brought into order, read
        slow = FETCH if chain.core(start, stop) > CHUNK else MOVE
        merging = sum(_product(*join) + 5 * LAUNCH for join in joins) + 3 * slow * sum(made)
        if from_left:  # from the right the cores are used as they lie in memory
            merging += LAUNCH + 2 * slow * chain.core(start, stop)
        step = Step.of(chain, (start, stop), from_left, columns)
        return passes * (merging + LAUNCH) + step.seconds(rows, training)

    return cost
