"""The one file that knows torch's conventions of a convolution: its options, its groups, its padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rankfold.layers._contract import Call
from rankfold.layers._dense import DENSE_TYPES

Size = int | tuple[int, ...]
ARGUMENTS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "bias", "padding_mode"),
)
CONVOLVE: Mapping[int, Callable[..., Tensor]] = {
    row.axes: row.convolve for row in DENSE_TYPES if row.convolve and row.rows == "patches"
}


class ConvShape(NamedTuple):
    """Every option of a convolution, as torch normalises them; `bias` is whether there is one."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    bias: bool
    padding_mode: str

    @classmethod
    def of(cls, conv: Any) -> ConvShape:
        """Read the options of a stock or a factorised convolution."""
        options = {name: getattr(conv, name) for name in ARGUMENTS}
        return cls(**{**options, "bias": conv.bias is not None})

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the constructor of the convolution."""
        return {name: getattr(self, name) for name in ARGUMENTS}

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape `(out, in, kernel…)` of the kernel of one group."""
        return (self.out_channels // self.groups, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight of all groups."""
        return (self.out_channels, *self.kernel_shape[1:])

    @property
    def fan_in(self) -> int:
        """Inputs that one output adds up."""
        return math.prod(self.kernel_shape[1:])

    @property
    def params(self) -> int:
        """Parameters, bias included."""
        return math.prod(self.weight_shape) + self.out_channels * self.bias

    def stage(self, channels: tuple[int, int], axes: Sequence[int], *, groups: int, bias: bool = False) -> ConvShape:
        """Return the stage `channels = (in, out)` that carries kernel, stride, padding and dilation of `axes` alone.

        Padding of one axis commutes with a convolution along another, in every padding mode, and a
        stage before it adds no bias: a chain of such stages pads as the dense layer does, corners included.
        """
        kept = set(axes)

        def only(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
            return tuple(v if axis in kept else neutral for axis, v in enumerate(values))

        padding = self.padding if isinstance(self.padding, str) else only(self.padding, 0)
        padding = padding if kept else (0,) * len(self.kernel_size)
        pads = padding != "valid" and padding != (0,) * len(self.kernel_size)
        return ConvShape(
            *channels,
            kernel_size=only(self.kernel_size, 1),
            stride=only(self.stride, 1),
            padding=padding,
            dilation=only(self.dilation, 1),
            groups=groups,
            bias=bias,
            padding_mode=self.padding_mode if pads else "zeros",
        )

    @property
    def depthwise(self) -> bool:
        """Whether every channel is convolved on its own."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def margins(self) -> list[int]:
        """What `functional.pad` adds on both sides of every axis, the last axis first."""
        if self.padding == "same":
            reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            return [side for total in reversed(reach) for side in (total // 2, total - total // 2)]
        padding = (0,) * len(self.kernel_size) if isinstance(self.padding, str) else self.padding
        return [side for both in reversed(padding) for side in (both, both)]

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the spatial size of the output for a spatial size of the input."""
        if self.padding == "same":
            return size
        padding = (0,) * len(size) if isinstance(self.padding, str) else self.padding
        axes = zip(size, self.kernel_size, self.stride, padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes)


def axis_parts(kernel_size: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Return one part per axis longer than one; axes of extent one go with the first part."""
    long = [axis for axis, extent in enumerate(kernel_size) if extent > 1] or [0]
    short = [axis for axis, extent in enumerate(kernel_size) if extent == 1 and axis not in long]
    return (tuple(sorted([long[0], *short])), *((axis,) for axis in long[1:]))


def chain_macs(stages: Iterable[ConvShape], call: Call) -> int:
    """Return the multiply-adds of one call of a chain of convolutions, batched or not."""
    macs = 0
    for stage in stages:
        axes = len(stage.kernel_size)
        batch, size = math.prod(call.input[: -axes - 1]), stage.output_size(call.input[-axes:])
        macs += batch * math.prod(size) * math.prod(stage.weight_shape)
        call = replace(call, input=(*call.input[: -axes - 1], stage.out_channels, *size))
    return macs


def grouped(weight: Tensor, groups: int) -> Tensor:
    """View a weight `(groups · out, in, kernel…)` as `(groups, out, in, kernel…)`."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def padded(input: Tensor, shape: ConvShape) -> Tensor:
    """Return the input with its margins, filled as the padding mode says."""
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return functional.pad(input, shape.margins, mode=mode)


def convolve(input: Tensor, kernel: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
    """Convolve with the kernel `(out, in/groups, kernel…)` as the stock module with these options does."""
    padding = shape.padding
    if shape.padding_mode != "zeros":
        input = padded(input, shape)
        padding = (0,) * len(shape.kernel_size)
    run = CONVOLVE[len(shape.kernel_size)]
    return run(input, kernel, bias, shape.stride, padding, shape.dilation, shape.groups)


def dense_twin(layer: Any, arguments: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Return the stock convolution that `layer` stands in for, and give the layer its attributes.

    torch checks and normalises the arguments on this twin, which has no storage.
    """
    twin = layer.dense_type(**dict(zip(ARGUMENTS, arguments, strict=True)), device="meta", dtype=dtype)
    for name in {*ARGUMENTS, "transposed", "output_padding"} - {"bias"}:
        setattr(layer, name, getattr(twin, name))
    return twin
