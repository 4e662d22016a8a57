"""Flexible layers over the channels of images, which replace 1x1 convolutions and the functions between them."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from rankfold.errors import LayerError
from rankfold.layers._build import Device, named
from rankfold.layers._dense import dense_type_of
from rankfold.layers.flexible._flexible import FlexibleLayer

POINTWISE = {"kernel_size": 1, "stride": 1, "padding": 0, "groups": 1}


class _FlexibleConv(FlexibleLayer):
    """What flexible layers over channels share; the final classes say how many spatial axes there are."""

    kernel: ClassVar[tuple[int, ...]] = (1,)
    channels: ClassVar[int]
    """The dim of the channels, counted from the last one: there may be a batch before it or not."""

    def __init__(  # noqa: PLR0913 (the signature of a convolution of kernel 1, then the options)
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
        basis: str = "piecewise",
        size: int = 8,
        element: str = "",
    ) -> None:
        neurons = {"rank": rank, "basis": basis, "size": size, "element": element}
        super().__init__((in_channels, out_channels), bias, device, dtype, **neurons)
        self.in_channels, self.out_channels = in_channels, out_channels

    def forward(self, input: Tensor) -> Tensor:  # the name that nn.Conv2d gives it
        """Apply both factors and the activations between them, position by position."""
        coordinates = self.down(input)  # …, rank, *positions
        hidden = self.activation(coordinates.movedim(self.channels, -1)).movedim(-1, self.channels)  # the same
        output: Tensor = self.up(hidden)  # …, out, *positions
        return output

    def extra_repr(self) -> str:
        """Return the sizes, the rank and the basis."""
        return f"{self.in_channels}, {self.out_channels}, {named(self.rank, dict(self.options))}"


@final
class FlexibleConv1d(_FlexibleConv):
    """`FlexibleLinear` over the channels of (N, C, L) or (C, L): convolutions of kernel 1, position by position.

    See `FlexibleConv2d`.

    Example:
        >>> FlexibleConv1d(16, 4, rank=3)(torch.ones(2, 16, 5)).shape
        torch.Size([2, 4, 5])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv1d
    channels: ClassVar[int] = -2


@final
class FlexibleConv2d(_FlexibleConv):
    """`FlexibleLinear` over the channels of (N, C, H, W) or (C, H, W), position by position.

    `Conv2d(in, rank, 1)`, `FlexibleActivation(rank, basis)`, `Conv2d(rank, out, 1)`. It replaces several 1x1
    convolutions and the functions between them (`rankfold.train.decouple` fits it to data) or is trained from scratch.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether the output has a bias.
        device: where to put the parameters.
        dtype: of the parameters.
        rank: the number of neurons.
        basis: "piecewise" (linear between trainable knots), "legendre" or "chebyshev" (polynomials of degree `size`),
            "spline" (cubic B-splines on `size - 3` equal intervals).
        size: the number of functions per neuron.
        element: "relu", "tanh" or "gelu" for one more function, `element(stretch * u + shift)`; "" for none.

    Raises:
        RankfoldError: a rank below 1, an unknown basis or element, a size that is too small.

    Example:
        >>> layer = FlexibleConv2d(64, 10, rank=8)
        >>> layer(torch.ones(2, 64, 7, 7)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 10, 7, 7]), 730)
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv2d
    channels: ClassVar[int] = -3


@final
class FlexibleConv3d(_FlexibleConv):
    """`FlexibleLinear` over the channels of (N, C, D, H, W) or (C, D, H, W), position by position.

    See `FlexibleConv2d`.

    Example:
        >>> FlexibleConv3d(16, 4, rank=3)(torch.ones(2, 16, 5, 5, 5)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Conv3d
    channels: ClassVar[int] = -4


def pointwise_twin(layer: Any) -> nn.Linear:
    """Return the linear layer that a layer of a block applies to each row or position, sharing its weights.

    Raises:
        LayerError: neither a linear layer nor a convolution of kernel 1, or one with a stride, padding or groups.

    Example:
        >>> pointwise_twin(nn.Conv2d(8, 4, 1))
        Linear(in_features=8, out_features=4, bias=True)
    """
    if isinstance(layer, nn.Linear):
        return layer
    row = dense_type_of(layer, subclasses=True)
    if row is None or row.rows != "patches":
        raise LayerError(f"a {type(layer).__name__} is neither a linear layer nor a convolution of kernel 1")
    for name, wanted in POINTWISE.items():
        given: Any = getattr(layer, name)
        values = given if isinstance(given, tuple) else (given,)
        # "same" and "valid" pad nothing where the kernel, which comes first here, is 1
        if any(value != wanted for value in values) and not isinstance(given, str):
            raise LayerError(
                f"a {type(layer).__name__} with {name}={given} does not see each position alone: a flexible layer "
                "replaces convolutions with kernel 1, stride 1, no padding and no groups"
            )
    twin = nn.Linear(layer.in_channels, layer.out_channels, device="meta")
    twin.weight = nn.Parameter(layer.weight.detach().flatten(1), requires_grad=False)
    twin.bias = layer.bias
    return twin.train(layer.training)
