"""What all methods that train a dense model have in common: which layers they work on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rankfold.train.lowrank._method import State, TrainingMethod
from rankfold.train.lowrank._targets import Patterns, matrices_of, targets, unwrapped, write_matrices


class DenseMethod(TrainingMethod):
    """A training method that works on the dense weights of a model, in place."""

    def __init__(self, model: nn.Module, split: str, include: Patterns, exclude: Patterns) -> None:
        super().__init__(model, targets(unwrapped(model), split, include, exclude)[0])

    def dense(self) -> nn.Module:
        """Return the model itself."""
        return unwrapped(self.model)

    def full_rank(self, name: str) -> int:
        """Return the full rank of a layer; with groups, that of each group."""
        return min(self.matrices(name).shape[1:])

    def matrices(self, name: str) -> Tensor:
        """Return the weight of a layer as matrices (groups, rows, columns), detached."""
        return matrices_of(self.layers[name], self.options[name])

    def write(self, name: str, matrices: Tensor) -> None:
        """Set the weight of a layer from matrices (groups, rows, columns)."""
        write_matrices(self.layers[name], matrices, self.options[name])


def named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return one tensor per layer as entries of a state dict."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def taken(prefix: str, state: State) -> dict[str, Tensor]:
    """Return the tensors per layer that `named` put into a state dict."""
    keys = [key for key in state if key.startswith(f"{prefix}.")]
    return {key.removeprefix(f"{prefix}."): state.pop(key).clone() for key in keys}
