"""A convolution made of stock convolutions in a row: what the decompositions of its kernel share.

A `ConvForm` holds what is particular to one decomposition: functions of a single kernel `(out, in, kernel…)`.
`FactorisedConv` turns it into a layer; groups, options, costs, initialisation, the forward pass and the way back to
the dense layer are the same for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from rankfold.decompose import singular_values
from rankfold.layers._build import (
    Device,
    check_type,
    copy_,
    fill,
    finite_weight,
    fresh_bias_,
    fresh_uniform_,
    in_channels_last,
    is_channels_last,
    laid_as,
    place,
    rescale_,
    take_over,
)
from rankfold.layers._contract import Call, Cost, Metric, Options, Rank, Spectrum
from rankfold.layers._metric import GroupMetric, corrected_bias, group_metrics
from rankfold.layers._ranks import below, check_rank
from rankfold.layers._twin import TwinLayer
from rankfold.layers.conv._conv import ConvShape, chain_macs, convolve, dense_twin, grouped
from rankfold.layers.conv._conv_schedule import (
    ChainSchedule,
    Groups,
    Mode,
    constant_groups,
    merge,
    schedule_chain,
    singles,
)

if TYPE_CHECKING:
    from typing_extensions import Self

PLAIN = (Tensor, nn.Parameter)
"""Tensor types that hold their values themselves; any other may be quantised, sharded or traced."""
MOST_SCHEDULES = 1024
"""Input shapes whose schedule one layer remembers."""


def _mean_values(matrices: Tensor) -> Tensor:
    """Return the root mean square of the singular values over a batch of matrices, whose tail energies it keeps."""
    if len(matrices) == 1:
        return singular_values(matrices[0])
    values: Tensor = torch.linalg.svdvals(matrices)
    return values.square().mean(0).sqrt()


@dataclass(frozen=True)
class ConvForm:
    """How one decomposition writes a kernel as a chain of convolutions.

    `factorise`, `errors` and `unfoldings` get one kernel `(out, in, kernel…)`, the first two its metric as well;
    `squared_norm` gets the weights of all stages, each with a leading axis of groups. All but `variants` and
    `squared_norm` take the options.
    """

    stages: Callable[..., Mapping[str, ConvShape]]
    full_rank: Callable[..., Rank]
    variants: Callable[[ConvShape], tuple[Options, ...]]
    candidates: Callable[..., Iterable[Rank]]
    factorise: Callable[..., Sequence[Tensor]]
    squared_norm: Callable[[Sequence[Tensor]], Tensor]
    errors: Callable[..., Sequence[float]]
    unfoldings: Callable[..., Sequence[Tensor]]


class FactorisedConv(TwinLayer):
    """A convolution as a chain of stock convolutions; the final classes name its form and its dense twin.

    The forward pass runs the stages one by one, or merges neighbouring ones and convolves with the product of their
    kernels: whichever `schedule` finds cheaper for the shape of the input, with or without gradients. The result is
    the same to rounding. Stages are merged only while they are exactly what this class built. As soon as one of them
    is hooked (global hooks count too), wrapped, parametrised, quantised, sharded or pruned to another shape, all stages
    run one by one. They also do where shapes are symbolic, in an exported or compiled program.
    """

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
        self._stage_names, self._stages = tuple(stages), tuple(stages.values())
        self._chain = singles(self._stages)
        self._expected = tuple((name, self.dense_type, stage.weight_shape) for name, stage in stages.items())
        for name, stage in stages.items():
            conv = self.dense_type(**stage.arguments(), device="meta", dtype=twin.weight.dtype)
            self.add_module(name, place(conv, device))
        ends = combinations(range(len(stages) + 1), 2)
        self._merged = {(start, stop): merge(self._stages[start:stop]) for start, stop in ends if stop - start > 1}
        self._schedules: dict[tuple[Any, ...], Groups] = {}
        self._unmerged: set[tuple[Any, ...]] = set()  # shapes for which the plain chain is best in either memory format
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh dense layer, 1/3 for white input, and its bias."""
        shape, weights = ConvShape.of(self), self._weights()
        fresh_uniform_(weights, 1 / 3, generator)
        with torch.no_grad():
            rescale_(weights, self.squared_norm(), shape.out_channels / 3)
        fresh_bias_(self.bias, shape.fan_in, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv gives it
        """Convolve, stage by stage or with stages merged, as scheduled for this input."""
        for start, stop in self._grouping(input):
            if stop - start == 1:
                stage = self._modules[self._stage_names[start]]
                input = stage(input)  # type: ignore[misc]  # batch, channels of the stage, space of the stage
            else:
                kernel, bias = self._kernel(start, stop), self.bias if stop == len(self._stages) else None
                input = convolve(input, kernel, bias, self._merged[start, stop].shape)
        return input

    def schedule(self, input: Tensor | Sequence[int], training: bool | None = None) -> ChainSchedule:
        """Return how the layer would be computed for an input, and what that costs.

        Args:
            input: the input, or its shape (batch, channels, space…) or (channels, space…). For a tensor, its memory
                format and whether it needs a gradient are taken into account.
            training: whether a backward pass follows, with gradients of the weights and of the input. By default, what
                a call here and now would do; given only a shape, the input is assumed to need a gradient where the
                weights do.

        Example:
            >>> import rankfold
            >>> small = rankfold.layers.CPConv2d(1, 10, 3, rank=6)
            >>> large = rankfold.layers.CPConv2d(256, 256, 3, rank=256)
            >>> small.schedule((64, 1, 28, 28), training=True).way, large.schedule((8, 256, 28, 28), training=True).way
            ('rebuilt', 'chain')
        """
        given = input if isinstance(input, Tensor) else None
        mode = Mode(*self._mode(self._weights(), given))
        if training is not None:
            mode = mode._replace(weights=training, input=training)
        return schedule_chain(self._stages, tuple(given.shape if given is not None else input), mode)

    def _grouping(self, input: Tensor) -> Groups:
        """Return the groups of stages scheduled for an input, or the plain chain where stages may not be merged."""
        plain = type(input) in PLAIN
        asks = torch.is_grad_enabled() or torch.compiler.is_compiling()
        # small models feel the cost of anything slower
        if plain and not asks and (input.shape, input.dtype) in self._unmerged:
            return self._chain
        weights = _stock_weights(self._modules, self._expected)
        if weights is None or not plain:
            return self._chain
        mode = self._mode(weights, input)
        if torch.compiler.is_compiling():
            return constant_groups(self._stages, input.shape, mode) if _is_static(input.shape) else self._chain
        if hooks._has_any_global_hook() or torch._C._get_tracing_state():  # type: ignore[no-untyped-call]
            return self._chain
        key = (input.shape, mode)
        groups = self._schedules.get(key)
        if groups is None:
            if len(self._schedules) >= MOST_SCHEDULES:
                self._schedules.clear()
                self._unmerged.clear()
            groups = self._schedules[key] = self._scheduled(input.shape, Mode(*mode))
            if all(
                self._scheduled(input.shape, Mode(last, itemsize=mode[-1])) == self._chain for last in (False, True)
            ):
                self._unmerged.add((input.shape, input.dtype))
        return groups

    def _scheduled(self, shape: Sequence[int], mode: Mode) -> Groups:
        return schedule_chain(self._stages, tuple(shape), mode).groups

    def _mode(self, weights: Sequence[Tensor], input: Tensor | None) -> tuple[bool, bool, bool, int]:
        """Return the fields of a `Mode` as a plain tuple: this runs on every call, and building a `Mode` is slower."""
        last, trained, wanted = any(map(is_channels_last, weights)), False, False
        if torch.is_grad_enabled():
            for weight in weights:
                trained = trained or weight.requires_grad
            wanted = trained if input is None else input.requires_grad
        if input is None:
            return last, trained, wanted, weights[0].element_size()
        last = last or (input.dim() > len(self.kernel_size) + 1 > 2 and input.stride(1) == 1 < input.shape[1])
        return last, trained, wanted, input.element_size()

    def _kernel(self, start: int, stop: int) -> Tensor:
        """Return the kernel of neighbouring stages, in their memory format."""
        weights = self._weights()
        kernel = self._merged[start, stop].kernel(weights[start:stop])
        return in_channels_last(kernel) if any(map(is_channels_last, weights)) else kernel

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with; where there are groups, that of each group."""
        return self._rank

    @property
    def options(self) -> Options:
        """The options besides the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""
        return dict(self._options)

    @property
    def weight(self) -> Tensor:
        """The dense weight `(out, in/groups, kernel…)`, rebuilt from the stages on every read (differentiable)."""
        return self._merged[0, len(self._stages)].kernel(self._weights())

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
        dense = laid_as(take_over(place(dense, last.weight.device), last), self._weights())
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
        """Return candidate ranks, in ascending order of parameters, all with fewer than the dense layer."""
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
    def errors(
        cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Return the relative error of the weight, or of the outputs in a metric, at each rank.

        One factorisation per group serves all ranks. In a metric, the errors of a channel split are those of
        `from_dense`; for the other forms they are the errors of its starting point, on which it may improve a little.
        """
        kernels, full = cls._kernels(dense), cls.full_rank(dense, **options)
        checked = [check_rank(cls.__name__, rank, full) for rank in ranks]
        groups = group_metrics(cls, dense, metric)
        squares, total = [0.0] * len(ranks), 0.0
        for kernel, group in zip(kernels, groups, strict=True):
            if metric is not None and group is None:
                continue  # its inputs never vary, or its outputs carry no weight
            energy = float(kernel.square().sum()) if group is None else group.energy(kernel.flatten(1))
            if energy > 0:  # a group of zeros costs nothing
                relative = cls.form.errors(kernel, checked, seed=seed, **_weighted(group), **options)
                squares = [square + energy * e**2 for square, e in zip(squares, relative, strict=True)]
                total += energy
        errors = (math.sqrt(square / max(total, 1e-300)) for square in squares)
        exact = metric is not None  # `from_dense` then reproduces the weight at full rank
        return tuple(0.0 if exact and rank == full else e for rank, e in zip(checked, errors, strict=True))

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return one spectrum per entry of the rank: with several groups, the root mean square over them."""
        kernels = [cls.form.unfoldings(kernel, **options) for kernel in cls._kernels(dense)]
        stacks = [torch.stack(matrices) for matrices in zip(*kernels, strict=True)]
        return tuple(Spectrum(_mean_values(stack), (stack.shape[1], stack.shape[2])) for stack in stacks)

    @classmethod
    def from_dense(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> Self:
        """Decompose the kernel of each group in float64; keeps options, dtype, device, mode and requires_grad.

        In a metric, the error of the outputs is what is minimised; at full rank the kernel is reproduced in any case.
        """
        layer = cls._hollow(dense, rank, None, options)
        groups = group_metrics(cls, dense, metric)
        if layer.rank == cls.full_rank(dense, **options):
            groups = (None,) * len(groups)
        parts = [
            cls.form.factorise(kernel, layer.rank, seed=seed, **_weighted(group), **options)
            for kernel, group in zip(cls._kernels(dense), groups, strict=True)
        ]
        for weight, factors in zip(layer._weights(), zip(*parts, strict=True), strict=True):
            copy_(weight, torch.cat(factors).reshape(weight.shape))
        copy_(layer.bias, corrected_bias(dense, layer.weight, metric))
        return layer

    @classmethod
    def _kernels(cls, dense: nn.Module) -> tuple[Tensor, ...]:
        """Return the kernels of the groups in float64."""
        check_type(cls, dense, cls.dense_type)
        return grouped(finite_weight(cls, dense), dense.groups).unbind()  # type: ignore[arg-type]

    def _weights(self) -> list[Tensor]:
        return [getattr(self, name).weight for name in self._stage_names]


def _weighted(group: GroupMetric | None) -> dict[str, GroupMetric]:
    return {} if group is None else {"metric": group}


def _stock_weights(
    modules: Mapping[str, Any], expected: Sequence[tuple[str, type[nn.Module], tuple[int, ...]]]
) -> list[Tensor] | None:
    """Return the weights of the stages, or None if any stage is no longer the plain convolution that was built.

    Only then do the weights alone determine what the stages compute.
    """
    weights: list[Tensor] = []
    for name, kind, shape in expected:
        stage = modules[name]
        weight: Any = stage._parameters.get("weight") if type(stage) is kind else None
        if type(weight) not in PLAIN or weight.shape != shape or "forward" in stage.__dict__:
            return None
        if stage._forward_hooks or stage._forward_pre_hooks or stage._backward_hooks or stage._backward_pre_hooks:
            return None
        weights.append(weight)
    return weights


def _is_static(shape: Sequence[Any]) -> bool:
    """Tell whether all sizes are known to the tracer; comparing a symbolic size would specialise the program to it."""
    known = getattr(torch.fx.experimental.symbolic_shapes, "has_static_value", None)  # not in early releases
    return known is not None and all([known(size) for size in shape])
