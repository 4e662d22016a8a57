"""One layer refitted to the pairs that it was seen with, and kept as it is where that is not better."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rankfold.layers import is_factorised
from rankfold.recalibration._pairs import Pairs
from rankfold.recalibration._solve import Target, alternated, projected, ridge

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried where none is given; more is better the fewer pairs there are."""


class Outcome(NamedTuple):
    """What came of refitting one layer: the mean squared errors of its outputs, and the damping that did best.

    `state` is the new state of the layer; None where the old one was not improved upon.
    """

    before: float
    after: float
    damping: float
    state: Mapping[str, Tensor] | None


def refit(
    layer: nn.Module, solve: Pairs, check: Pairs, damping: float | None, output_weights: Tensor | None = None
) -> Outcome:
    """Return new factors for a layer, linear or convolutional, factorised or not.

    Damping and acceptance are decided on the pairs to check; the factors are then solved for on all of them.

    Args:
        layer: it is not changed.
        solve: pairs to solve on.
        check: other pairs; where there are none, those to solve on.
        damping: eps, what is added to the diagonal of C, over its mean; None to try several.
        output_weights: (groups * out,), weights of the squared errors of the outputs; None for ones.
    """
    whole = solve + check if check.count else solve
    check = check if check.count else solve
    old, bias = values(layer, solve)
    centred = bias is not None
    output_weights = None if output_weights is None else output_weights.to(whole.yy).reshape(whole.yy.shape)

    def target(pairs: Pairs, damping: float) -> Target:
        return ridge(pairs, old, damping, centred=centred, output_weights=output_weights)

    def loss(pairs: Pairs, found: nn.Module) -> float:
        return pairs.loss(*values(found, pairs), output_weights)

    def dense_loss(damping: float) -> float:
        weight = target(solve, damping).weight
        return check.loss(weight, solve.bias(weight) if centred else None, output_weights)

    chosen = min(DAMPINGS, key=dense_loss) if damping is None else damping
    before = whole.loss(old, bias, output_weights)
    trial = _fitted(layer, target(solve, chosen), solve)
    if not loss(check, trial) < check.loss(old, bias, output_weights):
        return Outcome(before, before, chosen, None)
    final = _fitted(trial, target(whole, chosen), whole)
    after = loss(whole, final)
    if not after < before:
        return Outcome(before, before, chosen, None)
    return Outcome(before, after, chosen, final.state_dict())


def values(layer: Any, pairs: Pairs) -> tuple[Tensor, Tensor | None]:
    """Return the weight (groups, out, n) and the bias (groups, out) of a layer in float64."""
    weight, bias = layer.weight.detach().double(), layer.bias
    return weight.reshape(pairs.yx.shape), None if bias is None else bias.detach().double().reshape(pairs.yy.shape)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return the dtype of the first parameter of a layer."""
    return next(layer.parameters()).dtype


def _fitted(layer: nn.Module, target: Target, pairs: Pairs) -> Any:
    """Return a copy of the layer, in its dtype, whose weight is close to the target and whose bias is the best."""
    found = _brought_to(layer, target)
    weight, bias = values(found, pairs)
    if bias is not None:
        with torch.no_grad():
            found.bias.copy_(pairs.bias(weight).flatten())
    return found


def _brought_to(layer: Any, target: Target) -> Any:
    if not is_factorised(layer):
        return _filled(copy.deepcopy(layer), target.weight)
    if layer.stages is not None and layer.stages.is_matrix(layer.options):
        dense = _filled(layer.to_dense(), projected(target, layer.rank))
        return type(layer).from_dense(dense, rank=layer.rank, **layer.options)
    return alternated(layer, target).to(dtype_of(layer))


@torch.no_grad()
def _filled(dense: Any, weight: Tensor) -> Any:
    dense.weight.copy_(weight.reshape(dense.weight.shape))
    return dense
