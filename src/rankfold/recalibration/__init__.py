"""Recalibration: the layers of a compressed model fitted, without training, to the inputs that they really get."""

from rankfold.recalibration._recalibrate import Recalibration, Refit, recalibrate

__all__ = [
    "Recalibration",
    "Refit",
    "recalibrate",
]
