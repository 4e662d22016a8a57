"""The errors that Rankfold raises: all derive from `RankfoldError`, itself a `ValueError`."""

from __future__ import annotations

from typing import Any


class RankfoldError(ValueError):
    """Base of every error raised on purpose by Rankfold."""


class DecompositionError(RankfoldError):
    """A tensor cannot be decomposed as asked (bad rank, NaN or Inf entries, wrong order)."""


class LayerError(RankfoldError):
    """A layer cannot be built, or cannot be replaced without changing what it computes."""


class DataError(RankfoldError):
    """A loader or an example is empty or has a form that the model cannot be called with."""


class PlanError(RankfoldError):
    """A plan is malformed or does not fit the model it is applied to."""


class MethodError(PlanError):
    """A plan names a method that is not known: misspelt, or of a class that is not registered."""


class BudgetError(RankfoldError):
    """A budget cannot be met; the message says what the closest reachable value is.

    Attributes:
        closest: the `Plan` that comes closest, or None where there is none.
    """

    def __init__(self, message: str, closest: Any = None) -> None:
        super().__init__(message)
        self.closest = closest


class StoreError(RankfoldError):
    """A file is damaged, is not a Rankfold file, or does not fit the model."""


class ExportError(RankfoldError):
    """An exported program could not be written or does not compute what the model computes."""
