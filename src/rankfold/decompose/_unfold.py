"""Unfold, fold, mode product, Khatri-Rao, and the one check of what is passed to a decomposition.

Public functions here annotate a plain `Tensor` where a wrong order or dtype gets an error of its own; everything
behind `working_copy` declares its shapes.
"""
# ruff: noqa: F722 (shape strings)

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from rankfold._common import Float, check_dense, real, whole
from rankfold.errors import DecompositionError

WORKING_DTYPES = (torch.float64, torch.float32)


def working_copy(
    tensor: Tensor, dtype: torch.dtype, *, order: int | None = None, least: int = 2, what: str = "tensor"
) -> Tensor:
    """Return a detached tensor in the dtype to compute in, after checking that it can be decomposed.

    Args:
        tensor: what the user passed: any float dtype, on any device.
        dtype: torch.float64 or torch.float32.
        order: the number of modes that it must have, if only one is allowed.
        least: the smallest number of modes allowed.
        what: the name of the argument, for errors.

    Returns:
        The tensor in `dtype`, on its device, detached; not a copy if nothing has to change.

    Raises:
        DecompositionError: not a dense tensor, wrong order, empty, not real floating point, NaN or Inf entries, the
            meta device.
    """
    check_dense(tensor, what)
    shape = tuple(tensor.shape)
    if dtype not in WORKING_DTYPES:
        raise DecompositionError(f"decompositions compute in torch.float64 or torch.float32, not in {dtype}")
    if not tensor.is_floating_point():
        raise DecompositionError(f"a tensor of dtype {tensor.dtype} cannot be decomposed: convert it to a float dtype")
    if order is not None and tensor.ndim != order:
        hint = ": unfold it, or loop over the batch" if tensor.ndim > order else ""
        raise DecompositionError(f"a tensor of order {order} is needed, not one of shape {shape}{hint}")
    if tensor.ndim < least:
        raise DecompositionError(f"a tensor of order {least} or more is needed, not one of shape {shape}")
    if tensor.numel() == 0:
        raise DecompositionError(f"the tensor of shape {shape} is empty")
    work = tensor.detach().to(dtype)
    if not math.isfinite(magnitude(work)):
        bad = int((~torch.isfinite(work)).sum())
        raise DecompositionError(f"the tensor of shape {shape} has {bad} NaN or Inf entries (in {dtype})")
    return work


def magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude of an entry (NaN if there is one), in one pass and without a copy."""
    least, most = torch.aminmax(tensor)
    return float(torch.maximum(-least, most))


def check_rank(rank: object, limit: int, what: str = "rank") -> int:
    """Return a rank that is an int between 1 and `limit`; raise DecompositionError otherwise."""
    found = whole(what, rank, error=DecompositionError, why=f"; the full rank is {limit}")
    if found > limit:
        raise DecompositionError(f"{what} must be at most the full rank {limit}, got {found}")
    return found


def check_tolerance(tolerance: object) -> float:
    """Return a relative error between 0 (included) and 1; raise DecompositionError otherwise."""
    return real("tolerance", tolerance, most=1, error=DecompositionError)


def unfold(tensor: Tensor, mode: int) -> Float[Tensor, "dim rest"]:
    """Return the mode-`mode` unfolding: that mode as rows, the others in their order (the last runs fastest).

    Args:
        tensor: any order >= 1.
        mode: which mode; negative ones count from the end.

    Returns:
        A matrix (dim of the mode, product of the others).

    Example:
        >>> import torch
        >>> tuple(unfold(torch.zeros(2, 3, 4), 1).shape)
        (3, 8)
    """
    if mode % tensor.ndim == tensor.ndim - 1:
        return tensor.reshape(-1, tensor.shape[mode]).T  # a view, where moving the mode would copy
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def split_axis(tensor: Tensor, axis: int, sizes: Sequence[int]) -> Tensor:
    """Return the tensor with one axis split into several; one of the sizes may be -1.

    Example:
        >>> import torch
        >>> tuple(split_axis(torch.zeros(2, 12), 1, (3, -1)).shape)
        (2, 3, 4)
    """
    axis %= tensor.ndim
    return tensor.reshape(*tensor.shape[:axis], *sizes, *tensor.shape[axis + 1 :])


def fold(matrix: Float[Tensor, "dim rest"], mode: int, shape: Sequence[int]) -> Tensor:
    """Return the tensor of the given shape whose mode-`mode` unfolding is `matrix`.

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).reshape(2, 3, 4)
        >>> torch.equal(fold(unfold(x, 1), 1, x.shape), x)
        True
    """
    mode %= len(shape)
    rest = [dim for k, dim in enumerate(shape) if k != mode]
    return matrix.reshape(shape[mode], *rest).movedim(0, mode)


def mode_product(tensor: Tensor, matrix: Float[Tensor, "new old"], mode: int) -> Tensor:
    """Return `tensor x_mode matrix`: every mode-`mode` fibre multiplied by `matrix`.

    This is one matrix product with the unfolding; many small products need no copy but are slower on kernels.

    Example:
        >>> import torch
        >>> tuple(mode_product(torch.ones(2, 3, 4), torch.ones(5, 3), 1).shape)
        (2, 5, 4)
    """
    mode %= tensor.ndim
    if mode == tensor.ndim - 1:
        return tensor @ matrix.T
    shape = [*tensor.shape[:mode], matrix.shape[0], *tensor.shape[mode + 1 :]]
    return fold(matrix @ unfold(tensor, mode), mode, shape)


def row_gram(rows: Float[Tensor, "dim rest"]) -> Float[Tensor, "dim dim"]:
    """Return `rows @ rows.T`; for a large matrix only the blocks on and below the diagonal are multiplied.

    Example:
        >>> import torch
        >>> row_gram(torch.ones(2, 3))
        tensor([[3., 3.],
                [3., 3.]])
    """
    dim = rows.shape[0]
    if dim < 128:
        return rows @ rows.T
    upper, lower = rows[: dim // 2], rows[dim // 2 :]
    corner = lower @ upper.T
    return torch.cat([torch.cat([row_gram(upper), corner.T], 1), torch.cat([corner, row_gram(lower)], 1)])


def mode_gram(tensor: Tensor, mode: int) -> Float[Tensor, "dim dim"]:
    """Return the Gram matrix of the mode-`mode` unfolding, `X_(mode) X_(mode)^T`.

    Example:
        >>> import torch
        >>> mode_gram(torch.ones(2, 3), 0)
        tensor([[3., 3.],
                [3., 3.]])
    """
    return row_gram(unfold(tensor, mode))


def khatri_rao(matrices: Sequence[Float[Tensor, "_ rank"]]) -> Float[Tensor, "rows rank"]:
    """Return the column-wise Kronecker product; the rows of the last matrix run fastest.

    With factors A_k of a CP decomposition, `unfold(X, 0) = A_0 @ khatri_rao([A_1, A_2, ...]).T`.

    Example:
        >>> import torch
        >>> tuple(khatri_rao([torch.ones(2, 5), torch.ones(3, 5)]).shape)
        (6, 5)
    """
    return reduce(lambda a, b: (a[:, None, :] * b[None, :, :]).reshape(-1, a.shape[1]), matrices)


def relative(squared: float, total: float) -> float:
    """Return `sqrt(squared / total)`, 0 for the zero tensor: squared norms to the relative Frobenius error."""
    return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0


def squared_norm(tensor: Tensor) -> float:
    """Return the squared Frobenius norm, summed in float64 a few rows at a time, which stay in the cache."""
    rows = tensor.reshape(tensor.shape[0], -1)
    some = max(1, 2**15 // rows.shape[1])
    parts = (rows[start : start + some] for start in range(0, rows.shape[0], some))
    return math.fsum(float(torch.linalg.vector_norm(part.double())) ** 2 for part in parts)


def relative_difference(tensor: Tensor, other: Tensor) -> float:
    """Return `||tensor - other|| / ||tensor||`, without the cancellation of a difference of squared norms."""
    return relative(squared_norm(tensor - other), squared_norm(tensor))


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a result in the dtype of the input; raise a DecompositionError if that overflows."""
    cast = tensor.to(dtype)
    if not math.isfinite(magnitude(cast)):
        largest = magnitude(tensor)
        raise DecompositionError(f"a factor reaches {largest:.3g}, beyond {dtype}: decompose the tensor in float32")
    return cast


def safe_scale(tensor: Tensor) -> float:
    """Return 1, or a power of two: divided by it (exactly), the squares of entries neither overflow nor vanish."""
    largest = magnitude(tensor)
    if largest == 0 or 1e-8 < largest < 1e8:
        return 1.0
    return 2.0 ** math.frexp(largest)[1]
