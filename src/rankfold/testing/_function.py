"""Does a layer compute what the dense layer computes, at full rank and at any other, forwards and backwards?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from rankfold.testing._case import Case, relative, require, same

HALVES = (torch.float16, torch.bfloat16)
ROUNDINGS = 16  # of a half-precision type, that the factors of a weight may be away from it at full rank


def check_full_rank(layer: Any, case: Case) -> None:
    """Check that at full rank the layer, its weight and its dense twin are the dense layer's to rounding."""
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        dense, x = case.twin(dtype)
        built = _at_full_rank(layer, dense, case)
        output, expected = built(x), dense(x)
        require(output.shape == expected.shape, f"its output is {tuple(output.shape)}, not {tuple(expected.shape)}")
        found = {"its output": relative(output, expected), "its weight": relative(built.weight, dense.weight)}
        found["the output of to_dense()"] = relative(built.to_dense()(x), expected)
        for what, error in found.items():
            require(error < limit, f"at full rank {what} is off by {error:.2g} in {dtype}, where {limit:g} is rounding")


def check_weight(layer: Any, case: Case) -> None:
    """Check that at any rank the layer computes what its `weight`, `to_dense` and `squared_norm` say."""
    dense, x = case.twin()
    built = layer.like(dense, rank=case.chosen(layer), seed=1, **case.options)
    back = built.to_dense()
    require(type(back) is layer.dense_type, f"to_dense() is a {type(back).__name__}, not a {layer.dense_type.__name__}")
    same(back.weight, built.weight, "to_dense() has another weight")
    same(built(x), back(x), "the layer computes something else than to_dense() does")
    same(built.squared_norm(), built.weight.square().sum(), "squared_norm() is not that of the weight")
    built.squared_norm().backward()
    gradients = {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    built.weight.square().sum().backward()
    expected = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    same(gradients, expected, "the gradients of squared_norm() are not those of the squared weight")


def check_gradients(layer: Any, case: Case) -> None:
    """Check that gradients reach every factor and the input, and are those of the dense layer with the same weight."""
    dense, x = case.twin()
    dense.requires_grad_(True)
    built = layer.like(dense, rank=case.chosen(layer), seed=1, **case.options)
    seen = torch.randn(dense(x).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = {"weight": built.weight} | ({} if getattr(built, "bias", None) is None else {"bias": built.bias})
    here, there = _leaf(x), _leaf(x)
    actual = _gradients(built(here), seen, [here, *built.parameters()])
    expected = _gradients(functional_call(dense, values, there), seen, [there, *built.parameters()])
    names = ["the input", *dict(built.named_parameters())]
    for name, got, wanted in zip(names, actual, expected, strict=True):
        if name != "the input" or x.is_floating_point():
            require(got is not None, f"no gradient reaches {name}")
            same(got, wanted, f"the gradient of {name} is not that of the dense layer with the same weight")
    _check_gradients_at_full_rank(layer, case, seen)


def _check_gradients_at_full_rank(layer: Any, case: Case, seen: Tensor) -> None:
    dense, x = case.twin()
    dense.requires_grad_(True)
    built = _at_full_rank(layer, dense, case)
    back, here, there = built.to_dense(), _leaf(x), _leaf(x)
    pairs = zip(back.named_parameters(), dense.parameters(), strict=True)
    for (name, mine), theirs in pairs:
        (got,), (wanted,) = _gradients(back(x), seen, [mine]), _gradients(dense(x), seen, [theirs])
        same(got, wanted, f"at full rank the gradient of {name} of to_dense() is not the dense layer's")
    if x.is_floating_point():
        (got,), (wanted,) = _gradients(built(here), seen, [here]), _gradients(dense(there), seen, [there])
        same(got, wanted, "at full rank the gradient of the input is not the dense layer's")


def check_half_precision(layer: Any, case: Case) -> None:
    """Check that in float16 and bfloat16 the layer keeps the dtype and is the dense layer at full rank, to rounding."""
    for dtype in HALVES:
        dense, x = case.twin(dtype)
        built = _at_full_rank(layer, dense, case)
        output = built(x)
        require(output.dtype == dtype, f"its output is {output.dtype} for inputs in {dtype}")
        require(bool(torch.isfinite(output).all()), f"its output holds NaN or Inf in {dtype}")
        error, limit = relative(built.weight, dense.weight), ROUNDINGS * torch.finfo(dtype).eps
        require(error < limit, f"at full rank its weight is off by {error:.2g} in {dtype}, more than rounding is")


def check_empty_batch(layer: Any, case: Case) -> None:
    """Check that a batch of no samples gives an output of no samples, as the dense layer does."""
    dense, x = case.twin()
    built = layer.like(dense, rank=case.chosen(layer), **case.options)
    output, expected = built(x[:0]), dense(x[:0])
    require(output.shape == expected.shape, f"no samples give {tuple(output.shape)}, not {tuple(expected.shape)}")


def _at_full_rank(layer: Any, dense: Any, case: Case) -> Any:
    return layer.from_dense(dense, rank=layer.full_rank(dense, **case.options), **case.options)


def _leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_(x.is_floating_point())


def _gradients(output: Tensor, seen: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    found = iter(torch.autograd.grad((output * seen).sum(), wanted, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in tensors]
