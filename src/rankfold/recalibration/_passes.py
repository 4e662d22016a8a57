"""Two models side by side on the same batches: what the layers of one should return, what those of the other get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import OutputError, output_tensors
from rankfold.errors import DataError
from rankfold.layers import Rows, is_factorised, output_size, row_size
from rankfold.recalibration._pairs import Pairs
from rankfold.stats import observing

CHECKED = 4
"""One in so many rows of a batch, the last ones, is kept to check what was solved on the others."""


@dataclass(eq=False)
class Calibration:
    """The dense model and the batches, with as much as fits of what the model returns for them.

    Attributes:
        model: the original.
        batches: what a loader yielded.
        order: the layers whose outputs will be asked for, in this order.
        settings: what `observing` takes: patches, mask, seed.
        memory: bytes that the kept outputs of layers may take, and those of the model.
    """

    model: nn.Module
    batches: Sequence[Any]
    order: Sequence[str]
    settings: Mapping[str, Any]
    memory: int
    outputs: list[list[Tensor]] = field(default_factory=list)
    targets: dict[str, list[Tensor]] | None = None

    def pairs(self, small: nn.Module, names: Sequence[str]) -> tuple[dict[str, tuple[Pairs, Pairs]], float]:
        """Return the pairs of some layers to solve on and to check on, and the error of the small model's outputs."""
        if self.targets is None or not self.targets.keys() >= set(names):
            self.targets = self._run(names)
        sums: dict[str, tuple[Pairs, Pairs]] = {}
        error = OutputError()
        with _running(small, names, self.settings) as run, _running(self.model, (), self.settings) as run_original:
            for number, batch in enumerate(self.batches):
                seen, output = run(batch)
                error.add(self.outputs[number] if self.outputs else run_original(batch)[1], output)
                for name in names:
                    inputs = features(small.get_submodule(name), _rows(seen, name, number).inputs, self.memory)
                    _share(sums, name, inputs, self.targets[name][number])
        return sums, error.value()

    def _run(self, least: Sequence[str]) -> dict[str, list[Tensor]]:
        """Run the original; return the outputs of some layers, and of as many after them as fit.

        The outputs of the model are kept where they fit too.
        """
        self.outputs = []
        names = self.order[self.order.index(least[0]) :] if least else []
        targets: dict[str, list[Tensor]] = {}
        with _running(self.model, names, self.settings) as run:
            for number, batch in enumerate(self.batches):
                seen, output = run(batch)
                if not number:
                    keep = self._all(output) <= self.memory
                    targets = {name: [] for name in self._affordable(names, seen, len(least))}
                if keep:
                    self.outputs.append(output)
                for name, kept in targets.items():
                    kept.append(_rows(seen, name, number).outputs)
        return targets

    def _all(self, tensors: Sequence[Tensor]) -> int:
        """Return the bytes of such tensors over all batches."""
        return len(self.batches) * sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _affordable(self, names: Sequence[str], seen: Mapping[str, Rows], least: int) -> Iterator[str]:
        taken = 0
        for place, name in enumerate(names):
            taken += self._all([_rows(seen, name, 0).outputs])
            if taken > self.memory and place >= least:
                return
            yield name


def _share(sums: dict[str, tuple[Pairs, Pairs]], name: str, inputs: Tensor, targets: Tensor) -> None:
    """Add the rows of a batch to those to solve on, and the last quarter to those to check on."""
    groups, count, n = inputs.shape
    if len(targets) != count:
        raise DataError(
            f"layer {name!r} gets {count} rows where the original gets {len(targets)}: the models differ in more "
            "than the layers that were replaced, or call them on something random"
        )
    if name not in sums:
        size = (groups, n, targets.shape[1] // groups, inputs.device)
        sums[name] = (Pairs.empty(*size), Pairs.empty(*size))
    kept = count - count // CHECKED
    sums[name][0].add(inputs[:, :kept], targets[:kept])
    sums[name][1].add(inputs[:, kept:], targets[kept:])


def _rows(seen: Mapping[str, Rows], name: str, number: int) -> Rows:
    if name not in seen:
        raise DataError(
            f"layer {name!r} is called on batch 0, but not in both models on batch {number}: leave that batch out"
        )
    return seen[name]


@contextmanager
def _running(
    model: nn.Module, names: Sequence[str], settings: Mapping[str, Any]
) -> Iterator[Callable[[Any], tuple[dict[str, Rows], list[Tensor]]]]:
    """Yield a function that runs a model on a batch and returns the rows of some layers and the model's outputs."""
    last: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        last[:] = output_tensors(output)

    handle = model.register_forward_hook(keep)
    try:
        with observing(model, names, **settings) as observe:
            yield lambda batch: (observe(batch), list(last))
    finally:
        handle.remove()


def bytes_of(layer: nn.Module) -> int:
    """Return what the pairs of a layer take, those to solve on and those to check on."""
    groups, n = row_size(layer) or (0, 0)
    return 2 * torch.finfo(torch.float64).bits // 8 * n * (groups * n + output_size(layer))


def solved_part(layer: Any, memory: int) -> str | None:
    """Return which submodule of a layer is solved for: "" for all of it, None where the memory suffices for nothing.

    Where the moments of the inputs are too large, those of what the first of two stages makes of them may do.
    """
    if bytes_of(layer) <= memory:
        return ""
    stages = layer.stages if is_factorised(layer) else None
    staged = stages is not None and stages.plain and stages.is_matrix(layer.options)
    return "up" if staged and bytes_of(layer.up) <= memory else None


def features(layer: Any, inputs: Tensor, memory: int) -> Tensor:
    """Return inputs (groups, rows, n) of a layer as the part of it that is solved for gets them."""
    if not solved_part(layer, memory):
        return inputs
    down = layer.down.weight.detach().to(inputs)
    features: Tensor = inputs @ down.reshape(len(inputs), -1, inputs.shape[2]).mT
    return features
