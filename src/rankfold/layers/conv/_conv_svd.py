"""A convolution as two: the singular value decomposition of the kernel, split by channels or by spatial axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.decompose import separable, separable_errors, singular_values, svd
from rankfold.layers._build import Device
from rankfold.layers._contract import Options, Stages
from rankfold.layers._matrix import product_norm
from rankfold.layers._metric import GroupMetric
from rankfold.layers._ranks import CANDIDATES, break_even, spread, tail_errors
from rankfold.layers._unfolding import axes_of, unfolded
from rankfold.layers.conv._conv import ConvShape, Size, axis_parts
from rankfold.layers.conv._conv_layer import ConvForm, FactorisedConv


def _extent(shape: ConvShape, axes: tuple[int, ...]) -> int:
    return math.prod(shape.kernel_size[axis] for axis in axes)


def _stages(shape: ConvShape, rank: int, *, split: str = "channel") -> dict[str, ConvShape]:
    first, second = axes_of(shape.kernel_size, split)
    width = rank * shape.groups
    return {
        "down": shape.stage((shape.in_channels, width), first, groups=shape.groups),
        "up": shape.stage((width, shape.out_channels), second, groups=shape.groups, bias=shape.bias),
    }


def _full_rank(shape: ConvShape, *, split: str = "channel") -> int:
    first, second = axes_of(shape.kernel_size, split)
    rows, columns, *_ = shape.kernel_shape
    return min(rows * _extent(shape, second), columns * _extent(shape, first))


def _variants(shape: ConvShape) -> tuple[Options, ...]:
    spatial = len(axis_parts(shape.kernel_size)) > 1
    return ({"split": "channel"}, {"split": "spatial"}) if spatial else ({"split": "channel"},)


def _candidates(shape: ConvShape, multiple: int, *, split: str = "channel") -> tuple[int, ...]:
    unit = sum(math.prod(stage.weight_shape) for stage in _stages(shape, 1, split=split).values())
    limit = min(_full_rank(shape, split=split), break_even(unit, math.prod(shape.weight_shape)))
    return spread(limit, multiple, CANDIDATES)


def _unfold(kernel: Tensor, split: str) -> Tensor:
    """Return the kernel as a matrix: (out, axes of the second stage) x (in, axes of the first)."""
    return unfolded(kernel, split=split)[0]


def _factorise(
    kernel: Tensor, rank: int, *, seed: int, metric: GroupMetric | None = None, split: str = "channel"
) -> tuple[Tensor, Tensor]:
    first, second = axes_of(tuple(kernel.shape[2:]), split)
    if metric is None or not second:
        weighted = {} if metric is None else metric.arguments()
        left, right = svd(_unfold(kernel, split), rank, seed=seed, **weighted).balanced()
        left = left.reshape(kernel.shape[0], -1, rank)
    else:
        ordered, moment = _in_order(kernel, metric.moment, first, second)
        found = separable(ordered, rank, second_moment=moment, output_weights=metric.output_weights)
        left, right = found.left, found.right
    columns = [kernel.shape[a + 2] if a in first else 1 for a in range(kernel.ndim - 2)]
    rows = [kernel.shape[a + 2] if a in second else 1 for a in range(kernel.ndim - 2)]
    up = left.transpose(1, 2)
    return right.reshape(rank, kernel.shape[1], *columns), up.reshape(kernel.shape[0], rank, *rows)


def _in_order(kernel: Tensor, moment: Tensor, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the kernel as (out, in, first axes, second axes), and the second moment in that order."""
    axes = (1, *(axis + 2 for axis in (*first, *second)))
    sizes = (kernel.shape[1], math.prod(kernel.shape[a + 2] for a in first), -1)
    ordered = kernel.permute(0, *axes).reshape(kernel.shape[0], *sizes)
    order = torch.arange(len(moment), device=moment.device).reshape(kernel.shape[1:])
    order = order.permute([axis - 1 for axis in axes]).flatten()
    return ordered, moment[order][:, order]


