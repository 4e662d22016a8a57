"""Convolutions as pointwise, core, pointwise: the Tucker-2 decomposition of the kernel over its channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.decompose import metric_tucker, metric_tucker_errors, tucker, tucker_errors
from rankfold.layers._build import Device
from rankfold.layers._contract import Options
from rankfold.layers._metric import GroupMetric
from rankfold.layers._ranks import CANDIDATES_PER_AXIS, spread_to_full
from rankfold.layers.conv._conv import ConvShape, Size
from rankfold.layers.conv._conv_layer import ConvForm, FactorisedConv

Pair = tuple[int, int]


def _stages(shape: ConvShape, rank: Pair) -> dict[str, ConvShape]:
    every = tuple(range(len(shape.kernel_size)))
    out, into = (r * shape.groups for r in rank)
    return {
        "down": shape.stage((shape.in_channels, into), (), groups=shape.groups),
        "core": shape.stage((into, out), every, groups=shape.groups),
        "up": shape.stage((out, shape.out_channels), (), groups=shape.groups, bias=shape.bias),
    }


def _full_rank(shape: ConvShape) -> Pair:
    out, into, *kernel = shape.kernel_shape
    space = math.prod(kernel)
    return min(out, into * space), min(into, out * space)


def _variants(shape: ConvShape) -> tuple[Options, ...]:
    """Return nothing for a 1x1 kernel: Tucker would be the SVD with a superfluous stage."""
    return () if math.prod(shape.kernel_size) == 1 else ({},)


def _candidates(shape: ConvShape, multiple: int) -> Iterator[Pair]:
    out, into = (spread_to_full(full, multiple, CANDIDATES_PER_AXIS) for full in _full_rank(shape))
    space = math.prod(shape.kernel_size)
    # a rank beyond the size of the other unfolding of the core adds parameters but no expressiveness
    return ((r, s) for r in out for s in into if r <= s * space and s <= r * space)


def _factorise(
    kernel: Tensor,
    rank: Pair,
    *,
    seed: int,  # noqa: ARG001 - nothing is random
    metric: GroupMetric | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if metric is None:
        result = tucker(kernel, rank, modes=(0, 1))
    else:
        result = metric_tucker(kernel, rank, **metric.arguments())
    up, down = result.factors
    # The factors are orthonormal, so the core carries all of the scale: share it among the three.
    scale = float(result.core.square().sum() / math.sqrt(rank[0] * rank[1])) ** (1 / 6) or 1.0
    pointwise = (1,) * (kernel.ndim - 2)
    down, up = (down * scale).T, up * scale
    return down.reshape(*down.shape, *pointwise), result.core / scale**2, up.reshape(*up.shape, *pointwise)


def _squared_norm(parts: Sequence[Tensor]) -> Tensor:
    down, core, up = (part.flatten(3) for part in parts)
    up, down = up.squeeze(3), down.squeeze(3)
    half = torch.einsum("gop,gpik->goik", up.mT @ up, core)
    return (half * torch.einsum("goik,gij->gojk", core, down @ down.mT)).sum()


def _errors(
    kernel: Tensor,
    ranks: Sequence[Pair],
    *,
    seed: int,  # noqa: ARG001 - nothing is random
    metric: GroupMetric | None = None,
) -> list[float]:
    """Return the errors of the truncated HOSVD; in a metric, those of the HOSVD in it with the core fitted."""
    if metric is not None:
        return metric_tucker_errors(kernel, ranks, **metric.for_curves())
    surface = tucker_errors(kernel, modes=(0, 1))
    return [float(surface[out - 1, into - 1]) for out, into in ranks]


def _unfoldings(kernel: Tensor) -> tuple[Tensor, Tensor]:
    return kernel.flatten(1), kernel.transpose(0, 1).flatten(1)


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


class _TuckerConv(FactorisedConv):
    form = _FORM
    method: ClassVar[str] = "tucker"

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
        rank: tuple[int, int],
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._assemble(given, dtype, rank=rank, options={}, device=device)


@final
class TuckerConv1d(_TuckerConv):
    """A 1-D convolution as pointwise, core, pointwise: the Tucker-2 decomposition of its kernel.

    `weight[t, s, i] = sum_{p, q} up[t, p] core[p, q, i] down[q, s]`. The arguments are those of
    `nn.Conv1d`, then `rank = (out, in)` (of each group).

    Raises:
        LayerError: a rank out of range.

    Reference:
        Kim et al. 2016, section 3.1.

    Example:
        >>> TuckerConv1d(8, 8, 3, rank=(4, 2))(torch.ones(1, 8, 10)).shape
        torch.Size([1, 8, 8])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d


@final
class TuckerConv2d(_TuckerConv):
    """A 2-D convolution as pointwise, core, pointwise: the Tucker-2 decomposition of its kernel.

    `weight[t, s, i, j] = sum_{p, q} up[t, p] core[p, q, i, j] down[q, s]`, fitted by HOOI; it has
    `in * q + p * q * kh * kw + out * p` weights. The arguments are those of `nn.Conv2d`, then
    `rank = (out, in)` (of each group), at most (out, in).

    Raises:
        LayerError: a rank out of range.

    Reference:
        Kim et al. 2016, section 3.1.

    Example:
        >>> layer = TuckerConv2d(64, 64, 3, stride=2, padding=1, rank=(16, 8))
        >>> layer.down.weight.shape, layer.core.weight.shape, layer.up.weight.shape
        (torch.Size([8, 64, 1, 1]), torch.Size([16, 8, 3, 3]), torch.Size([64, 16, 1, 1]))
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d


@final
class TuckerConv3d(_TuckerConv):
    """A 3-D convolution as pointwise, core, pointwise: the Tucker-2 decomposition of its kernel.

    The core holds the whole kernel `(kd, kh, kw)`. The arguments are those of `nn.Conv3d`, then
    `rank = (out, in)` (of each group).

    Raises:
        LayerError: a rank out of range.

    Reference:
        Kim et al. 2016, section 3.1.

    Example:
        >>> TuckerConv3d(4, 4, 3, rank=(2, 2))(torch.ones(1, 4, 5, 5, 5)).shape
        torch.Size([1, 4, 3, 3, 3])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
