"""The error of the outputs of one model relative to those of another, on the same batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common._batches import batch_arguments, device_of, tensors_in, to_device
from rankfold._common._modes import evaluating


@dataclass(eq=False)
class _Sums:
    """Sums for one output over all batches, in float64: squared differences, squared values, and values."""

    wrong: float = 0.0
    squares: float = 0.0
    total: Tensor | float = 0.0
    count: int = 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        exact = _rows(wanted).double()
        self.wrong += float((_rows(found).to(exact) - exact).square().sum())
        self.squares += float(exact.square().sum())
        self.total = self.total + exact.sum(0)
        self.count += len(exact)

    def centred(self) -> float:
        return self.squares - float(torch.as_tensor(self.total).square().sum()) / max(1, self.count)


def output_error(model: nn.Module, small: nn.Module, loader: Iterable[Any], *, batches: int | None = None) -> float:
    """Return the relative error `sqrt(sum |y' - y|^2 / sum |y - m|^2)` of a model's outputs y' against another's y.

    m is the mean of y over the data, one value per feature, so a model that always returns the mean has an error of 1.
    The sums run over all batches and all floating-point tensors of an output, in float64; the models are in eval mode.

    Args:
        model: the reference model.
        small: the model to compare with it, with the same arguments and outputs.
        loader: batches: tensors, tuples (inputs first) or dicts (keyword arguments).
        batches: largest number of batches to read; all of them if None.

    Returns:
        The error; infinite if outputs are not finite, NaN if all outputs are the same, as with a single one.
    """
    error = OutputError()
    device = device_of(model)
    with evaluating(model, small), torch.no_grad():
        for batch in islice(loader, batches):
            args, kwargs = to_device(batch_arguments(batch), device)
            error.add(model(*args, **kwargs), small(*args, **kwargs))
    return error.value()


class OutputError:
    """The error of `output_error` for outputs that are added batch by batch."""

    def __init__(self) -> None:
        """Start with no batch."""
        self.sums: dict[int, _Sums] = defaultdict(_Sums)

    def add(self, wanted: Any, found: Any) -> None:
        """Add the outputs of both models for one batch."""
        for place, pair in enumerate(zip(output_tensors(wanted), output_tensors(found), strict=True)):
            self.sums[place].add(*pair)

    def value(self) -> float:
        """Return the error over all batches so far."""
        sums = self.sums.values()
        wrong, whole = sum(one.wrong for one in sums), sum(one.centred() for one in sums)
        if math.isfinite(wrong) and whole <= 1e-12 * sum(
            one.squares for one in sums
        ):  # no more than rounding: all outputs are the same
            return math.nan
        return math.sqrt(wrong / whole) if math.isfinite(wrong) else math.inf


def _rows(output: Tensor) -> Tensor:
    """Return an output as rows of features: its last axis, or the channels of images."""
    if output.dim() > 3:
        output = output.movedim(1, -1)
    return output.reshape(-1, output.shape[-1]) if output.dim() > 1 else output.reshape(-1, 1)


def output_tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors inside nested tuples, lists and mappings, in their order."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]
