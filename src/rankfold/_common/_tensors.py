"""The one check that a value is a tensor whose entries can be computed with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankfold.errors import DecompositionError


def check_dense(given: object, what: str = "tensor", *, meta: bool = False) -> None:
    """Raise a DecompositionError for anything but a dense tensor: it says what was given and what to do.

    Args:
        given: the value that a user passed.
        what: the name of the argument.
        meta: whether a tensor on the meta device will do, because only its shape matters.

    Raises:
        DecompositionError: a NumPy array, a list, None or any other object; a sparse, MKL-DNN, nested or quantised
            tensor; one on the meta device.

    Example:
        >>> check_dense([[1.0, 2.0]], "matrix")
        Traceback (most recent call last):
        ...
        rankfold.errors.DecompositionError: matrix must be a torch.Tensor, got a list: pass torch.as_tensor(matrix)
    """
    if not isinstance(given, Tensor):
        remedy = "pass a tensor" if given is None else f"pass torch.as_tensor({what})"
        raise DecompositionError(f"{what} must be a torch.Tensor, got {_described(given)}: {remedy}")
    if given.is_nested:
        raise DecompositionError(f"{what} must be dense, got a nested tensor: pass its parts one by one")
    if given.layout is not torch.strided:
        layout = str(given.layout).removeprefix("torch.").removeprefix("_")
        found = f"a tensor of shape {tuple(given.shape)} in the layout {layout}"
        raise DecompositionError(f"{what} must be dense, got {found}: pass {what}.to_dense()")
    if given.is_meta and not meta:
        raise DecompositionError(
            f"{what} of shape {tuple(given.shape)} is on the meta device and has no values to decompose"
        )
    if given.is_quantized:
        found = f"a quantised tensor of dtype {given.dtype}"
        raise DecompositionError(f"{what} must hold floating-point numbers, got {found}: pass {what}.dequantize()")


def _described(given: Any) -> str:
    """Return what a value is, with its shape where it has one."""
    if given is None:
        return "None"
    name = type(given).__name__
    kind = f"a {'numpy.' if type(given).__module__ == 'numpy' else ''}{name}"
    return f"{kind} of shape {tuple(given.shape)}" if isinstance(getattr(given, "shape", None), tuple) else kind
