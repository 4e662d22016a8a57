"""The tensor-train convolution of Garipov et al. (2016)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rankfold.layers._build import Device, check_type, finite_weight, fresh_bias_
from rankfold.layers._contract import Call, Cost, Rank
from rankfold.layers.conv._conv import ConvShape, Size, convolve, dense_twin
from rankfold.layers.tensor._tt_chain import TTForm, make_form
from rankfold.layers.tensor._tt_contract import in_chunks, matrices_of, sweep_state
from rankfold.layers.tensor._tt_conv_schedule import ConvSchedule, conv_schedules, describe_conv, schedule_conv
from rankfold.layers.tensor._tt_layer import TTLayer
from rankfold.layers.tensor._tt_order import BATCHES, Sweep, bucket
from rankfold.layers.tensor._tt_schedule import TTSchedule, checked_recompute, pick, wants_gradients


class TTConv(TTLayer):
    """A convolution whose kernel is a tensor train: shared filters, then cores over paired channel modes.

    `K[(c_1 ... c_d), (s_1 ... s_d), x, y] = G_0[x, y] G_1[:, c_1, s_1] ... G_d[:, c_d, s_d]`. The forward pass applies
    the `r_0` filters of `G_0` to every input channel and sweeps over the channels, or rebuilds the kernel for
    one convolution, whichever is predicted to be cheaper for the number of output positions, in inference or training.
    With groups the train is that of the kernel `(out, in / groups, kernel…)`, which is always rebuilt: it saves
    parameters, not time. Images are taken in chunks, as `TTLinear` does with rows.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(  # noqa: PLR0913 (the signature of nn.Conv)
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
        rank: Rank,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        recompute: float | None = None,
        redundant: bool = False,
    ) -> None:
        super().__init__()
        values = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        twin = dense_twin(self, values, dtype)
        form = _conv_form(type(self).__name__, ConvShape.of(twin), in_shape, out_shape, redundant)
        self._assemble(form, rank, device, dtype)
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype)) if bias else None
        self.recompute = checked_recompute(type(self).__name__, recompute)
        self._schedules = conv_schedules(self._chain, (form.out_size, form.in_size), groups, recompute)
        self._padded = math.prod(form.in_shape) - in_channels
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh values with the output variance of a fresh dense layer, 1/3 for white input, and its bias."""
        self._fresh(self.out_channels / 3, generator)
        fresh_bias_(self.bias, ConvShape.of(self).fan_in, generator)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv gives it
        """Convolve by the schedule for this number of output positions."""
        axes = len(self.kernel_size)
        maps = input if input.dim() == axes + 2 else input.unsqueeze(0)
        positions = math.prod(ConvShape.of(self).output_size(tuple(maps.shape[2:])))
        cores = list(self.cores)
        schedule = pick(self._schedules, maps.shape[0] * positions, wants_gradients(cores))
        if schedule.sweep is None:
            output = convolve(maps, self.weight, self.bias, ConvShape.of(self))
        else:
            output = self._chained(maps, cores, schedule, schedule.sweep, positions)
        return output if input.dim() == axes + 2 else output.squeeze(0)

    def _chained(
        self, maps: Tensor, cores: Sequence[Tensor], schedule: ConvSchedule, sweep: Sweep, positions: int
    ) -> Tensor:
        """Apply the shared filters to every channel, then the train over the channels, a few images at a time."""
        first, *channels = cores
        filters = first.shape[3]
        kernel = first.permute(3, 0, 1, 2).reshape(filters, 1, *self.kernel_size)
        kernel = kernel.repeat(self.in_channels, *(1,) * (kernel.dim() - 1))  # in r, 1, kernel
        filtering = ConvShape.of(self)._replace(groups=self.in_channels)

        def run(part: Tensor, kernel: Tensor, *matrices: Tensor) -> Tensor:
            part = convolve(part, kernel, None, filtering)  # batch, in r, space
            space = part.shape[2:]
            state = part.reshape(part.shape[0], self.in_channels, filters, -1)
            state = state.transpose(1, 2)  # batch, r, in, positions
            if self._padded:
                state = functional.pad(state, (0, 0, 0, self._padded))
            output = sweep_state(state.flatten(1, 2), matrices, sweep)  # batch, out, positions
            output = output[:, : self.out_channels]
            if self.bias is not None:
                output = output + self.bias.unsqueeze(1).to(output.dtype)
            return output.reshape(output.shape[0], self.out_channels, *space)

        chunk = 0 if torch.compiler.is_compiling() else schedule.images(positions)
        return in_chunks(run, maps, [kernel, *matrices_of(channels, sweep)], chunk=chunk, recompute=schedule.recompute)

    def schedule(self, input: Sequence[int], training: bool | None = None) -> TTSchedule:
        """Return how the layer would be computed for an input of this shape, and what that costs.

        Args:
            input: the shape (batch, channels, space…) or (channels, space…).
            training: whether a backward pass follows; by default, whether it would after a call here and now.
        """
        axes, shape = len(self.kernel_size), tuple(input)
        batch = shape[0] if len(shape) == axes + 2 else 1
        positions = math.prod(ConvShape.of(self).output_size(shape[-axes:]))
        cores = list(self.cores)
        mode = wants_gradients(cores) if training is None else training
        schedule = pick(self._schedules, batch * positions, mode)
        sizes = (self._form.out_size, self._form.in_size)
        return describe_conv(self._chain, sizes, schedule, (batch, positions), mode, cores[0].element_size())

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in / groups, kernel…), rebuilt from the cores on every read (differentiable)."""
        return self._matrix().permute(1, 2, 0).reshape(ConvShape.of(self).weight_shape)

    @classmethod
    def cost(cls, dense: nn.Module, calls: Sequence[Call], *, rank: Rank, **options: Any) -> Cost:
        """Return parameters, and multiply-adds as scheduled for the output positions of each call."""
        form = cls._form_of(dense, **options)
        shape, chain = ConvShape.of(dense), form.chain(rank)
        axes, macs = len(shape.kernel_size), 0
        for call in calls:
            rows = math.prod(call.output[: -axes - 1]) * math.prod(call.output[-axes:])
            schedule = schedule_conv(chain, (form.out_size, form.in_size), shape.groups, BATCHES[bucket(rows)])
            macs += schedule.macs(rows)
        return Cost(form.params(rank) + shape.out_channels * shape.bias, macs)

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        return ConvShape.of(dense).arguments()

    @classmethod
    def _form_of(
        cls,
        dense: Any,
        *,
        in_shape: Sequence[int] | None = None,
        out_shape: Sequence[int] | None = None,
        recompute: float | None = None,
        redundant: bool = False,
    ) -> TTForm:
        check_type(cls, dense, cls.dense_type)
        checked_recompute(cls.__name__, recompute)
        return _conv_form(cls.__name__, ConvShape.of(dense), in_shape, out_shape, redundant)

    @classmethod
    def _matrix_of(cls, dense: Any) -> Tensor:
        check_type(cls, dense, cls.dense_type)
        return finite_weight(cls, dense).flatten(2).permute(2, 0, 1)


