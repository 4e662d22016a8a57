"""The one file that knows torch's conventions of a convolution: its options, its groups, its chain of stages.

A decomposition of a kernel is a row `ConvForm` of functions on one kernel `(out, in, kernel…)`;
`FactorisedConv` makes a layer of it: groups, options, costs, initialisation and the way back are
the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.decompose import singular_values
from rankfold.layers._build import (
    Device,
    check_type,
    copy_,
    fill,
    finite_weight,
    fresh_bias_,
    fresh_uniform_,
    place,
    rescale_,
    take_over,
)
from rankfold.layers._contract import Call, Cost, Options, Rank, Spectrum
from rankfold.layers._ranks import below, check_rank
from rankfold.layers._twin import TwinLayer

if TYPE_CHECKING:
    from typing_extensions import Self

Size = int | tuple[int, ...]
ARGUMENTS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
    *("groups", "bias", "padding_mode"),
)
STOCK: Mapping[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class ConvShape:
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


def dense_twin(layer: Any, arguments: Sequence[Any], dtype: torch.dtype | None) -> Any:
    """Return the stock convolution that `layer` stands in for, and give the layer its attributes.

    torch checks and normalises the arguments on this twin, which has no storage.
    """
    twin = layer.dense_type(**dict(zip(ARGUMENTS, arguments, strict=True)), device="meta", dtype=dtype)
    for name in {*ARGUMENTS, "transposed", "output_padding"} - {"bias"}:
        setattr(layer, name, getattr(twin, name))
    return twin


def _mean_values(matrices: Tensor) -> Tensor:
    """Return the root mean square of the singular values over a batch of matrices: its tails are their tails."""
    if len(matrices) == 1:
        return singular_values(matrices[0])
    values: Tensor = torch.linalg.svdvals(matrices)
    return values.square().mean(0).sqrt()


@dataclass(frozen=True)
class ConvForm:
    """How one decomposition writes a kernel as a chain of convolutions.

    `factorise`, `errors` and `unfoldings` see one kernel `(out, in, kernel…)`; `rebuild` and `squared_norm` see
    the weights of all stages, their groups in front. All but `variants` and `squared_norm` take the options.
    """

    stages: Callable[..., Mapping[str, ConvShape]]
    full_rank: Callable[..., Rank]
    variants: Callable[[ConvShape], tuple[Options, ...]]
    candidates: Callable[..., Iterable[Rank]]
    factorise: Callable[..., Sequence[Tensor]]
    rebuild: Callable[..., Tensor]
    squared_norm: Callable[[Sequence[Tensor]], Tensor]
    errors: Callable[..., Sequence[float]]
    unfoldings: Callable[..., Sequence[Tensor]]


class FactorisedConv(TwinLayer):
    """A convolution as a chain of stock convolutions; the final classes name its form and its dense twin."""

    form: ClassVar[ConvForm]
    method: ClassVar[str]

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _assemble(
        self,
        arguments: tuple[Any, ...],
        dtype: torch.dtype | None,
        *,
        rank: Rank,
        options: dict[str, Any],
        device: Device,
    ) -> None:
        """Build the stages."""
        twin = dense_twin(self, arguments, dtype)
        shape = ConvShape.of(twin)
        full = self.form.full_rank(shape, **options)
        self._rank, self._options = check_rank(type(self).__name__, rank, full), options
        stages = self.form.stages(shape, self._rank, **options)
        self._stage_names = tuple(stages)
        for name, stage in stages.items():
            conv = STOCK[len(shape.kernel_size)](**stage.arguments(), device="meta", dtype=twin.weight.dtype)
            self.add_module(name, place(conv, device))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh dense layer, 1/3 for white input, and its bias."""
        shape, weights = ConvShape.of(self), self._weights()
        fresh_uniform_(weights, 1 / 3, generator)
        with torch.no_grad():
            rescale_(weights, self.squared_norm(), shape.out_channels / 3)
        fresh_bias_(self.bias, shape.fan_in, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv gives it
        """Convolve stage by stage."""
        for name in self._stage_names:
            input = getattr(self, name)(input)  # batch, channels of the stage, space of the stage
        return input

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with; of each group, where there are groups."""
        return self._rank

    @property
    def options(self) -> Options:
        """The options beside the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""
        return dict(self._options)

    @property
    def weight(self) -> Tensor:
        """The dense weight `(out, in/groups, kernel…)`, rebuilt from the stages on every read (differentiable)."""
        shape = ConvShape.of(self)
        parts = [grouped(weight, shape.groups) for weight in self._weights()]
        return self.form.rebuild(parts, shape, **self._options).reshape(shape.weight_shape)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, which the last stage adds."""
        bias: nn.Parameter | None = getattr(self, self._stage_names[-1]).bias
        return bias

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from Gram matrices of the stages (differentiable)."""
        parts = [grouped(weight, self.groups) for weight in self._weights()]
        return self.form.squared_norm(parts)

    def to_dense(self) -> nn.Module:
        """Return the stock convolution that computes the same function."""
        last = getattr(self, self._stage_names[-1])
        dense = self.dense_type(**ConvShape.of(self).arguments(), device="meta", dtype=last.weight.dtype)
        dense = take_over(place(dense, last.weight.device), last)
        fill(dense, self.weight, self.bias)
        return dense

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        return ConvShape.of(dense).arguments()

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return the option sets with which some rank has fewer parameters than the dense layer."""
        options = cls.form.variants(ConvShape.of(dense))
        return tuple(chosen for chosen in options if cls.rank_grid(dense, **chosen))

    @classmethod
    def full_rank(cls, dense: nn.Module, **options: Any) -> Rank:
        """Return the rank (of each group) at which the dense layer is reproduced to rounding."""
        return cls.form.full_rank(ConvShape.of(dense), **options)

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1, **options: Any) -> tuple[Rank, ...]:
        """Return candidate ranks, ascending in parameters, all with fewer than the dense layer."""
        shape = ConvShape.of(dense)

        def params(rank: Rank) -> int:
            return sum(stage.params for stage in cls.form.stages(shape, rank, **options).values())

        return below(shape.params, cls.form.candidates(shape, multiple, **options), params)

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return parameters and multiply-adds over the calls, each stage at its own resolution."""
        shape = ConvShape.of(dense)
        checked = check_rank(cls.__name__, rank, cls.form.full_rank(shape, **options))
        stages = tuple(cls.form.stages(shape, checked, **options).values())
        return Cost(sum(stage.params for stage in stages), sum(chain_macs(stages, call) for call in calls))

    @classmethod
    def errors(cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, **options: Any) -> tuple[float, ...]:
        """Return the relative error of the weight at each rank, from one factorisation per group."""
        kernels, full = cls._kernels(dense), cls.full_rank(dense, **options)
        checked = [check_rank(cls.__name__, rank, full) for rank in ranks]
        energies = [float(kernel.square().sum()) for kernel in kernels]
        squares = [0.0] * len(ranks)
        for kernel, energy in zip(kernels, energies, strict=True):
            if energy:  # a group of zeros costs nothing
                relative = cls.form.errors(kernel, checked, seed=seed, **options)
                squares = [square + energy * e**2 for square, e in zip(squares, relative, strict=True)]
        return tuple(math.sqrt(square / max(sum(energies), 1e-300)) for square in squares)

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return a spectrum per entry of the rank; of groups, the root mean square over them."""
        kernels = [cls.form.unfoldings(kernel, **options) for kernel in cls._kernels(dense)]
        stacks = [torch.stack(matrices) for matrices in zip(*kernels, strict=True)]
        return tuple(Spectrum(_mean_values(stack), (stack.shape[1], stack.shape[2])) for stack in stacks)

    @classmethod
    def from_dense(cls, dense: nn.Module, *, rank: Rank, seed: int = 0, **options: Any) -> Self:
        """Decompose the kernel of each group in float64; keeps options, dtype, device, mode and requires_grad."""
        layer = cls._hollow(dense, rank, None, options)
        parts = [cls.form.factorise(kernel, layer.rank, seed=seed, **options) for kernel in cls._kernels(dense)]
        for weight, factors in zip(layer._weights(), zip(*parts, strict=True), strict=True):
            copy_(weight, torch.cat(factors).reshape(weight.shape))
        copy_(layer.bias, dense.bias)  # type: ignore[arg-type]
        return layer

    @classmethod
    def _kernels(cls, dense: nn.Module) -> tuple[Tensor, ...]:
        """Return the kernels of the groups in float64."""
        check_type(cls, dense, cls.dense_type)
        return grouped(finite_weight(cls, dense), dense.groups).unbind()  # type: ignore[arg-type]

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name).weight for name in self._stage_names]
