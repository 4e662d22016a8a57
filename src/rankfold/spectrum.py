"""Spectra of operators: singular values of convolutions, bounds on spectral norms, effective rank.

The stable rank of a spectrum is `rankfold.ranks.stable_rank`.
"""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rankfold._common import Float, check_dense
from rankfold.errors import DecompositionError

__all__ = ["conv_singular_values", "conv_symbol", "effective_rank", "spectral_norm_bounds"]


def conv_symbol(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """Return the symbol of a convolution on the Fourier grid: `F(w) = sum_k K[:, :, k] exp(-i w k)`.

    A circular convolution is block diagonal in the Fourier basis, with these blocks. With zero padding, the spectral
    norm is at most the largest norm of a block, and the singular values tend to those of the blocks as the size grows.

    Args:
        kernel: `(out, in, *kernel size)`, one to three spatial dims, any float dtype.
        size: size of the input in these dims, each at least that of the kernel.

    Returns:
        Complex128 matrices `(*size, out, in)`.

    Raises:
        DecompositionError: the input is smaller than the kernel, or the kernel contains NaN or Inf or has no spatial
            dims.

    Reference:
        Sedghi, Gupta and Long 2019, theorem 6.

    Example:
        >>> import torch
        >>> tuple(conv_symbol(torch.ones(2, 3, 3, 3), (8, 8)).shape)
        (8, 8, 2, 3)
    """
    work = _checked(kernel)
    size = tuple(size)
    if len(size) != work.ndim - 2 or any(n < k for n, k in zip(size, work.shape[2:], strict=True)):
        raise DecompositionError(
            f"an input of size {size} does not fit a kernel of shape {tuple(kernel.shape)}: "
            "give one size per spatial dim, each at least the kernel's"
        )
    frequencies: Tensor = torch.fft.fftn(work, s=size, dim=tuple(range(2, work.ndim)))
    return frequencies.movedim((0, 1), (-2, -1))


def conv_singular_values(kernel: Tensor, size: Sequence[int], *, stride: int = 1) -> Float[Tensor, " values"]:
    """Return all singular values of a circular convolution: those of its symbol at every frequency.

    A stride s folds s^d frequencies onto one: their blocks are placed side by side, divided by s^(d/2).

    Args:
        kernel: `(out, in, *kernel size)`, one to three spatial dims, any float dtype.
        size: size of the input in these dims, each at least that of the kernel and a multiple of the stride.
        stride: stride, the same in all dims.

    Returns:
        Singular values in float64, descending: `min(out, in * stride^d)` of them for each output position.

    Raises:
        DecompositionError: a size is not a multiple of the stride or is smaller than the kernel, or the kernel contains
            NaN or Inf.

    Reference:
        Sedghi, Gupta and Long 2019, theorem 6.

    Example:
        >>> import torch
        >>> conv_singular_values(torch.ones(1, 1, 2), (4,))[:2]
        tensor([2.0000, 1.4142], dtype=torch.float64)
    """
    symbol = conv_symbol(kernel, size)
    if stride < 1 or any(n % stride for n in size):
        raise DecompositionError(f"stride {stride} does not divide the input size {tuple(size)}")
    if stride > 1:
        dims = len(tuple(size))
        split = symbol.reshape([part for n in size for part in (stride, n // stride)] + list(symbol.shape[-2:]))
        aliases = [2 * d for d in range(dims)]
        kept = [2 * d + 1 for d in range(dims)]
        split = split.permute([*kept, 2 * dims, *aliases, 2 * dims + 1])
        symbol = split.reshape(*(n // stride for n in size), kernel.shape[0], -1) / stride ** (dims / 2)
    values = torch.linalg.svdvals(symbol).flatten()
    return torch.sort(values, descending=True).values


def spectral_norm_bounds(kernel: Tensor) -> tuple[float, float]:
    """Return two upper bounds on the spectral norm of a convolution, for any input size and zero padding.

    With k the number of kernel positions: `sqrt(k) * min ||unfolding||_2` over the unfoldings that put each spatial dim
    with the outputs or with the inputs, and `sum_positions ||K[:, :, position]||_2`.

    Args:
        kernel: `(out, in, *kernel size)`, one to three spatial dims; a matrix is its own bound.

    Returns:
        Both bounds; use the smaller one.

    Raises:
        DecompositionError: the kernel contains NaN or Inf, or is a vector.

    Reference:
        Singla and Feizi 2021, theorem 1 (the four unfoldings); Yi 2020.

    Example:
        >>> import torch
        >>> [round(bound, 6) for bound in spectral_norm_bounds(torch.ones(1, 1, 2))]
        [2.0, 2.0]
    """
    work = _checked(kernel, least=2)
    spatial = list(range(2, work.ndim))
    norms = []
    for choice in range(2 ** len(spatial)):
        rows = [0, *(d for k, d in enumerate(spatial) if choice >> k & 1)]
        columns = [1, *(d for k, d in enumerate(spatial) if not choice >> k & 1)]
        unfolded = work.permute(*rows, *columns).reshape(math.prod(work.shape[d] for d in rows), -1)
        norms.append(float(torch.linalg.matrix_norm(unfolded, 2)))
    positions = work.flatten(2).movedim(-1, 0) if spatial else work[None]
    return math.sqrt(positions.shape[0]) * min(norms), float(torch.linalg.matrix_norm(positions, 2).sum())


def effective_rank(values: Float[Tensor, " values"]) -> float:
    """Return the exponential of the entropy of the normalised singular values: their effective number.

    Args:
        values: singular values, in any order.

    Returns:
        Between 1 and the number of values (0 for the zero operator).

    Raises:
        DecompositionError: not a dense tensor.

    Reference:
        Roy and Vetterli 2007.

    Example:
        >>> import torch
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])), 6)
        3.0
    """
    check_dense(values, "values")
    total = float(values.double().sum())
    if total == 0:
        return 0.0
    shares = values.double() / total
    return math.exp(float(torch.special.entr(shares).sum()))


def _checked(kernel: Tensor, least: int = 3) -> Tensor:
    """Return the kernel in float64, or raise."""
    check_dense(kernel, "kernel")
    if kernel.ndim < least or not kernel.is_floating_point() or kernel.numel() == 0:
        raise DecompositionError(
            f"a kernel must be floats (out, in, *kernel size), got {kernel.dtype} of shape {tuple(kernel.shape)}"
        )
    work = kernel.detach().double()
    if not torch.isfinite(work).all():
        raise DecompositionError(f"the kernel of shape {tuple(kernel.shape)} has NaN or Inf entries")
    return work