def _matrices(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (groups, out · second, rank) and (groups, rank, in · first): their product is the unfolding."""
    down, up = parts
    return up.flatten(3).transpose(2, 3).flatten(1, 2), down.flatten(2)


def _squared_norm(parts: Sequence[Tensor]) -> Tensor:
    return product_norm(*_matrices(parts))


def _errors(
    kernel: Tensor,
    ranks: Sequence[int],
    *,
    seed: int,  # noqa: ARG001 - nothing is random
    metric: GroupMetric | None = None,
    split: str = "channel",
) -> list[float]:
    """Return tails of singular values; for the spatial split in a metric, the errors of the starting point."""
    first, second = axes_of(tuple(kernel.shape[2:]), split)
    if metric is None or not second:
        weighted = {} if metric is None else metric.arguments()
        return tail_errors(singular_values(_unfold(kernel, split), **weighted), ranks)
    ordered, moment = _in_order(kernel, metric.moment, first, second)
    return separable_errors(ordered, list(ranks), **{**metric.for_curves(), "second_moment": moment})


def _unfoldings(kernel: Tensor, *, split: str = "channel") -> tuple[Tensor]:
    return (_unfold(kernel, split),)


_FORM = ConvForm(
    stages=_stages,
    full_rank=_full_rank,
    variants=_variants,
    candidates=_candidates,
    factorise=_factorise,
    squared_norm=_squared_norm,
    errors=_errors,
    unfoldings=_unfoldings,
)


class _LowRankConv(FactorisedConv):
    form = _FORM
    method: ClassVar[str] = "svd"
    stages: ClassVar[Stages | None] = Stages({"split": "channel"})

    def __init__(  # noqa: PLR0913 - the signature of the dense twin
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        split: str = "channel",
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._assemble(given, dtype, rank=rank, options={"split": split}, device=device)


@final
class LowRankConv1d(_LowRankConv):
    """A 1-D convolution as `Conv1d(in, rank, k)` and `Conv1d(rank, out, 1)`: the truncated SVD of its kernel.

    `weight[t, s, i] = sum_r up[t, r] down[r, s, i]`, the best approximation of this rank in the Frobenius
    norm. The arguments are those of `nn.Conv1d`, then `rank` (of each group), at most
    min(out, in * k) of a group; `split` can only be "channel".

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Zhang et al. 2016, section 3.1 (linear case).

    Example:
        >>> LowRankConv1d(8, 8, 3, rank=2)(torch.ones(1, 8, 10)).shape
        torch.Size([1, 8, 8])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d


@final
class LowRankConv2d(_LowRankConv):
    """A 2-D convolution as two: the truncated SVD of its kernel, split by channels or by spatial axes.

    `split="channel"`: `Conv2d(in, rank, (kh, kw))` then `Conv2d(rank, out, 1)`;
    `split="spatial"`: `Conv2d(in, rank, (kh, 1))` then `Conv2d(rank, out, (1, kw))`. Each is the best
    approximation of its form in the Frobenius norm. The arguments are those of `nn.Conv2d`, then `rank` (of
    each group), at most min(out, in * kh * kw) or min(in * kh, out * kw).

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Jaderberg et al. 2014, scheme 2 (spatial); Zhang et al. 2016, section 3.1 (channel).

    Example:
        >>> layer = LowRankConv2d(8, 16, 3, padding=1, rank=4, split="spatial")
        >>> layer(torch.ones(1, 8, 10, 10)).shape
        torch.Size([1, 16, 10, 10])
        >>> layer.weight.shape, layer.down.weight.shape, layer.up.weight.shape
        (torch.Size([16, 8, 3, 3]), torch.Size([4, 8, 3, 1]), torch.Size([16, 4, 1, 3]))
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d


@final
class LowRankConv3d(_LowRankConv):
    """A 3-D convolution as two: the truncated SVD of its kernel, split by channels or by spatial axes.

    `split="channel"`: the whole kernel to `rank` channels, then 1x1x1. `split="spatial"`: the first axis whose
    kernel is longer than one (depth or time) goes first, `(kd, 1, 1)`, and the other axes follow together,
    `(1, kh, kw)`; a kernel `(1, kh, kw)` is therefore split as in 2-D. The arguments are those of
    `nn.Conv3d`, then `rank` (of each group).

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Tran et al. 2018 (space and time factorised, there in the other order).

    Example:
        >>> layer = LowRankConv3d(4, 6, 3, rank=5, split="spatial")
        >>> layer.down.kernel_size, layer.up.kernel_size
        ((3, 1, 1), (1, 3, 3))
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