def _conv_form(
    owner: str,
    shape: ConvShape,
    in_shape: Sequence[int] | None,
    out_shape: Sequence[int] | None,
    redundant: bool,
) -> TTForm:
    sizes = (shape.out_channels, shape.in_channels // shape.groups)
    return make_form(owner, sizes, in_shape, out_shape, lead=math.prod(shape.kernel_size), redundant=redundant)


@final
class TTConv1d(TTConv):
    """A 1-D convolution as shared filters and a tensor train over the channels.

    The arguments are those of `nn.Conv1d`, then `rank` and the options of `TTConv2d`.

    Reference:
        Garipov, Podoprikhin, Novikov, Vetrov 2016, Ultimate tensorization.

    Example:
        >>> layer = TTConv1d(64, 64, 3, rank=(3, 8, 8), in_shape=(4, 4, 4), out_shape=(4, 4, 4), bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        1545
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d


@final
class TTConv2d(TTConv):
    """A 2-D convolution as shared filters and a tensor train over the channels.

    The arguments are those of `nn.Conv2d`; then `rank`, a cap for every bond, clipped to what each can have, or one
    per bond, the number of filters first; `in_shape` and `out_shape`, as many dims each, whose products are at
    least `in_channels / groups` and `out_channels` (padded where larger, by default balanced). The train spans
    all groups. `recompute` and `redundant` are those of `TTLinear`, where the chain of products keeps intermediates;
    a rebuilt kernel has none. A rank out of range or unfit shapes raise a `LayerError`.

    Reference:
        Garipov, Podoprikhin, Novikov, Vetrov 2016, Ultimate tensorization.

    Example:
        >>> layer = TTConv2d(64, 64, 3, rank=(3, 8, 8), in_shape=(4, 4, 4), out_shape=(4, 4, 4), bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        1563
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d


@final
class TTConv3d(TTConv):
    """A 3-D convolution as shared filters and a tensor train over the channels.

    The arguments are those of `nn.Conv3d`, then `rank` and the options of `TTConv2d`.

    Reference:
        Garipov, Podoprikhin, Novikov, Vetrov 2016, Ultimate tensorization.

    Example:
        >>> layer = TTConv3d(64, 64, 3, rank=(3, 8, 8), in_shape=(4, 4, 4), out_shape=(4, 4, 4), bias=False)
        >>> sum(p.numel() for p in layer.parameters())
        1617
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
