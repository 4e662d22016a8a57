"""The weights of one layer that are best for the pairs it was seen with, in closed form or factor by factor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankfold.decompose import svd
from rankfold.recalibration._pairs import Pairs

SWEEPS = 12
"""How often each factor of a layer is solved for, in turn."""
STEPS = 12
"""Steps of conjugate gradients in each of these solutions."""

LEAST = 1e-30
"""In place of the mean square of inputs that are all zero."""


@dataclass(frozen=True, eq=False)
class Target:
    """The dense weight that is best for some pairs, and the metric in which to come close to it.

    The loss of a weight W is `sum_g trace(R_g (W - T) C (W - T)^T)` and a constant.

    Attributes:
        weight: T, (groups, out, n).
        metric: C, (groups, n, n).
        output_weights: the diagonal of R, (groups, out): weights of the outputs; None for ones.
    """

    weight: Tensor
    metric: Tensor
    output_weights: Tensor | None = None


def ridge(
    pairs: Pairs, weight: Tensor, damping: float, *, centred: bool, output_weights: Tensor | None = None
) -> Target:
    """Return `T = W + (E[y x^T] - W C)(C + eps I)^-1` with C = E[x x^T] and eps = damping * its mean diagonal.

    T minimises `E||y - T x||^2 + eps ||T - W||^2`: it is drawn towards the weight W of the layer, not towards zero.

    Args:
        pairs: inputs and wanted outputs.
        weight: W, (groups, out, n).
        damping: more is added where C + eps I is not positive definite to rounding.
        centred: whether a bias takes up the means.
        output_weights: weights of the outputs, which T does not depend on.
    """
    metric, cross = pairs.means(centred=centred)
    metric = (metric + metric.mT) / 2  # products of single precision are not quite symmetric
    cross = cross - weight @ metric
    diagonal = metric.diagonal(dim1=1, dim2=2)
    unit = diagonal.mean(1, keepdim=True).clamp_min(LEAST)
    diagonal.add_(damping * unit)
    factor, failed = torch.linalg.cholesky_ex(metric)
    while bool(failed.any()):  # what rounding took from the covariance of inputs far from zero
        diagonal.add_(damping * unit)
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(metric)
    return Target(weight + torch.cholesky_solve(cross.mT, factor).mT, metric, output_weights)


def projected(target: Target, rank: int) -> Tensor:
    """Return the weight of a rank that is closest to the target in its metric, group by group.

    It is `U U^T T` with the leading eigenvectors U of `T C T^T`: reduced-rank regression.
    """
    weights = [None] * len(target.weight) if target.output_weights is None else target.output_weights
    groups = zip(target.weight, target.metric, weights, strict=True)
    return torch.stack([svd(weight, rank, second_moment=c, output_weights=r).to_dense() for weight, c, r in groups])


def alternated(layer: nn.Module, target: Target) -> nn.Module:
    """Return a copy in float64 of a factorised layer whose weight is closer to the target.

    The weight is linear in each factor: each in turn takes some steps of conjugate gradients, which never go up.
    """
    twin = copy.deepcopy(layer).double().requires_grad_(False)
    factors = [p for name, p in twin.named_parameters() if name.rpartition(".")[2] != "bias"]
    for _ in range(SWEEPS):
        for factor in factors:
            factor.requires_grad_(True)
            _descend(twin, factor, target)
            factor.requires_grad_(False)
    return twin


def _descend(twin: Any, factor: nn.Parameter, target: Target) -> None:
    def gradient() -> Tensor:
        with torch.enable_grad():
            distance = twin.weight.reshape(target.weight.shape) - target.weight
            weighed = distance if target.output_weights is None else distance * target.output_weights[..., None]
            loss = 0.5 * ((distance @ target.metric) * weighed).sum()
            (found,) = torch.autograd.grad(loss, factor)
        return found

    residual = -gradient()
    direction, energy = residual.clone(), float(residual.square().sum())
    first = energy
    for _ in range(min(STEPS, factor.numel())):
        if not energy > 1e-20 * first:
            return
        # The gradient is affine in the factor: its change along the direction is the Hessian's product with it.
        factor.data.add_(direction)
        curved = gradient() + residual
        curvature = float((direction * curved).sum())
        step = energy / curvature if curvature > 0 else 0.0
        factor.data.add_(direction, alpha=step - 1)
        if not step:
            return
        residual = residual - step * curved
        before, energy = energy, float(residual.square().sum())
        direction = residual + energy / before * direction
