"""The one table of dense layer types: what each computes with its weight, what that costs, and why some are refused.

A new type is one row here and one file that builds its factorised layers; every other file asks this table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from rankfold.layers._contract import Call

RowKind: TypeAlias = Literal["vectors", "patches", "none"]
Norms: TypeAlias = tuple[type[nn.Module], ...]


@dataclass(frozen=True, eq=False)
class DenseType:
    """What the library knows of one type of dense layer.

    Attributes:
        kind: the class, or its qualified name where it belongs to an optional package.
        refused: why no layer of this type may be replaced; "" where it may.
        twin: the stock type that computes the same from a transposed weight; None for a type that is stock itself.
        outputs: name of the attribute that holds the number of outputs; "" where there is none.
        out_axis: the axis of the weight that runs over the outputs, 0 or 1. With 1 and groups, the groups lie along
            axis 0, as in transposed convolutions.
        axes: number of axes of the kernel.
        rows: what the weight is multiplied with: the "vectors" of the input, the "patches" under the kernel, or "none",
            where the layer looks up or scatters.
        fan_in: returns how many values one output of a layer adds up; None where that is not defined.
        macs: returns the multiply-adds of a layer for one call; None where they do not follow from its shape alone.
        convolve: the function of torch that convolves; None for a type that is no convolution.
        norms: the kinds of BatchNorm that normalise the outputs of such a layer channel by channel.
    """

    kind: type[nn.Module] | str
    refused: str = ""
    twin: type[nn.Module] | None = None
    outputs: str = ""
    out_axis: int = 0
    axes: int = 0
    rows: RowKind = "none"
    fan_in: Callable[[Any], int] | None = None
    macs: Callable[[Any, Call], int] | None = None
    convolve: Callable[..., Tensor] | None = None
    norms: Norms = ()

    @property
    def name(self) -> str:
        """The name of the class: "Linear", "Conv2d"."""
        return self.kind.rpartition(".")[2] if isinstance(self.kind, str) else self.kind.__name__

    @property
    def stock(self) -> bool:
        """Whether factorised layers can be built for this very type."""
        return not self.refused and self.twin is None


def _macs_of_vectors(layer: Any, call: Call) -> int:
    return math.prod(call.input[:-1]) * int(layer.weight.numel())


def _macs_of_patches(layer: Any, call: Call) -> int:
    """A convolution uses its whole kernel at each point of the output."""
    return _points(call.output, len(layer.kernel_size)) * int(layer.weight.numel())


def _macs_of_scattering(layer: Any, call: Call) -> int:
    """A transposed convolution uses its whole kernel at each point of the input."""
    return _points(call.input, len(layer.kernel_size)) * int(layer.weight.numel())


def _points(shape: tuple[int, ...], axes: int) -> int:
    return math.prod(shape[: -axes - 1]) * math.prod(shape[-axes:])


def _no_macs(layer: Any, call: Call) -> int:  # noqa: ARG001 - a look-up multiplies nothing
    return 0


def _fan_in_of_linear(layer: Any) -> int:
    return int(layer.in_features)


def _fan_in_of_conv(layer: Any) -> int:
    return int(layer.in_channels // layer.groups * math.prod(layer.kernel_size))


def _one(layer: Any) -> int:  # noqa: ARG001 - a look-up adds nothing up
    return 1


def _convolution(kind: type[nn.Module], axes: int, convolve: Callable[..., Tensor], norm: type[nn.Module]) -> DenseType:
    return DenseType(
        kind,
        outputs="out_channels",
        axes=axes,
        rows="patches",
        fan_in=_fan_in_of_conv,
        macs=_macs_of_patches,
        convolve=convolve,
        norms=(norm, nn.SyncBatchNorm),
    )


def _transposed(kind: type[nn.Module], axes: int, norm: type[nn.Module]) -> DenseType:
    return DenseType(
        kind,
        refused="transposed convolutions are not factorised: their kernel scatters, with in and out exchanged",
        outputs="out_channels",
        out_axis=1,
        axes=axes,
        macs=_macs_of_scattering,
        norms=(norm, nn.SyncBatchNorm),
    )


DENSE_TYPES: tuple[DenseType, ...] = (
    DenseType(
        nn.Linear,
        outputs="out_features",
        rows="vectors",
        fan_in=_fan_in_of_linear,
        macs=_macs_of_vectors,
        norms=(nn.BatchNorm1d,),
    ),
    _convolution(nn.Conv1d, 1, functional.conv1d, nn.BatchNorm1d),
    _convolution(nn.Conv2d, 2, functional.conv2d, nn.BatchNorm2d),
    _convolution(nn.Conv3d, 3, functional.conv3d, nn.BatchNorm3d),
    DenseType(nn.Embedding, fan_in=_one, macs=_no_macs),
    DenseType(
        "transformers.pytorch_utils.Conv1D",
        twin=nn.Linear,
        outputs="nf",
        out_axis=1,
        rows="vectors",
        fan_in=lambda layer: int(layer.weight.shape[0]),
        macs=_macs_of_vectors,
    ),
    _transposed(nn.ConvTranspose1d, 1, nn.BatchNorm1d),
    _transposed(nn.ConvTranspose2d, 2, nn.BatchNorm2d),
    _transposed(nn.ConvTranspose3d, 3, nn.BatchNorm3d),
    DenseType(
        nn.EmbeddingBag,
        refused="nn.EmbeddingBag pools rows inside its own kernel, which a chain of layers cannot do",
        macs=_no_macs,
    ),
    DenseType(
        nn.MultiheadAttention,
        refused="nn.MultiheadAttention and the fast path of nn.TransformerEncoderLayer read its packed "
        "weights directly, without calling a layer: rankfold.separate_attention makes layers of them",
    ),
)
_BY_KIND = {row.kind: row for row in DENSE_TYPES}


def qualified_name(module: nn.Module) -> str:
    """Return the module and the name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def dense_type_of(layer: nn.Module, *, subclasses: bool = False) -> DenseType | None:
    """Return what is known of the type of a dense layer, None for any other module.

    Args:
        layer: any module.
        subclasses: whether a layer of a derived class counts as one of the type.

    Example:
        >>> dense_type_of(nn.Conv2d(3, 8, 3)).axes, dense_type_of(nn.ReLU())
        (2, None)
    """
    found = _BY_KIND.get(type(layer)) or _BY_KIND.get(qualified_name(layer))
    if found is None and subclasses:
        kinds = (row for row in DENSE_TYPES if not isinstance(row.kind, str) and isinstance(layer, row.kind))
        return next(kinds, None)
    return found


