"""How batches of a loader and examples are read, in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.errors import DataError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def example_arguments(example: Any) -> Arguments:
    """Return the positional and keyword arguments that an example represents.

    A tensor is one argument, a tuple or list are the positional arguments, a mapping are the keyword arguments.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, Sequence) and not isinstance(example, str) and len(example):
        return tuple(example), {}
    raise DataError(
        f"an example must be a tensor, a tuple of arguments or a dict of keyword arguments, got {example!r:.80}"
    )


def batch_arguments(batch: Any) -> Arguments:
    """Return the arguments with which to call a model for one batch of a loader.

    A batch is a tensor, a tuple or list with the inputs first (the rest are targets), or a mapping of
    keyword arguments. Inputs that are themselves a tuple or a mapping are several arguments.
    """
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch):
        return example_arguments(batch[0])
    if isinstance(batch, Tensor | Mapping):
        return example_arguments(batch)
    raise DataError(
        f"a batch must be a tensor, a tuple (inputs first) or a dict of keyword arguments, got {batch!r:.80}"
    )


def batch_target(batch: Any) -> Any:
    """Return the target of a batch, which follows the inputs: one value, a tuple of several, or None.

    In a mapping the target, if there is one, is under "labels" or "label".
    """
    if isinstance(batch, Mapping):
        return batch.get("labels", batch.get("label"))
    if isinstance(batch, Sequence) and len(batch) > 1:
        return batch[1] if len(batch) == 2 else tuple(batch[1:])
    return None


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors inside nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor inside nested tuples, lists and mappings; None if there is none."""
    return next(iter(tensors_in(value)), None)


def to_device(value: Any, device: torch.device) -> Any:
    """Move every tensor inside tuples, lists and mappings to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        moved = [to_device(item, device) for item in value]
        # A named tuple takes its fields as separate arguments.
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer of a model; the CPU if it has none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")
