"""Convolutions as pointwise, depthwise, pointwise: the canonical polyadic decomposition of the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.decompose import cp, cp_errors, full_cp_rank, metric_cp, metric_cp_errors
from rankfold.layers._build import Device
from rankfold.layers._contract import Options
from rankfold.layers._metric import GroupMetric
from rankfold.layers._ranks import CANDIDATES, break_even, spread
from rankfold.layers.conv._conv import ConvShape, Size, axis_parts
from rankfold.layers.conv._conv_layer import ConvForm, FactorisedConv


def _parts(kernel_size: tuple[int, ...], separable: bool) -> tuple[tuple[int, ...], ...]:
    """Return the axes that each depthwise convolution carries."""
    return axis_parts(kernel_size) if separable else (tuple(range(len(kernel_size))),)


def _stages(shape: ConvShape, rank: int, *, separable: bool = False) -> dict[str, ConvShape]:
    width = rank * shape.groups
    parts = _parts(shape.kernel_size, separable)
    names = ["depthwise"] if len(parts) == 1 else [f"depthwise{k}" for k in range(len(parts))]
    return {
        "down": shape.stage((shape.in_channels, width), (), groups=shape.groups),
        **{name: shape.stage((width, width), axes, groups=width) for name, axes in zip(names, parts, strict=True)},
        "up": shape.stage((width, shape.out_channels), (), groups=shape.groups, bias=shape.bias),
    }


def _modes(shape: ConvShape, separable: bool) -> tuple[int, ...]:
    """Return the dims of the tensor to decompose: out, in, and one per depthwise convolution."""
    space = [math.prod(shape.kernel_size[a] for a in axes) for axes in _parts(shape.kernel_size, separable)]
    return (*shape.kernel_shape[:2], *space)


def _full_rank(shape: ConvShape, *, separable: bool = False) -> int:
    return full_cp_rank(_modes(shape, separable))


def _variants(shape: ConvShape) -> tuple[Options, ...]:
    """Return nothing where CP would be the SVD with superfluous stages: no spatial axes, or no channels to mix."""
    if math.prod(shape.kernel_size) == 1 or shape.kernel_shape[:2] == (1, 1):
        return ()
    separable = len(axis_parts(shape.kernel_size)) > 1
    return ({"separable": False}, {"separable": True}) if separable else ({"separable": False},)


def _candidates(shape: ConvShape, multiple: int, *, separable: bool = False) -> tuple[int, ...]:
    modes = _modes(shape, separable)
    limit = min(full_cp_rank(modes), break_even(sum(modes), math.prod(modes)))
    return spread(limit, multiple, CANDIDATES)


def _tensor(kernel: Tensor, separable: bool) -> Tensor:
    """Return the kernel with axes out, in and one per depthwise convolution."""
    parts = _parts(tuple(kernel.shape[2:]), separable)
    space = [math.prod(kernel.shape[a + 2] for a in axes) for axes in parts]
    return kernel.permute(0, 1, *(a + 2 for axes in parts for a in axes)).reshape(*kernel.shape[:2], *space)


def _exact(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the CP factors at full rank: the fibres of the longest mode, each at its unit coordinates."""
    longest = max(range(tensor.ndim), key=lambda mode: tensor.shape[mode])
    others = [mode for mode in range(tensor.ndim) if mode != longest]
    fibres = tensor.permute(longest, *others).flatten(1)
    size = fibres.norm(dim=0).pow(1 / tensor.ndim)
    places = torch.cartesian_prod(*(torch.arange(tensor.shape[mode]) for mode in others)).reshape(-1, len(others))
    factors = {
        mode: nn.functional.one_hot(places[:, k], tensor.shape[mode]).to(fibres).T * size
        for k, mode in enumerate(others)
    }
    factors[longest] = fibres / size.pow(len(others)).clamp_min(1e-300)
    return tuple(factors[mode] for mode in range(tensor.ndim))


def _factorise(
    kernel: Tensor, rank: int, *, seed: int, metric: GroupMetric | None = None, separable: bool = False
) -> tuple[Tensor, ...]:
    tensor = _tensor(kernel, separable)
    if rank == full_cp_rank(tensor.shape):
        out, into, *space = _exact(tensor)
    elif metric is None:
        out, into, *space = cp(tensor, rank, seed=seed).factors
    else:
        out, into, *space = metric_cp(tensor, rank, seed=seed, **_reordered(kernel, metric, separable)).factors
    parts = _parts(tuple(kernel.shape[2:]), separable)
    depthwise = [
        factor.T.reshape(rank, 1, *(kernel.shape[a + 2] if a in axes else 1 for a in range(kernel.ndim - 2)))
        for factor, axes in zip(space, parts, strict=True)
    ]
    pointwise = (1,) * (kernel.ndim - 2)
    return (into.T.reshape(rank, -1, *pointwise), *depthwise, out.reshape(-1, rank, *pointwise))