def stock_type(kind: object) -> DenseType | None:
    """Return what is known of a class for which factorised layers can be built, None for any other.

    Example:
        >>> stock_type(nn.Linear).rows, stock_type(nn.EmbeddingBag)
        ('vectors', None)
    """
    found = _BY_KIND.get(kind) if isinstance(kind, type) else None
    return found if found is not None and found.stock else None


def stock_names() -> str:
    """Return the names of the types that layers can be factorised of, for an error."""
    return ", ".join(f"nn.{row.name}" for row in DENSE_TYPES if row.stock)


def along_outputs(layer: Any, values: Tensor) -> Tensor:
    """Return one value per output of a dense layer in a shape that multiplies its weight.

    Example:
        >>> import torch
        >>> along_outputs(nn.Conv2d(4, 6, 3), torch.ones(6)).shape
        torch.Size([6, 1, 1, 1])
        >>> along_outputs(nn.ConvTranspose2d(4, 6, 3, groups=2), torch.ones(6)).shape
        torch.Size([4, 3, 1, 1])
    """
    row = dense_type_of(layer, subclasses=True)
    if row is None or not row.out_axis:
        return values.reshape(-1, *[1] * (layer.weight.dim() - 1))
    groups, inputs = getattr(layer, "groups", 1), layer.weight.shape[0]
    per_input = values.reshape(groups, -1).repeat_interleave(inputs // groups, dim=0)
    return per_input.reshape(*per_input.shape, *[1] * (layer.weight.dim() - 2))
