"""Recalibration: the layers of a compressed model fitted, without training, to the inputs that they really get."""

from rankfold.recalibration._recalibrate import Recalibration, Refit, Refitting, recalibrate

__all__ = [
    "Recalibration",
    "Refit",
    "Refitting",
    "recalibrate",
]
