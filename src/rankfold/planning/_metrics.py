"""The table of metrics: what the errors of a layer are measured in, and what of the statistics each one needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from rankfold._common import one_of
from rankfold.errors import PlanError
from rankfold.layers import Call, Metric
from rankfold.stats import Stats, count_params

WEIGHTS: Final = "weights"
AUTO: Final = "auto"
ASVD_POWER = 0.5  # the alpha that Yuan et al. found the best


@dataclass(frozen=True)
class Grade:
    """One row of the table.

    Attributes:
        of: from the measured metric of a layer, with or without weights of its outputs, to this one; None on weights.
        gradients: whether the gradients of a loss in the outputs are needed.
    """

    of: Callable[[Metric], Metric] | None
    gradients: bool = False


def _outputs(metric: Metric) -> Metric:
    """Return the second moment and the mean as they are: those who use them centre where there is a bias."""
    return metric


def _whitening(metric: Metric) -> Metric:
    """Return the second moment alone, as the Cholesky factor of SVD-LLM has it: nothing centred, no bias changed."""
    return replace(metric, mean=torch.zeros_like(metric.mean))


def _asvd(metric: Metric) -> Metric:
    """Return the squared scale s_j = (mean |x_j|)^alpha of each input alone; the mean is taken as sqrt(E x_j^2)."""
    scales = metric.second.diagonal(dim1=-2, dim2=-1).clamp_min(0) ** ASVD_POWER  # (E x^2)^alpha = s^2
    return Metric(torch.diag_embed(scales), torch.zeros_like(metric.mean))


def _fwsvd(metric: Metric) -> Metric:
    """Return white inputs and the weights of the outputs: row i of W counts sum_j E (dL/dW_ij)^2.

    With dL/dW_ij = g_i x_j that sum is E[g_i^2 |x|^2], taken as E[g_i^2] E[|x|^2], whose second factor all rows share.
    """
    unit = torch.eye(metric.mean.shape[-1], dtype=metric.second.dtype, device=metric.second.device)
    return Metric(unit.expand_as(metric.second).contiguous(), torch.zeros_like(metric.mean), metric.output_weights)


METRICS: Mapping[str, Grade] = MappingProxyType(
    {
        WEIGHTS: Grade(None),
        "outputs": Grade(_outputs),
        "fisher": Grade(_outputs, gradients=True),
        "fwsvd": Grade(_fwsvd, gradients=True),
        "asvd": Grade(_asvd),
        "whitening": Grade(_whitening),
    }
)


def metric_name(name: Any, stats: Stats | None) -> str:
    """Return the metric of a name: for "auto", the outputs where the statistics hold moments.

    Raises:
        PlanError: no such metric, or the statistics lack what it needs.
    """
    if name == AUTO:
        return "outputs" if stats is not None and _has_moments(stats) else WEIGHTS
    one_of("metric", name, (AUTO, *METRICS), error=PlanError)
    if METRICS[name].of is not None and (stats is None or not _has_moments(stats)):
        raise PlanError(f"metric {name!r} needs the inputs of the layers: pass stats={_call(METRICS[name])}")
    if METRICS[name].gradients and stats is not None and not _has_gradients(stats):
        raise PlanError(f"metric {name!r} needs gradients of a loss: pass stats={_call(METRICS[name])}")
    return str(name)


def layer_metric(metric: str, stats: Stats | None, name: str) -> Metric | None:
    """Return the metric of one layer, or None where its error is of the weight: nothing else is known of it."""
    grade = METRICS[metric]
    if grade.of is None or stats is None:
        return None
    seen = stats.metric(name, weighted=True) if grade.gradients else stats.metric(name)
    return None if seen is None or (grade.gradients and seen.output_weights is None) else grade.of(seen)


def signal(name: str, layer: Any, metric: Metric | None, calls: Sequence[Call] | None, batch_size: int) -> float:
    """Return the weighted squares of a layer's outputs, summed over outputs and positions of one sample.

    `positions * sum_i rows_i w_i C w_i^T`, with C centred where there is a bias.

    Raises:
        PlanError: nothing is known of the gradients in this layer's outputs.
    """
    if metric is None or metric.output_weights is None or not calls:
        raise PlanError(
            f"layer {name!r}: the statistics hold no gradients in its outputs, and its errors can't be weighed against "
            f"those of others in the loss: leave it out with exclude=({name!r},), or choose another objective"
        )
    second = metric.second
    if getattr(layer, "bias", None) is not None:
        second = second - metric.mean.unsqueeze(2) * metric.mean.unsqueeze(1)
    matrix = layer.weight.detach().to(second).flatten(1).unflatten(0, (len(second), -1))  # groups, out, n
    squares = torch.einsum("gon,gnm,gom->go", matrix, second, matrix).flatten()
    positions = sum(math.prod(call.output) for call in calls) / len(squares) / batch_size
    return positions * float(squares.clamp_min(0) @ metric.output_weights)


def check_stats(layers: Mapping[str, nn.Module], stats: Stats | None) -> None:
    """Raise a `PlanError` where statistics are of another model."""
    if stats is None:
        return
    for name, layer in layers.items():
        if name not in stats.layers:
            raise PlanError(f"the statistics are of another model: they have no layer {name!r}; measure this one")
        seen = stats.layers[name]
        if (seen.kind, seen.params) != (type(layer).__name__, count_params(layer)):
            raise PlanError(
                f"the statistics are of another model: layer {name!r} was a {seen.kind} with {seen.params} parameters "
                f"and is a {type(layer).__name__} with {count_params(layer)}; measure this one"
            )


def _has_moments(stats: Stats) -> bool:
    return any(layer.moments is not None for layer in stats.layers.values())


def _has_gradients(stats: Stats) -> bool:
    known = (layer.moments for layer in stats.layers.values() if layer.moments is not None)
    return any(moments.output_weights is not None for moments in known)


def _call(grade: Grade) -> str:
    return f"measure(model, loader, moments=True{', loss=…' if grade.gradients else ''})"
