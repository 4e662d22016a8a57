"""Tensor-train layers in the metric of their outputs: the weight and its metric in the decomposition's layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rankfold.decompose import metric_tt_errors, metric_tt_matrix
from rankfold.layers._contract import Metric, Rank
from rankfold.layers._metric import GroupMetric
from rankfold.layers.tensor._tt_chain import TTForm


def cores_in_metric(
    form: TTForm, matrix: Tensor, rank: Rank, groups: Sequence[GroupMetric | None], metric: Metric
) -> Sequence[Tensor]:
    """Return cores of a weight that aim at the least error of the outputs."""
    given = _arguments(form, matrix, groups, metric)
    return metric_tt_matrix(rank=form.chain(rank).ranks[1:-1], **given).cores


def errors_in_metric(
    form: TTForm, matrix: Tensor, ranks: Sequence[Rank], groups: Sequence[GroupMetric | None], metric: Metric
) -> tuple[float, ...]:
    """Return an estimate of the error of the outputs at each rank."""
    full, bonds = form.full_bonds(), [form.chain(rank).ranks[1:-1] for rank in ranks]
    below = sorted({found for found in bonds if found != full})
    if not below:
        return (0.0,) * len(ranks)
    estimates = metric_tt_errors(ranks=below, **_arguments(form, matrix, groups, metric))
    known = {**dict(zip(below, estimates, strict=True)), full: 0.0}
    return tuple(known[found] for found in bonds)


def _arguments(form: TTForm, matrix: Tensor, groups: Sequence[GroupMetric | None], metric: Metric) -> dict[str, Any]:
    """Return the weight as (out, lead and padded inputs), and its metric in that order."""
    lead, padded = max(form.lead, 1), math.prod(form.in_shape)
    wide = matrix.new_zeros(form.out_size, lead, padded)
    wide[:, :, : form.in_size] = matrix.transpose(0, 1) if form.lead else matrix[:, None]
    moments = matrix.new_zeros(len(groups), lead, padded, lead, padded)
    for moment, group in zip(moments, groups, strict=True):
        if group is not None:
            cube = group.moment.to(moment).reshape(form.in_size, lead, form.in_size, lead)
            moment[:, : form.in_size, :, : form.in_size] = cube.permute(1, 0, 3, 2)
    head: tuple[tuple[int, ...], ...] = ((1,), (form.lead,)) if form.lead else ((), ())
    weights = None if metric.output_weights is None else metric.output_weights.detach().to(matrix)
    return {
        "matrix": wide.flatten(1),
        "out_shape": (*head[0], *form.out_shape),
        "in_shape": (*head[1], *form.in_shape),
        "second_moment": moments.flatten(3).flatten(1, 2),
        "output_weights": weights,
    }
