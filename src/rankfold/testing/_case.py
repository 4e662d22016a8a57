"""A dense layer to try a class on, and what the checks share: twins, ranks, comparisons that say what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Rank = int | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Case:
    """A dense layer that a class is tried on.

    Args:
        dense: a stock layer of the class's `dense_type` with values; it is not changed. Large enough for a rank to pay.
        example: an input for it, a batch.
        rank: a rank below the full one; by default one from the middle of the class's grid.
        options: the options of the class, such as `{"split": "spatial"}`.
        exact_errors: whether `errors` promises the very errors, as the tails of singular values are; otherwise it
            promises no less than what `from_dense` reaches.

    Example:
        >>> case = Case(nn.Linear(12, 10), torch.ones(4, 12), rank=3)
        >>> case
        Case(Linear(in_features=12, out_features=10, bias=True), rank=3)
    """

    dense: nn.Module
    example: Tensor
    rank: Rank | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    exact_errors: bool = True

    def __repr__(self) -> str:
        """Return the dense layer, and the rank and the options where they were given."""
        rank = "" if self.rank is None else f", rank={self.rank}"
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Case({self.dense}{rank}{options})"

    def twin(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Tensor]:
        """Return a copy of the dense layer and the example in a dtype; indices stay what they are."""
        x = self.example.detach().clone()
        return copy.deepcopy(self.dense).to(dtype), x.to(dtype) if x.is_floating_point() else x

    def chosen(self, layer: Any) -> Any:
        """Return the rank of the case: the one given, one from the middle of the grid, or half of the full one."""
        if self.rank is not None:
            return self.rank
        grid = layer.rank_grid(self.dense, **self.options)
        return grid[len(grid) // 2] if grid else part_of(layer.full_rank(self.dense, **self.options))


def part_of(full: Any, share: float = 0.5) -> Any:
    """Return a rank of about this share of the full one."""
    if isinstance(full, tuple):
        return tuple(max(1, round(rank * share)) for rank in full)
    return max(1, round(full * share))


def beyond(full: Any) -> Any:
    """Return a rank that is larger than the full one by one."""
    return tuple(rank + 1 for rank in full) if isinstance(full, tuple) else full + 1


def require(condition: bool, message: str) -> None:
    """Raise an `AssertionError` unless something holds."""
    if not condition:
        raise AssertionError(message)


def same(actual: Any, expected: Any, what: str, *, within: float | None = None) -> None:
    """Raise an `AssertionError` unless tensors, or mappings of them, are equal to rounding, or `within` a tolerance."""
    try:
        torch.testing.assert_close(actual, expected, rtol=within, atol=within)
    except AssertionError as told:
        raise AssertionError(f"{what}: {told}") from None


def identical(actual: Any, expected: Any, what: str) -> None:
    """Raise an `AssertionError` unless tensors, or mappings of them, are equal bit by bit."""
    same(actual, expected, what, within=0.0)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what was expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def refused(call: Callable[[], Any], kind: type[Exception], what: str) -> None:
    """Raise an `AssertionError` unless a call raises an error of a kind."""
    try:
        call()
    except kind:
        return
    except Exception as other:
        raise AssertionError(f"{what}: it raises {type(other).__name__}, where {kind.__name__} is promised") from other
    raise AssertionError(f"{what}: nothing is raised, where {kind.__name__} is promised")


def state(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state of a module."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
