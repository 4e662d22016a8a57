"""What an evaluation returned, how far a second one fell below it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rankfold.errors import DataError

FORMS = "a number, a pair (mean, count) with the mean of `count` rights and wrongs, or a vector of a score per sample"


@dataclass(frozen=True, eq=False)
class Score:
    """One evaluation; higher is better.

    Attributes:
        value: the score of the model.
        count: samples that it is the mean of, where that is known.
        samples: the scores of the samples, where they are known.
    """

    value: float
    count: int | None = None
    samples: np.ndarray | None = None

    @classmethod
    def of(cls, returned: Any, model: str) -> Score:
        """Read what an `evaluate` function returned for a model.

        Raises:
            DataError: it has another form, or holds NaN or Inf.

        Example:
            >>> Score.of(np.array([True, False, True, True]), "dense")
            Score(value=0.75, count=4, samples=array([1., 0., 1., 1.]))
        """
        score = _read(returned)
        if score is None:
            raise DataError(f"evaluate must return {FORMS}; for the {model} model it returned {returned!r:.80}")
        if not math.isfinite(score.value) or (score.samples is not None and not np.isfinite(score.samples).all()):
            raise DataError(
                f"evaluate returned NaN or Inf for the {model} model: look for the sample that makes it, or return a "
                "low number for a model that can't be scored"
            )
        return score

    def data(self) -> dict[str, Any]:
        """Return the score as JSON data that `Score.of_data` reads."""
        samples = None if self.samples is None else self.samples.tolist()
        return {"value": self.value, "count": self.count, "samples": samples}

    @classmethod
    def of_data(cls, data: Mapping[str, Any]) -> Score:
        """Read what `data` returned; raises KeyError, TypeError or ValueError for anything else."""
        count, samples = data["count"], data["samples"]
        score = cls(
            float(data["value"]),
            None if count is None else int(count),
            None if samples is None else np.array(samples, dtype=np.float64),
        )
        if not math.isfinite(score.value) or (score.samples is not None and score.samples.shape != (score.count,)):
            raise ValueError("damaged score")
        return score


def _read(returned: Any) -> Score | None:
    if isinstance(returned, tuple):
        if len(returned) != 2 or not all(isinstance(x, int | float | np.number) for x in returned):
            return None
        value, count = float(returned[0]), int(returned[1])
        good = count == returned[1] and count >= 1 and (0 <= value <= 1 or not math.isfinite(value))
        return Score(value, count) if good else None
    if isinstance(returned, Tensor | np.ndarray):
        values = np.asarray(returned.detach().cpu().double() if isinstance(returned, Tensor) else returned, np.float64)
        if values.ndim == 1 and len(values):
            return Score(float(values.mean()), len(values), values)
        return Score(float(values)) if values.ndim == 0 else None
    return Score(float(returned)) if isinstance(returned, int | float | np.number) else None


def standard_error(dense: Score, small: Score) -> float:
    """Return the standard error of the drop from the dense model's value to the small one's on other samples.

    With scores per sample it is that of the mean of their differences, `sqrt(sum (d_i - mean d)^2 + range^2) / n`: the
    range of the scores, as one more difference, keeps few samples without any difference from looking certain. With
    counts it is that of a proportion, `sqrt(p (1 - p) / n)` for `p = (right + 1) / (n + 2)`; the same samples in both
    evaluations would make it smaller by an amount that counts alone don't tell. Otherwise it is not known, and 0.

    Raises:
        DataError: the two are of different numbers of samples.

    References:
        Agresti and Min 2005 (matched pairs with a constant added).

    Example:
        >>> round(standard_error(Score(0.9, 1000), Score(0.9, 1000)), 4)
        0.0095
    """
    if dense.count != small.count or (dense.samples is None) != (small.samples is None):
        raise DataError(
            f"evaluate returned {_kind(dense)} for the dense model and {_kind(small)} for a smaller one: the same "
            "samples must be evaluated each time"
        )
    if dense.samples is not None and small.samples is not None:
        differences = dense.samples - small.samples
        both = np.concatenate([dense.samples, small.samples])
        spread = differences.var() * len(differences) + np.ptp(both) ** 2
        return math.sqrt(spread) / len(differences)
    if small.count is None:
        return 0.0
    p = (small.value * small.count + 1) / (small.count + 2)
    return math.sqrt(p * (1 - p) / small.count)


def _kind(score: Score) -> str:
    if score.count is None:
        return "a single number"
    return f"{'scores of' if score.samples is not None else 'a mean over'} {score.count:,} samples"


def monotone(values: Sequence[float]) -> list[float]:
    """Return the non-increasing sequence nearest to some values in least squares (pool adjacent violators).

    References:
        Barlow, Bartholomew, Bremner and Brunk 1972.

    Example:
        >>> monotone([4.0, 1.0, 3.0, 0.0])
        [4.0, 2.0, 2.0, 0.0]
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while pools and pools[-1][0] < mean:
            before, length = pools.pop()
            mean, size = (before * length + mean * size) / (length + size), length + size
        pools.append((mean, size))
    return [mean for mean, size in pools for _ in range(size)]
