"""Whether a chain of convolutions runs stage by stage or with stages merged: decided from shapes, then carried out.

Neighbouring stages cover different axes of the kernel, with nothing between them, so they can be merged into one
convolution whose kernel is the product of theirs. With every stage on its own, that is the plain chain; with all of
them in one group, it is the dense convolution by the rebuilt kernel. In between, depthwise stages are merged with each
other but never with pointwise ones: that product would have as many entries as the dense kernel. A cost model picks
the cheapest groups for the shape of the input, counting gradients where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from rankfold.layers._build import LARGEST_MERGE
from rankfold.layers.conv._conv import ConvShape, grouped

Pair = tuple[int, int]
Groups = tuple[Pair, ...]
Stages = tuple[ConvShape, ...]

# The cost model, in nanoseconds of one core with 16 lanes: multiply-adds, bytes and launches of one convolution.
LANES, DEPTH = 16, 4
FULL, POINTWISE, DEPTHWISE = 50.0, 60.0, 22.0
"""Multiply-adds per nanosecond by the kind of the convolution, its channels rounded up to whole registers."""
CHANNELS_LAST, STRIDED, STRIDED_POINTWISE = 10.0, 4.0, 3.0
"""Bytes per nanosecond read and written; feature maps with the channels first are reordered and put back."""
LAUNCH, LAUNCH_DEPTHWISE = 1.5e4, 4.5e4
"""Fixed cost of one convolution."""
JOIN_ENTRIES, JOIN_MATRICES = 1.5e4, 3e4
"""Fixed cost of one product of two kernels, entry by entry or as matrices."""


class Mode(NamedTuple):
    """What the cost of a call depends on, other than the shape of its input.

    Attributes:
        channels_last: whether the feature maps are stored with the channels last.
        weights: whether the weights get a gradient.
        input: whether the input gets a gradient.
        itemsize: bytes of one entry.
    """

    channels_last: bool = False
    weights: bool = False
    input: bool = False
    itemsize: int = 4


@dataclass(frozen=True)
class ChainSchedule:
    """Which stages of a chain of convolutions are merged for one shape of the input, and what that costs.

    Attributes:
        groups: (start, stop) of the stages that each convolution carries out, in order.
        macs: multiply-adds of one forward pass, products of kernels included.
        moved_bytes: bytes of activations and merged kernels that one forward pass reads and writes.
        launches: convolutions and products of kernels in one forward pass.
        saved_bytes: bytes kept for the backward pass besides the factors: inputs of convolutions, merged kernels.
        peak_bytes: the most bytes alive at once in the forward pass: what has been saved so far or the input of the
            current convolution, whichever is larger, plus its output.
        seconds: the cost model's estimate on one core, with the backward pass where there is one.
    """

    groups: Groups
    macs: int
    moved_bytes: int
    launches: int
    saved_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def way(self) -> str:
        """Return "chain" (every stage on its own), "rebuilt" (one convolution) or "merged" (between the two)."""
        if len(self.groups) == 1:
            return "rebuilt"
        return "chain" if all(stop - start == 1 for start, stop in self.groups) else "merged"


class Join(NamedTuple):
    """The product of two neighbouring kernels: everything that follows from their shapes alone.

    Attributes:
        place: index of the left kernel among those that remain.
        macs: multiply-adds.
        elementwise: "right" or "left" where that stage is depthwise, "" for a product of matrices.
        groups: of the product.
        sizes: (out, mid, space of the right kernel), per group.
        paired: shape (out of all groups, space of the right, in, space of the left) of the product of matrices.
        order: the permutation of its axes to (out, in, pairs of space), or () where none is needed.
        shape: of the resulting kernel.
    """

    place: int
    macs: int
    elementwise: str
    groups: int
    sizes: tuple[int, int, int]
    paired: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Merged:
    """Neighbouring stages as one convolution, and the products of kernels that make its kernel, in order."""

    shape: ConvShape
    joins: tuple[Join, ...]

    def kernel(self, kernels: Sequence[Tensor]) -> Tensor:
        """Return the kernel `(out, in/groups, kernel…)` of the one convolution (differentiable)."""
        remaining = list(kernels)
        for join in self.joins:
            left, right = remaining[join.place : join.place + 2]
            remaining[join.place : join.place + 2] = [_product(left, right, join)]
        return remaining[0]


def singles(stages: Sequence[ConvShape]) -> Groups:
    """Return the groups of the plain chain."""
    return tuple((k, k + 1) for k in range(len(stages)))


def merge(stages: Sequence[ConvShape]) -> Merged:
    """Return neighbouring stages as one convolution; the cheapest product of two kernels is always taken next."""
    remaining, joins = list(stages), []
    while len(remaining) > 1:
        pairs = zip(remaining, remaining[1:], strict=False)
        joins.append(min((_join(place, *pair) for place, pair in enumerate(pairs)), key=lambda join: join.macs))
        place = joins[-1].place
        remaining[place : place + 2] = [_after(*remaining[place : place + 2])]
    return Merged(remaining[0], tuple(joins))


def _after(first: ConvShape, second: ConvShape) -> ConvShape:
    """Return the single convolution that is equivalent to two stages over different axes."""

    def times(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a * b for a, b in zip(left, right, strict=True))

    padding: str | tuple[int, ...]
    if isinstance(first.padding, str) or isinstance(second.padding, str):
        padding = first.padding if isinstance(first.padding, str) else second.padding
    else:
        padding = tuple(a + b for a, b in zip(first.padding, second.padding, strict=True))
    modes = {first.padding_mode, second.padding_mode} - {"zeros"}
    return ConvShape(
        first.in_channels,
        second.out_channels,
        kernel_size=times(first.kernel_size, second.kernel_size),
        stride=times(first.stride, second.stride),
        padding=padding,
        dilation=times(first.dilation, second.dilation),
        groups=min(first.groups, second.groups),
        bias=second.bias,
        padding_mode=modes.pop() if modes else "zeros",
    )


def _join(place: int, first: ConvShape, second: ConvShape) -> Join:
    shape = _after(first, second).weight_shape
    out, mid, *here = second.kernel_shape
    axes, space = range(len(here)), math.prod(here)
    elementwise = "right" if second.depthwise else "left" if first.depthwise else ""
    pairs = [side for axis in axes for side in (1 + axis, 2 + len(here) + axis)]
    return Join(
        place,
        macs=math.prod(shape) * (1 if elementwise else mid),
        elementwise=elementwise,
        groups=min(first.groups, second.groups),
        sizes=(out, mid, space),
        paired=(second.groups * out, *here, first.kernel_shape[1], *first.kernel_size),
        order=(0, 1 + len(here), *pairs) if space > 1 else (),
        shape=shape,
    )


def _product(left: Tensor, right: Tensor, join: Join) -> Tensor:
    """Return the kernel of two consecutive stages: the products of entries along each path, summed over the paths."""
    if join.elementwise == "right":
        return left * right  # (mid, in, axes of the left) (mid, 1, axes of the right)
    if join.elementwise == "left":
        if join.groups == 1:
            return right * left.transpose(0, 1)  # (out, mid, …) (1, mid, …)
        return (grouped(right, join.groups) * grouped(left, join.groups).transpose(1, 2)).flatten(0, 1)
    out, mid, space = join.sizes
    lead = (join.groups,) if join.groups > 1 else ()
    if space > 1:
        right = right.reshape(*lead, out, mid, space).transpose(-2, -1)
    product = right.reshape(*lead, out * space, mid) @ left.reshape(*lead, mid, -1)  # out·space, in·space of the left
    return (
        product.reshape(join.paired).permute(join.order).reshape(join.shape)
        if join.order
        else product.reshape(join.shape)
    )


@lru_cache(maxsize=4096)
def schedule_chain(stages: Stages, input: tuple[int, ...], mode: Mode) -> ChainSchedule:
    """Return the cheapest groups for the shape `(batch, channels, space…)` or `(channels, space…)` of the input."""
    costs = _group_costs(stages, input, mode)
    return min(
        (_schedule(groups, costs) for groups in _groupings(len(stages), costs)), key=lambda schedule: schedule.seconds
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def constant_groups(stages: Stages, input: tuple[int, ...], mode: Mode) -> Groups:
    """Return the groups scheduled, as a constant to a tracer."""
    return schedule_chain(stages, tuple(input), Mode(*mode)).groups


@dataclass(frozen=True)
class _Cost:
    """The cost of one group: the figures of `ChainSchedule`, and the bytes of its input, its output and its kernel."""

    macs: int
    launches: int
    input: int
    output: int
    kernel: int
    saved: int
    nanoseconds: float


def _groupings(count: int, costs: dict[Pair, _Cost]) -> Iterator[Groups]:
    """Yield every way to group `count` stages, the plain chain first."""
    for kept in range(count - 1, -1, -1):
        for cuts in combinations(range(1, count), kept):
            groups = tuple(zip((0, *cuts), (*cuts, count), strict=True))
            if all(group in costs for group in groups):
                yield groups


def _schedule(groups: Groups, costs: dict[Pair, _Cost]) -> ChainSchedule:
    chosen = [costs[group] for group in groups]
    saved, peak = 0, 0
    for cost in chosen:
        saved += cost.saved
        peak = max(peak, max(saved, cost.input + cost.kernel) + cost.output)
    return ChainSchedule(
        groups,
        macs=sum(cost.macs for cost in chosen),
        moved_bytes=sum(cost.input + cost.output + 2 * cost.kernel for cost in chosen),
        launches=sum(cost.launches for cost in chosen),
        saved_bytes=saved,
        peak_bytes=peak,
        seconds=1e-9 * sum(cost.nanoseconds for cost in chosen),
    )


def _group_costs(stages: Stages, input: tuple[int, ...], mode: Mode) -> dict[Pair, _Cost]:
    """Return the cost of every group that a schedule may contain; kernels too large to rebuild are left out."""
    axes = len(stages[0].kernel_size)
    batch, sizes = math.prod(input[: -axes - 1]), [input[-axes:]]
    for stage in stages:
        sizes.append(stage.output_size(sizes[-1]))
    costs = {}
    for start, stop in combinations(range(len(stages) + 1), 2):
        merged = merge(stages[start:stop])
        small = stop - start == 1 or math.prod(merged.shape.weight_shape) <= LARGEST_MERGE
        if small and _may_merge(stages, start, stop):
            wanted = mode if start == 0 else mode._replace(input=mode.weights or mode.input)
            costs[start, stop] = _cost(
                merged, (batch * math.prod(sizes[start]), batch * math.prod(sizes[stop])), wanted
            )
    return costs


def _may_merge(stages: Stages, start: int, stop: int) -> bool:
    return stop - start in (1, len(stages)) or all(stage.depthwise for stage in stages[start:stop])


def _cost(merged: Merged, positions: Pair, mode: Mode) -> _Cost:
    """Return the cost of one group, given the positions (batch included) of its input and of its output."""
    shape = merged.shape
    read, written = (
        n * c * mode.itemsize for n, c in zip(positions, (shape.in_channels, shape.out_channels), strict=True)
    )
    rate, stream = _speed(shape, mode.channels_last)
    launch = LAUNCH_DEPTHWISE if shape.depthwise else LAUNCH
    once = launch + positions[1] * _lanes(shape) / rate + (read + written) / stream
    kernel, spent = 0, (1 + mode.weights + mode.input) * once
    for join in merged.joins:
        kernel = math.prod(join.shape) * mode.itemsize
        spent += (1 + 2 * mode.weights) * (
            (JOIN_ENTRIES if join.elementwise else JOIN_MATRICES) + join.macs / FULL + 2 * kernel / CHANNELS_LAST
        )
    return _Cost(
        macs=positions[1] * math.prod(shape.weight_shape) + sum(join.macs for join in merged.joins),
        launches=1 + len(merged.joins),
        input=read,
        output=written,
        kernel=kernel,
        saved=(read if mode.weights else 0) + (kernel if mode.weights or mode.input else 0),
        nanoseconds=spent,
    )


def _speed(shape: ConvShape, channels_last: bool) -> tuple[float, float]:
    """Return multiply-adds and bytes per nanosecond."""
    pointwise = math.prod(shape.kernel_size) == 1
    rate = DEPTHWISE if shape.depthwise else POINTWISE if pointwise else FULL
    if channels_last:
        return rate, CHANNELS_LAST
    return rate, STRIDED_POINTWISE if pointwise else STRIDED


def _lanes(shape: ConvShape) -> int:
    """Return the multiply-adds per position, channels rounded up to full registers: outputs to 16, inputs to 4."""
    out, into, *kernel = shape.kernel_shape
    space = math.prod(kernel)
    if shape.depthwise:
        return _up(shape.out_channels, LANES) * space
    return shape.groups * _up(out, LANES) * _up(into, DEPTH) * space


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
