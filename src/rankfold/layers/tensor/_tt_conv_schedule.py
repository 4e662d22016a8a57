"""How a tensor-train convolution is computed: shared filters and a sweep, or one convolution by the rebuilt kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from rankfold.layers._build import LARGEST_MERGE
from rankfold.layers.tensor._tt_order import (
    CHUNK,
    LAUNCH,
    MOVE,
    RATE,
    Chain,
    Sweep,
    schedule_sweep,
)
from rankfold.layers.tensor._tt_schedule import TTSchedule, describe, for_batches

FILTERING, CONVOLVING = RATE / 24, RATE / 2
"""Multiply-adds per second of filters shared by all channels, and of a convolution."""

COLUMNS = 64
"""Positions that a product is assumed to take side by side, where there are that many."""


@dataclass(frozen=True)
class ConvSchedule:
    """How a convolution is computed: by the sweep over the channels after shared filters, or by the kernel rebuilt.

    Attributes:
        sweep: the order of contraction over the channels, or None where the kernel is rebuilt.
        fixed_macs: multiply-adds of merging or rebuilding, once per call.
        row_macs: multiply-adds per output position.
        largest: entries of the largest intermediate, per output position; 0 where there is none.
        kept: entries of the intermediates that backward needs, per output position.
        recompute: whether backward recomputes them instead of keeping them.
    """

    sweep: Sweep | None
    fixed_macs: int
    row_macs: int
    largest: int = 0
    kept: int = 0
    recompute: bool = False

    def macs(self, rows: int) -> int:
        """Return the multiply-adds of a forward pass for a number of output positions."""
        return self.fixed_macs + rows * self.row_macs

    def images(self, positions: int) -> int:
        """Return how many images, of `positions` output positions each, are taken at a time; 0 for all at once."""
        return max(CHUNK // max(self.largest * positions, 1), 1) if self.largest else 0


@lru_cache(maxsize=4096)
def schedule_conv(
    chain: Chain,
    sizes: tuple[int, int],
    groups: int,
    rows: int,
    *,
    training: bool = False,
    recompute: float | None = None,
) -> ConvSchedule:
    """Return the faster schedule for a number of output positions; `sizes = (out, in)` are the kernel's channels.

    The sweep mixes all input channels, so a kernel with several groups is always rebuilt.
    """
    filters, order, passes = chain.ranks[1], len(chain.out_shape), 3 if training else 1
    channels, columns = _channels(chain), min(rows, COLUMNS)
    sweep = schedule_sweep(channels, -(-rows // columns), both_ends=False, training=training, columns=columns)
    spatial, filtered = chain.out_shape[0] * filters * sizes[1], filters * sizes[1]
    # the filtered maps are written, reordered and read
    filtering = rows * (spatial / FILTERING + MOVE * 3 * filtered) + LAUNCH
    merging, kernel = chain.merge(0, order).macs, chain.out_shape[0] * sizes[0] * sizes[1]
    rebuilding = 2 * merging / RATE + MOVE * 3 * kernel + LAUNCH * 3 * order
    rebuilt = rebuilding + rows * (kernel / CONVOLVING + MOVE * sum(sizes))
    chained = sweep.score / RATE + passes * filtering
    if groups > 1 or (kernel <= LARGEST_MERGE and passes * rebuilt < chained):
        return ConvSchedule(None, merging, kernel)
    steps = sweep.steps(channels, columns)
    largest = max(filtered, *(-(-step.largest(training) // columns) for step in steps))
    kept = filtered + sweep.kept(channels)
    again = training and recompute is not None and kept > recompute * sum(sizes)
    return ConvSchedule(sweep, sweep.fixed_macs, spatial + sweep.row_macs, largest, kept, again)


def _channels(chain: Chain) -> Chain:
    """The cores of the channels, without that of the positions in the kernel."""
    return Chain(chain.out_shape[1:], chain.in_shape[1:], chain.ranks[1:])


def conv_schedules(
    chain: Chain, sizes: tuple[int, int], groups: int, recompute: float | None
) -> dict[bool, tuple[ConvSchedule, ...]]:
    """Return the schedule for each of `BATCHES` output positions, in inference (False) and training (True)."""

    def make(rows: int, training: bool) -> ConvSchedule:
        return schedule_conv(chain, sizes, groups, rows, training=training, recompute=recompute)

    return for_batches(make)


def describe_conv(
    chain: Chain, sizes: tuple[int, int], schedule: ConvSchedule, size: tuple[int, int], training: bool, itemsize: int
) -> TTSchedule:
    """Return the figures of a schedule for `size = (images, output positions of each)`."""
    if schedule.sweep is None:
        return _describe_rebuilt(chain, sizes, schedule, size, training, itemsize)
    batch, positions = size
    sweep = replace(schedule.sweep, chunk=schedule.images(positions), recompute=schedule.recompute)
    swept = describe(_channels(chain), sweep, batch, training, itemsize, columns=positions)
    filtered = positions * chain.ranks[1] * sizes[1]  # entries of an image
    spatial = batch * filtered * chain.out_shape[0]
    passes = (3 + swept.recomputed) if training else 1
    return replace(
        swept,
        rows=batch * positions,
        groups=((0, 1), *((start + 1, stop + 1) for start, stop in swept.groups)),
        macs=swept.macs + spatial,
        backward_macs=swept.backward_macs + (passes - 1) * spatial,
        moved=swept.moved + itemsize * passes * batch * (3 * filtered + positions * sizes[1]),
        launches=swept.launches + passes * -(-batch // max(swept.chunk, 1)),
        peak=max(swept.peak, itemsize * swept.chunk * filtered),
        saved=swept.saved + (0 if schedule.recompute or not training else itemsize * batch * filtered),
    )


def _describe_rebuilt(
    chain: Chain, sizes: tuple[int, int], schedule: ConvSchedule, size: tuple[int, int], training: bool, itemsize: int
) -> TTSchedule:
    batch, rows, passes = size[0], math.prod(size), 3 if training else 1
    order = len(chain.out_shape)
    macs, kernel = schedule.macs(rows), chain.core(0, order)
    joined = chain.merge(0, order).made
    return TTSchedule(
        rows=rows,
        training=training,
        groups=((0, order),),
        from_left=True,
        chunk=batch,
        macs=macs,
        backward_macs=2 * macs if training else 0,
        moved=itemsize * passes * (rows * sum(sizes) + 3 * sum(joined) + kernel),
        launches=passes * (len(joined) + 1),
        peak=itemsize * max(kernel, *joined),
        saved=0,
        rebuilt=True,
        recomputed=False,
    )
