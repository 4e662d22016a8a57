"""What every layer does with a `Metric`: checks it, centres it, measures errors in it, corrects the bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rankfold.decompose import monotone_curve
from rankfold.errors import LayerError
from rankfold.layers._contract import Metric, Rank
from rankfold.layers._dense import dense_type_of

SLACK = 1e-6  # share of the largest mean square by which rounding may make a variance negative
NOTHING = 1e-12  # share of the second moment below which a covariance is the rounding of constant inputs
ASYMMETRY = 1e-4  # share of the largest entry by which a second moment may miss its transpose
LARGE = 1024  # inputs of a kernel from which on curves of errors are computed in float32
ANCHORS = 8  # ranks at which a layer without a curve of its own is decomposed to know its errors


@dataclass(frozen=True, eq=False)
class GroupMetric:
    """The metric of the kernel of one group, centred where the layer has a bias.

    Attributes:
        moment: (n, n), float64.
        output_weights: (out,), float64, or None: weights of the outputs.
    """

    moment: Tensor
    output_weights: Tensor | None

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a decomposition."""
        return {"second_moment": self.moment, "output_weights": self.output_weights}

    def for_curves(self) -> dict[str, Any]:
        """Return the keyword arguments of a curve of errors: of large kernels in float32, which is twice as fast."""
        return {**self.arguments(), "dtype": torch.float32 if len(self.moment) > LARGE else torch.float64}

    def energy(self, matrix: Tensor) -> float:
        """Return the squared norm of a matrix (out, n) in the metric."""
        energies = ((matrix @ self.moment) * matrix).sum(1)
        return float((energies if self.output_weights is None else energies * self.output_weights).sum())


def group_metrics(owner: type[nn.Module], dense: Any, metric: Metric | None) -> tuple[GroupMetric | None, ...]:
    """Return the metric of each group, None where there is none: not given, or nothing reaches the outputs in it.

    Raises:
        LayerError: an embedding (but for one of two stages, which a tied head may share), shapes that do not fit the
            layer, NaN or Inf entries, what is no second moment.
    """
    row = dense_type_of(dense, subclasses=True)
    tied = getattr(owner, "stages", None) is not None  # the metric is then that of the inputs of a tied head
    if metric is not None and row is not None and row.rows == "none" and not tied:
        raise LayerError(f"{owner.__name__}: an embedding has no metric, its inputs are indices: use metric=None")
    groups = getattr(dense, "groups", 1)
    if metric is None:
        return (None,) * groups
    matrices = _by_groups(dense.weight.detach(), groups)
    _check(owner, matrices.shape, metric, type(dense).__name__)
    second = metric.second.detach().to(matrices.device, torch.float64)
    sizes = second.diagonal(dim1=1, dim2=2).sum(1)
    if getattr(dense, "bias", None) is not None:
        mean = metric.mean.detach().to(second)
        second = second - mean[:, :, None] * mean[:, None, :]
        floor = -SLACK * float(metric.second.abs().max())
        if float(second.diagonal(dim1=1, dim2=2).min()) < floor:
            raise LayerError(f"{owner.__name__}: the mean of the metric is larger than its second moment allows")
        second.diagonal(dim1=1, dim2=2).clamp_min_(0)
    weights = None if metric.output_weights is None else metric.output_weights.detach().to(second).reshape(groups, -1)
    living = second.diagonal(dim1=1, dim2=2).sum(1) > NOTHING * sizes
    return tuple(_group(second[g], None if weights is None else weights[g], bool(living[g])) for g in range(groups))


def _group(moment: Tensor, weights: Tensor | None, living: bool) -> GroupMetric | None:
    """Return the metric of a group, None where its inputs are constants or all its weights zero."""
    return GroupMetric(moment, weights) if living and (weights is None or bool(weights.any())) else None


def _check(owner: type[nn.Module], shape: Sequence[int], metric: Metric, kind: str) -> None:
    groups, out, n = shape
    wanted = {"second": (groups, n, n), "mean": (groups, n), "output_weights": (groups * out,)}
    for name, size in wanted.items():
        values = getattr(metric, name)
        if values is None:
            continue
        if tuple(values.shape) != size:
            given = tuple(values.shape)
            raise LayerError(f"{owner.__name__}: {name} of the metric is {size} for this {kind}, not {given}")
        if not bool(torch.isfinite(values).all()):
            raise LayerError(
                f"{owner.__name__}: {name} of the metric of this {kind} holds NaN or Inf: measure it again"
            )
    largest = float(metric.second.abs().max())
    if float((metric.second - metric.second.mT).abs().max()) > ASYMMETRY * largest:
        raise LayerError(f"{owner.__name__}: second of the metric is not symmetric: it is the mean of x x^T")
    if metric.output_weights is not None and float(metric.output_weights.min()) < 0:
        raise LayerError(
            f"{owner.__name__}: output_weights of the metric must be mean squares, got one of "
            f"{float(metric.output_weights.min()):.3g}"
        )


def corrected_bias(dense: Any, weight: Tensor, metric: Metric | None) -> Tensor | None:
    """Return the bias of `dense` for another weight: in a metric `b' = b + (W - W') E[x]`, which keeps the mean."""
    bias: Tensor | None = getattr(dense, "bias", None)
    if bias is None or metric is None:
        return bias
    change = dense.weight.detach().double() - weight.detach().double()
    mean = metric.mean.detach().to(change)
    return bias.detach().double() + (_by_groups(change, len(mean)) @ mean[:, :, None]).flatten()


def _by_groups(weight: Tensor, groups: int) -> Tensor:
    """Return a weight as matrices (groups, out, n)."""
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def output_error(owner: type[nn.Module], dense: Any, weight: Tensor, metric: Metric) -> float:
    """Return the relative error in the metric of a layer with another weight, its bias corrected."""
    groups = group_metrics(owner, dense, metric)
    kept = _by_groups(dense.weight.detach().double(), len(groups))
    other = _by_groups(weight.detach().to(kept), len(groups))
    squares = totals = 0.0
    for group, before, after in zip(groups, kept, other, strict=True):
        if group is not None:
            squares += group.energy(before - after)
            totals += group.energy(before)
    return math.sqrt(max(squares, 0.0) / totals) if totals > 0 else 0.0


def measured_errors(
    ranks: Sequence[Any], error_at: Callable[[Any], float], full: Rank, anchors: int = ANCHORS
) -> tuple[float, ...]:
    """Return the error at each rank, measured at a few ranks in geometric progression and interpolated between them.

    Tuples of ranks are measured at each. The curve never rises with the rank, and ends with 0 at the full one.
    """
    if any(isinstance(rank, tuple) for rank in ranks):
        return tuple(error_at(rank) for rank in ranks)
    below = [rank for rank in ranks if rank != full]
    if not below:
        return (0.0,) * len(ranks)
    known = [int(r) for r in np.unique(np.geomspace(min(below), max(below), anchors).round())]
    curve = monotone_curve(known, [error_at(rank) for rank in known], below)
    of = dict(zip(below, curve, strict=True))
    return tuple(of.get(rank, 0.0) for rank in ranks)
