"""A weight as the matrices whose singular values the SVD layers cut, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rankfold._common import one_of
from rankfold.errors import LayerError
from rankfold.layers.conv._conv import axis_parts

SPLITS = ("channel", "spatial")


def axes_of(kernel_size: tuple[int, ...], split: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes of the kernel that the first and the second convolution carry."""
    one_of("split", split, SPLITS, error=LayerError)
    if split == "channel":
        return tuple(range(len(kernel_size))), ()
    if len(kernel_size) == 1:
        raise LayerError("split='spatial' needs two axes of space, and a 1-D convolution has one; take 'channel'")
    first, *rest = axis_parts(kernel_size)
    return first, tuple(axis for part in rest for axis in part)


def unfolded(weight: Tensor, *, groups: int = 1, split: str = "channel") -> Tensor:
    """Return a weight (out, in, kernel…) as matrices (groups, rows, columns), one per group (differentiable).

    Rows are (out, axes of space of the second stage), columns (in, axes of the first), as `split` says; a weight
    without a kernel is one matrix.

    Example:
        >>> import torch
        >>> unfolded(torch.ones(8, 3, 5, 7), split="spatial").shape
        torch.Size([1, 56, 15])
    """
    if weight.ndim == 2:
        return weight[None]
    first, second = axes_of(tuple(weight.shape[2:]), split)
    kernels = weight.reshape(groups, -1, *weight.shape[1:])
    ordered = kernels.permute(0, 1, *_shifted(second), 2, *_shifted(first))
    return ordered.flatten(2 + len(second)).flatten(1, 1 + len(second))


def folded(matrices: Tensor, shape: Sequence[int], *, split: str = "channel") -> Tensor:
    """Return the weight of this shape whose unfolding the matrices (groups, rows, columns) are (differentiable).

    Example:
        >>> import torch
        >>> weight = torch.randn(8, 3, 5, 7)
        >>> torch.equal(folded(unfolded(weight, split="spatial"), weight.shape, split="spatial"), weight)
        True
    """
    if len(shape) == 2:
        return matrices[0]
    groups, (out, into, *kernel) = matrices.shape[0], shape
    first, second = axes_of(tuple(kernel), split)
    order = (0, 1, *_shifted(second), 2, *_shifted(first))
    sizes = (groups, out // groups, *(kernel[a] for a in second), into, *(kernel[a] for a in first))
    kernels = matrices.reshape(sizes).permute([order.index(axis) for axis in range(len(order))])
    return kernels.reshape(tuple(shape))


def _shifted(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis + 3 for axis in axes)
