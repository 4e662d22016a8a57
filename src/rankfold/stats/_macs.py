"""Multiply-adds of a whole model, seen where torch calls its kernels."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PRODUCT = re.compile(
    r"(?:^|_)(?:mm|bmm|addmm|gemm|mv|dot|matmul|linear|bilinear|conv\w*|attention|lstm|gru|rnn)(?:_|\d|$)"
)
"""The names of operators that multiply, so that one without a formula is not counted as nothing without a word."""


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Return the products of the queries with all keys, and of the weights with all values."""
    *batch, queries, width = query.shape
    return math.prod(batch) * queries * key.shape[-2] * (width + value.shape[-1])


def _recurrent_layer(inputs: Tensor, *weights: Any, **_: Any) -> int:
    """Return the products of one layer in one direction: each step's input and state with their weights."""
    return math.prod(inputs.shape[:-1]) * sum(int(w.numel()) for w in weights[:2])


def _recurrent(inputs: Tensor, weights: Any, *_: Any, **__: Any) -> int:
    """Return the products of all layers and directions; biases are vectors, or columns of zero stride."""
    return math.prod(inputs.shape[:-1]) * sum(int(w.numel()) for w in weights if w.dim() == 2)


def _trilinear(left: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """Return the products of `nn.Bilinear`: each left input with the weights, and the result with the right input."""
    outputs, width = int(weight.shape[-3]), int(weight.shape[-1])
    return int(left.shape[0] * (weight.numel() + outputs * width))


def _grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Return the products of a row with the matrix of its group, or of each group's rows and columns."""
    if left.dim() == right.dim() == 3:
        return left.numel() * right.shape[-1]
    return left.numel() * right.shape[-1] if left.dim() == 2 else right.numel() * left.shape[-2]


def _of_outputs(left: Tensor, *_: Any, found: Tensor, **__: Any) -> int:
    """Return the products of a linear layer whose weights are packed: each input with each output's weight."""
    return left.numel() * found.shape[-1]


def _packed(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    return left.numel() * right.shape[0]


FORMULAS: Mapping[str, Callable[..., int]] = {  # what torch's own table has no row for
    "mv": lambda matrix, _, **__: matrix.numel(),
    "addmv": lambda _, matrix, *__, **___: matrix.numel(),
    "dot": lambda left, _, **__: left.numel(),
    "vdot": lambda left, _, **__: left.numel(),
    "addbmm": lambda _, left, right, **__: left.numel() * right.shape[-1],
    "_int_mm": lambda left, right, **_: left.numel() * right.shape[-1],
    "_weight_int8pack_mm": _packed,
    **dict.fromkeys(("linear", "linear_relu", "linear_dynamic", "linear_relu_dynamic"), _of_outputs),  # quantised
    "_trilinear": _trilinear,
    "_grouped_mm": _grouped,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent,
    "miopen_rnn": _recurrent,
}


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Counts the multiply-adds of the operators that run inside it.

    Attributes:
        macs: multiply-adds so far.
        unknown: names of the operators that multiply and have no formula.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.macs = 0
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        """Run an operator, or what it is composed of, and count it."""
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        name = getattr(packet, "__name__", str(packet))
        ours, theirs = FORMULAS.get(name), flop_registry.get(packet)
        if ours is None and theirs is None and hasattr(func, "decompose"):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        found = func(*args, **kwargs)
        if ours is not None:
            self.macs += ours(*args, **kwargs, found=found)
        elif theirs is not None:
            self.macs += theirs(*args, **kwargs, out_val=found) // 2
        elif PRODUCT.search(name):
            self.unknown.add(name)
        return found
