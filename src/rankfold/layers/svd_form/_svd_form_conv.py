"""Convolutions in SVD form: two convolutions with the singular values as a parameter between them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.layers._build import Device, in_channels_last, is_channels_last
from rankfold.layers._contract import Call, Options
from rankfold.layers.conv._conv import ConvShape, Size, dense_twin
from rankfold.layers.conv._conv_svd import LowRankConv1d, LowRankConv2d, LowRankConv3d
from rankfold.layers.svd_form._svd_form import SVDForm


class _SVDConv(SVDForm):
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

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
        twin = dense_twin(self, given, dtype)
        self._twin = (twin,)  # has no storage, and a tuple keeps it from being registered as a submodule
        self._split = split
        self._checked(twin, rank, self.options)
        plain = self.plain(*given, "meta", dtype, rank=rank, split=split)
        self._take_stages(plain, tuple(twin.weight.shape), device)

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv gives it
        """Convolve with diag(s) Vᵀ and then with U, or with their product."""
        weight = self._rebuilt(input.shape)
        if weight is not None:
            if any(is_channels_last(stage.weight) for stage in (self.down, self.up)):
                weight = in_channels_last(weight)
            rebuilt: Tensor = self._twin[0]._conv_forward(input, weight, self.bias)
            return rebuilt  # batch, out, space
        down: Tensor = self.down.weight
        scaled = down * self.scale.view(-1, *(1,) * (down.ndim - 1))
        hidden = self.down._conv_forward(input, scaled, None)  # batch, rank, space of the first stage
        output: Tensor = self.up(hidden)  # batch, out, space
        return output

    @property
    def options(self) -> Options:
        """The options besides the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""
        return {"split": self._split}

    @property
    def _groups(self) -> int:
        return self.groups

    @staticmethod
    def _rows(layer: Any, shape: tuple[int, ...]) -> int:
        return int(math.prod(shape) // (layer.in_channels * math.prod(layer.stride)))

    @staticmethod
    def _positions(dense: Any, call: Call) -> int:
        axes = len(dense.kernel_size)
        return math.prod(call.output[: -axes - 1]) * math.prod(call.output[-axes:])

    @staticmethod
    def _arguments(dense: Any) -> dict[str, Any]:
        return ConvShape.of(dense).arguments()


@final
class SVDConv1d(_SVDConv):
    """A 1-D convolution in SVD form: `Conv1d(in, rank, k)`, times the values, and `Conv1d(rank, out, 1)`.

    The arguments are those of `nn.Conv1d`, then `rank` (of each group), at most min(out, in * k) of a group; `split`
    can only be "channel". `truncated` turns it into a plain `LowRankConv1d`.

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Yang et al. 2020, section 3.1 (channel-wise).

    Example:
        >>> SVDConv1d(8, 8, 3, rank=8)(torch.ones(1, 8, 10)).shape
        torch.Size([1, 8, 8])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d
    plain: ClassVar[Any] = LowRankConv1d


@final
class SVDConv2d(_SVDConv):
    """A 2-D convolution in SVD form, split by channels or by spatial axes.

    `split="channel"`: `Conv2d(in, rank, (kh, kw))`, times the values, then `Conv2d(rank, out, 1)`; `split="spatial"`:
    `Conv2d(in, rank, (kh, 1))`, times the values, then `Conv2d(rank, out, (1, kw))`. The arguments are those of
    `nn.Conv2d`, then `rank` (of each group), at most min(out, in * kh * kw) or min(in * kh, out * kw). `truncated`
    turns it into a plain `LowRankConv2d`.

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Yang et al. 2020, section 3.1.

    Example:
        >>> layer = SVDConv2d(8, 16, 3, padding=1, rank=24, split="spatial")
        >>> layer.down.weight.shape, layer.scale.shape, layer.up.weight.shape
        (torch.Size([24, 8, 3, 1]), torch.Size([24]), torch.Size([16, 24, 1, 3]))
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d
    plain: ClassVar[Any] = LowRankConv2d


@final
class SVDConv3d(_SVDConv):
    """A 3-D convolution in SVD form, split as in `LowRankConv3d`, with the singular values as a parameter.

    The arguments are those of `nn.Conv3d`, then `rank` (of each group) and `split`. `truncated` turns it into a
    plain `LowRankConv3d`.

    Raises:
        LayerError: a rank out of range, or a split that the kernel does not have.

    Reference:
        Yang et al. 2020, section 3.1 (for two spatial axes).

    Example:
        >>> layer = SVDConv3d(4, 6, 3, rank=12, split="spatial")
        >>> layer.down.kernel_size, layer.up.kernel_size
        ((3, 1, 1), (1, 3, 3))
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
    plain: ClassVar[Any] = LowRankConv3d
