"""Penalties on factors and singular values; tensors of the same shape are computed in one batched call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TINY = 1e-12


def orthogonality(factors: Iterable[Tensor]) -> Tensor:
    """Return sum ||UᵀU - I||² / r² over matrices U (groups, rows, r), the mean over the groups of each.

    Zero if the columns of every U are orthonormal. As long as r is at most the number of rows, r x r is the smaller
    one of the two Gram matrices.

    Reference: Yang et al. 2020, equation 3.
    """
    total: list[Tensor] = []
    for stack in _stacked(factors):  # matrices, groups, rows, r
        distance: Tensor = _Distance.apply(stack)
        total.append(distance / (stack.shape[-1] ** 2 * stack.shape[1]))
    return torch.stack(total).sum()


class _Distance(torch.autograd.Function):
    """||UᵀU - I||² over a stack, whose gradient 4 U (UᵀU - I) needs one product; autograd would need two."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor) -> Tensor:
        gram = stack.mT @ stack
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        ctx.save_for_backward(stack, gram)
        return gram.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        stack, distance = ctx.saved_tensors
        with torch.autocast(stack.device.type, enabled=False):
            product: Tensor = stack @ distance
        return product.mul_(4 * gradient)


def sparsity(values: Iterable[Tensor], kind: str) -> Tensor:
    """Return the sum of a measure of sparsity over vectors s (groups, r), the mean over the groups of each.

    Reference: Yang et al. 2020, section 3.2.
    """
    measure = KINDS[kind]
    return torch.stack([measure(stack).sum() / stack.shape[1] for stack in _stacked(values)]).sum()


def _stacked(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors of each shape stacked into one, in float32 or wider."""
    shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        shapes[tuple(tensor.shape)].append(tensor)
    for same in shapes.values():
        yield torch.stack([tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in same])


def _l1(values: Tensor) -> Tensor:
    """Return |s|_1."""
    return values.abs().sum(-1)


def _hoyer(values: Tensor) -> Tensor:
    """Return |s|_1 / |s|_2 - 1: 0 for a single nonzero value, sqrt(r) - 1 if all are equal, at any scale."""
    norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
    return (_l1(values) / norm.clamp_min(TINY) - 1).clamp_min(0)


def _hoyer_square(values: Tensor) -> Tensor:
    """Return |s|_1² / |s|_2² - 1: 0 for a single nonzero value, r - 1 if all are equal, at any scale."""
    return (_l1(values).square() / values.square().sum(-1).clamp_min(TINY**2) - 1).clamp_min(0)


KINDS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"hoyer": _hoyer, "l1": _l1, "hoyer_square": _hoyer_square}
)
