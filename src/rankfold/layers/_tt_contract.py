"""A tensor train times a batch of vectors: the order of the contraction is planned on integers, then carried out.

The state of a sweep is a batch of matrices whose middle axis is what the next core contracts, so that every
step is a view and one matrix product. From the left, cores are merged into groups `[i, j)` and each takes

    (rows M_1..M_i, r_i n, N_j..N_d) -> (rows M_1..M_i, m r_j, N_j..N_d),

from the right the same with the roles of rows and columns exchanged. One group of all cores is the dense
matrix, two are merged halves, d the plain sweep of Novikov et al. (2015); the groups are the shortest path
from 0 to d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BATCHES = (1, 8, 64, 512, 4096, 32768)
"""Rows that plans are made for; a call takes the plan of the next one, the last where rows are symbolic."""

LARGEST_MERGE = 2**22
"""Entries that merged cores may have: a dense weight beyond this is never rebuilt in a forward pass."""

# The cost model, in multiply-adds: what moving one entry, one product of a batch and one call are worth.
MOVE, PRODUCT, LAUNCH = 16.0, 1e4, 4e5

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

    def merging(self, start: int, stop: int) -> int:
        """Return the multiply-adds of merging the cores `start` to `stop - 1` as `merge` does."""
        if self.ranks[start] <= self.ranks[stop]:
            grown = [(self.core(start, k), self.core(k, k + 1), self.ranks[k]) for k in range(start + 1, stop)]
        else:
            grown = [(self.core(k, stop), self.core(k - 1, k), self.ranks[k]) for k in range(start + 1, stop)]
        return sum(a * b // bond for a, b, bond in grown)


@dataclass(frozen=True)
class Sweep:
    """An order of contraction: groups of cores to merge, taken from the left or from the right.

    Attributes:
        groups: (start, stop) of each merged group, from left to right.
        from_left: which end the sweep starts at.
        fixed_macs: multiply-adds of merging, once per call.
        row_macs: multiply-adds per row.
        score: the cost model's estimate, in multiply-adds.
    """

    groups: tuple[Pair, ...]
    from_left: bool
    fixed_macs: int
    row_macs: int
    score: float

    def macs(self, rows: int) -> int:
        """Return the multiply-adds for a number of rows."""
        return self.fixed_macs + rows * self.row_macs


def bucket(rows: int | torch.SymInt) -> int:
    """Return which entry of `BATCHES` the plan for this many rows is made for."""
    last = len(BATCHES) - 1
    if not isinstance(rows, int):  # a symbol of an exported program: comparing it would fix its range
        return last
    return next((k for k, limit in enumerate(BATCHES) if rows <= limit), last)


@lru_cache(maxsize=4096)
def plan_sweep(chain: Chain, rows: int, *, both_ends: bool = True) -> Sweep:
    """Return the cheapest grouping and direction for a number of rows."""
    ends = (False, True) if both_ends else (True,)  # from the right the cores are used as they lie in memory
    return min((_shortest(chain, rows, from_left) for from_left in ends), key=lambda sweep: sweep.score)


def _shortest(chain: Chain, rows: int, from_left: bool) -> Sweep:
    """The cheapest groups of a sweep from one end: a shortest path over the bonds 0 ... d."""
    steps = _steps(chain, from_left)
    order = len(chain.out_shape)
    best: list[tuple[float, tuple[Pair, ...]]] = [(0.0, ())]
    for stop in range(1, order + 1):
        arrivals = [
            (best[start][0] + steps(start, stop, rows), (*best[start][1], (start, stop)))
            for start in range(stop)
            if stop - start == 1 or chain.core(start, stop) <= LARGEST_MERGE
        ]
        best.append(min(arrivals))
    score, groups = best[order]
    fixed = sum(chain.merging(*group) for group in groups)
    return Sweep(groups, from_left, fixed, sum(_row_macs(chain, group, from_left) for group in groups), score)


def _around(chain: Chain, group: Pair, from_left: bool) -> Pair:
    """How many products per row a group takes part in, and how wide the matrix is that each multiplies."""
    start, stop = group
    done, left = (chain.out_shape, chain.in_shape) if from_left else (chain.in_shape, chain.out_shape)
    return math.prod(done[:start]), math.prod(left[stop:])


def _row_macs(chain: Chain, group: Pair, from_left: bool) -> int:
    return math.prod(_around(chain, group, from_left)) * chain.core(*group)


def _steps(chain: Chain, from_left: bool) -> Callable[[int, int, int], float]:
    """The cost model of one group for a number of rows."""

    def cost(start: int, stop: int, rows: int) -> float:
        products, width = _around(chain, (start, stop), from_left)
        m, n = math.prod(chain.out_shape[start:stop]), math.prod(chain.in_shape[start:stop])
        before, after = chain.ranks[start], chain.ranks[stop]
        moved = (before * n + m * after) if from_left else (n * after + before * m)
        merged = chain.merging(start, stop) + (MOVE * chain.core(start, stop) if stop - start > 1 else 0)
        batch = rows * products if width > 1 else 1
        macs = rows * _row_macs(chain, (start, stop), from_left)
        return macs + MOVE * rows * products * width * moved + PRODUCT * batch + LAUNCH * (stop - start) + merged

    return cost


def merge(cores: Sequence[Tensor]) -> Tensor:
    """Return neighbouring cores as one core (r, out, in, r'), grown from the side with the smaller bond."""
    if len(cores) == 1:
        return cores[0]
    if cores[0].shape[0] <= cores[-1].shape[3]:
        return _join(merge(cores[:-1]), cores[-1])
    return _join(cores[0], merge(cores[1:]))


def _join(left: Tensor, right: Tensor) -> Tensor:
    before, m, n, bond = left.shape
    _, p, q, after = right.shape
    product = left.reshape(-1, bond) @ right.reshape(bond, -1)  # r m n, p q r'
    paired = product.reshape(before, m, n, p, q, after).permute(0, 1, 3, 2, 4, 5)  # r, m, p, n, q, r'
    return paired.reshape(before, m * p, n * q, after)


def contract(state: Tensor, cores: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """Multiply a train with a batch of vectors, or of matrices whose columns are carried along.

    Args:
        state: (rows, r_0 times product of in, columns); from the right r_0 must be 1.
        cores: (r, out_k, in_k, r'), the last r' is 1.
        sweep: the order, from `plan_sweep`.

    Returns:
        (rows, product of out, columns).
    """
    columns = state.shape[2]
    groups = [merge(cores[start:stop]) for start, stop in sweep.groups]
    if sweep.from_left:
        width = math.prod([group.shape[2] for group in groups])
        for group in groups:
            before, m, n, after = group.shape
            width //= n
            matrix = group.permute(1, 3, 0, 2).reshape(m * after, before * n)
            state = _multiply(matrix, state.reshape(-1, before * n, width * columns))  # rows M, m r', N columns
    else:
        width = 1
        for group in reversed(groups):
            before, m, n, after = group.shape
            matrix = group.reshape(before * m, n * after)
            state = _multiply(matrix, state.reshape(-1, n * after, width * columns))  # rows N, r m, M columns
            width *= m
    return state.reshape(-1, math.prod([group.shape[1] for group in groups]), columns)


def _multiply(matrix: Tensor, state: Tensor) -> Tensor:
    """`matrix @ state` for a batch of states; one product where each is a single column."""
    if state.shape[2] == 1:
        return (state.squeeze(2) @ matrix.T).unsqueeze(2)
    return matrix @ state
