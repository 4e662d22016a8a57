"""The errors that Rankfold raises: all derive from `RankfoldError`, which is a `ValueError`."""

from __future__ import annotations

from typing import Any


class RankfoldError(ValueError):
    """Base class of all errors that Rankfold raises on purpose."""


class DecompositionError(RankfoldError):
    """A tensor cannot be decomposed as requested (bad rank, NaN or Inf entries, wrong order)."""


class LayerError(RankfoldError):
    """A layer cannot be built, or cannot be replaced without changing what it computes."""


class DataError(RankfoldError):
    """A loader or an example is empty, or has a form with which the model cannot be called."""


class PlanError(RankfoldError):
    """A plan is malformed or does not fit the model it is applied to."""


class MethodError(PlanError):
    """A plan names a method that is not known: misspelt, or of a class that is not registered."""


class BudgetError(RankfoldError):
    """A budget cannot be met; the message gives the closest value that can be reached.

    Attributes:
        closest: the `Plan` that comes closest, or None if there is none.
    """

    def __init__(self, message: str, closest: Any = None) -> None:
        super().__init__(message)
        self.closest = closest


class StoreError(RankfoldError):
    """A file is damaged, is not a Rankfold file, or does not fit the model."""


class ExportError(RankfoldError):
    """A model could not be exported, or the exported program does not compute what the model computes."""
