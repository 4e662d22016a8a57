"""Statistics of a model on data: its layers, their costs, and the moments of their inputs."""

from rankfold.stats._measure import measure
from rankfold.stats._moments import Moments, add_product
from rankfold.stats._stats import LayerStats, Stats
from rankfold.stats._times import CallTime, Curve, LayerTime, LayerTimes, Setting, coordinates
from rankfold.stats._walk import count_bytes, count_params, left_alone, uncompiled, walk
from rankfold.stats._watch import Loss, Mask, observing

__all__ = [
    "CallTime",
    "Curve",
    "LayerStats",
    "LayerTime",
    "LayerTimes",
    "Loss",
    "Mask",
    "Moments",
    "Setting",
    "Stats",
    "add_product",
    "coordinates",
    "count_bytes",
    "count_params",
    "left_alone",
    "measure",
    "observing",
    "uncompiled",
    "walk",
]
