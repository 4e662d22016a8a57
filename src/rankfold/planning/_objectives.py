"""The table of objectives: what the planner makes small, and what the errors of layers say of a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

SQUARES: Final = "squares"
LOSS: Final = "loss"
TEMPERED: Final = "tempered"
CALIBRATED: Final = "calibrated"
WEIGHED = (LOSS, TEMPERED)  # those that need gradients of a loss
LOST = 1 - 1e-9  # the largest squared error that the product of energies tells from others

Damage = Callable[[float, float], float]


def _energy(error: float, _: float) -> float:
    """Return -log(1 - e^2): their sum is that of the logarithms of the energies kept (Zhang et al. 2015)."""
    return -math.log1p(-min(error**2, LOST))


# From a layer's relative error and what its outputs weigh in the loss to a term of the sum; None: the error squared.
OBJECTIVES: Mapping[str, Damage | None] = MappingProxyType(
    {
        SQUARES: None,
        "energy": _energy,
        LOSS: lambda error, weight: weight * error**2,
        TEMPERED: lambda error, weight: math.sqrt(weight) * error**2,
        CALIBRATED: None,  # the terms are measured, by `measure_damage`
    }
)


def combined(squares: Iterable[float]) -> float:
    """Return the relative error of a model from the squared ones of its layers, one after the other.

    Each keeps 1 - e^2 of the energy that reaches it: the error is `sqrt(1 - prod(1 - e^2))`, that of a single layer
    where there is one, and near the root of the sum of squares where errors are small.
    """
    return math.sqrt(1 - math.prod(1 - min(1.0, square) for square in squares))