def _squared_norm(parts: Sequence[Tensor]) -> Tensor:
    down, *depthwise, up = (part.flatten(2) for part in parts)
    gram = up.mT @ up
    for factor in (down, *depthwise):
        gram = gram * (factor @ factor.mT)
    return gram.sum()


def _reordered(kernel: Tensor, metric: GroupMetric, separable: bool) -> dict[str, Any]:
    """Return the metric in the order of the axes of `_tensor`, as arguments of a decomposition."""
    indices = torch.arange(len(metric.moment), device=metric.moment.device).reshape(1, *kernel.shape[1:])
    order = _tensor(indices, separable).flatten()
    return {"second_moment": metric.moment[order][:, order], "output_weights": metric.output_weights}


def _errors(
    kernel: Tensor,
    ranks: Sequence[int],
    *,
    seed: int,
    metric: GroupMetric | None = None,
    separable: bool = False,
) -> list[float]:
    """Return estimates from short fits at a few ranks; in a metric, with the output factor fitted to that metric."""
    tensor = _tensor(kernel, separable)
    full = full_cp_rank(tensor.shape)
    inner = [rank for rank in ranks if rank < full]
    if metric is None:
        fitted = iter(cp_errors(tensor, inner, seed=seed) if inner else ())
    else:
        fitted = iter(metric_cp_errors(tensor, inner, seed=seed, **_reordered(kernel, metric, separable)))
    return [next(fitted) if rank < full else 0.0 for rank in ranks]


def _unfoldings(kernel: Tensor, *, separable: bool = False) -> tuple[Tensor, ...]:
    """Return nothing: no spectrum reveals the CP rank."""
    del kernel, separable
    return ()


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


class _CPConv(FactorisedConv):
    form = _FORM
    method: ClassVar[str] = "cp"

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
        separable: bool = False,
    ) -> None:
        super().__init__()
        given = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        self._assemble(given, dtype, rank=rank, options={"separable": separable}, device=device)


@final
class CPConv1d(_CPConv):
    """A 1-D convolution as pointwise, depthwise, pointwise: the CP decomposition of its kernel.

    `weight[t, s, i] = sum_r up[t, r] down[r, s] depthwise[r, i]`, with rank * (in + k + out) weights. The
    arguments are those of `nn.Conv1d`, then `rank` (of each group); `separable` makes no difference with one axis.

    Raises:
        LayerError: a rank out of range.

    Reference:
        Lebedev et al. 2015, section 3.2; stable fit as in Phan et al. 2020.

    Example:
        >>> CPConv1d(8, 8, 3, rank=4)(torch.ones(1, 8, 10)).shape
        torch.Size([1, 8, 8])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d


@final
class CPConv2d(_CPConv):
    """A 2-D convolution as pointwise, depthwise, pointwise: the CP decomposition of its kernel.

    `weight[t, s, i, j] = sum_r up[t, r] down[r, s] depthwise[r, i, j]`, with rank * (in + kh * kw + out) weights;
    with `separable=True`, `depthwise[r, i, j] = depthwise0[r, i] depthwise1[r, j]` in two convolutions and
    rank * (in + kh + kw + out) weights. The arguments are those of `nn.Conv2d`, then `rank` (of each group);
    a CP rank may exceed the number of channels.

    Raises:
        LayerError: a rank out of range.

    Reference:
        Lebedev et al. 2015, section 3.2; stable fit as in Phan et al. 2020.

    Example:
        >>> sum(p.numel() for p in CPConv2d(10, 10, 3, rank=3, separable=True, bias=False).parameters())
        78
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d


@final
class CPConv3d(_CPConv):
    """A 3-D convolution as pointwise, depthwise, pointwise: the CP decomposition of its kernel.

    The depthwise stage holds the whole kernel `(kd, kh, kw)`, or, with `separable=True`, one axis after the
    other. The arguments are those of `nn.Conv3d`, then `rank` (of each group).

    Raises:
        LayerError: a rank out of range.

    Reference:
        Lebedev et al. 2015, section 3.2; stable fit as in Phan et al. 2020.

    Example:
        >>> CPConv3d(4, 4, 3, padding="same", rank=3)(torch.ones(1, 4, 5, 5, 5)).shape
        torch.Size([1, 4, 5, 5, 5])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
