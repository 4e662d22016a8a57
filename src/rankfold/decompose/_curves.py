"""Curves of error against rank between the ranks where it was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import PchipInterpolator

MEASURED = 3  # ranks at which an estimated curve is measured
LEAST = 1e-9  # estimates below this give no meaningful ratio


def spread_over(errors: Sequence[float], count: int) -> list[int]:
    """Return the positions of at most `count` errors, evenly spaced in their order from smallest to largest."""
    order = np.argsort(errors, kind="stable")
    return [int(order[k]) for k in np.unique(np.linspace(0, len(order) - 1, count).round().astype(int))]


def calibrated(errors: Sequence[float], places: Sequence[int], measured: Sequence[float]) -> list[float]:
    """Multiply estimated errors by the ratio of measured to estimated ones, interpolated between a few places.

    Args:
        errors: estimates.
        places: positions among them, from the smallest estimate to the largest.
        measured: the errors there.

    Returns:
        The errors, none above 1.

    Example:
        >>> calibrated([0.8, 0.4, 0.6], [1, 0], [0.2, 0.4])
        [0.4, 0.2, 0.3]
    """
    estimates = np.asarray(errors, dtype=float)
    ratios = [real / estimates[k] if estimates[k] > LEAST else 1.0 for k, real in zip(places, measured, strict=True)]
    scaled = estimates * np.interp(estimates, estimates[list(places)], ratios)
    return [round(float(error), 15) for error in np.minimum(scaled, 1.0)]


def monotone_curve(known: Sequence[int], errors: Sequence[float], ranks: Sequence[int]) -> list[float]:
    """Interpolate errors monotonically between known ranks and 1 at rank 0 (Fritsch and Carlson 1980).

    The square root of the error is interpolated: the error itself bends too much towards a full rank, and its
    logarithm has no value there. The curve never rises with the rank.

    Args:
        known: ascending ranks.
        errors: relative errors there; an error above that of a lower rank is lowered to it.
        ranks: the ranks asked for, none above the last known one.

    Returns:
        One error per entry of `ranks`.

    Example:
        >>> monotone_curve([1, 2], [0.64, 0.16], [1, 2])
        [0.64, 0.16]
    """
    falling = np.minimum.accumulate([1.0, *errors])
    curve = PchipInterpolator([0, *known], np.sqrt(falling))
    return [round(float(curve(rank)) ** 2, 15) for rank in ranks]
