"""Damage curves tied to a few measured points: what one layer's error does to the outputs of the whole model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from rankfold._common import output_error, track
from rankfold.errors import DataError, PlanError
from rankfold.planning import CALIBRATED, Candidates, Choice, Contest, Plan
from rankfold.stats import Stats
from rankfold.surgery import apply, replace_block

POINTS = (0.15, 0.4)  # errors of a layer at which the model is tried


def measure_damage(
    found: Candidates,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    stats: Stats | None = None,
    points: Sequence[float] = POINTS,
    batches: int | None = None,
) -> Candidates:
    """Return candidates whose damage is measured: the squared error of the model's outputs with one layer changed.

    Each layer alone is replaced by its choices whose errors are nearest to the points, and the outputs are compared
    with the dense model's. Between the points the damage follows a power of the layer's error, before the first its
    square. Sums of these damages then are in one unit for all layers, whatever stands behind them. A layer that could
    replace a block is put in its place, and what that does is its damage.

    Args:
        found: candidates with errors, from `rankfold.planning.candidates`.
        model: the model that they are of; it is not changed.
        loader: one or two hundred typical inputs, in batches: tensors, tuples with the inputs first, or mappings.
        stats: what the candidates were made from, where their metric is of anything but the weights.
        points: relative errors of a layer, each > 0; one pass over the batches for each layer and point.
        batches: how many batches to read at most; all of them if None.

    Raises:
        PlanError: candidates of a rule that looks at no error, or points that are no positive errors.
        DataError: the loader is empty, or the model's outputs can't be compared.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16))
        >>> found = measure_damage(rankfold.planning.candidates(model), model, [torch.randn(64, 16)])
        >>> found.plan(rankfold.Budget(params=0.7)).objective
        'calibrated'
    """
    if not points or not all(0 < point < math.inf for point in points):
        raise PlanError(f"points={points!r} are not errors > 0")
    if any(choice.error is None for choices in found.layers.values() for choice in choices):
        raise PlanError("these candidates have no errors to calibrate: find them with init='decompose'")
    data = list(islice(loader, batches))
    if not data:
        raise DataError("the loader is empty: it must yield at least one batch to calibrate with")
    layers = {}
    for name, choices in track(found.layers.items(), "Measuring layers", total=len(found.layers)):
        tried = _nearest(choices, points)
        measured = [_tried(model, name, choice, found.whole, stats, data) for _, choice in tried]
        layers[name] = _on_curve(choices, [error for error, _ in tried], measured)
    blocks = {name: _measured_block(model, name, contest, data) for name, contest in found.blocks.items()}
    return replace(found, layers=layers, blocks=blocks, whole=replace(found.whole, objective=CALIBRATED))


def _nearest(choices: Sequence[Choice], points: Sequence[float]) -> list[tuple[float, Choice]]:
    """Return the errors nearest to the points with a choice of each, every one once, in ascending order."""
    by_error = {choice.error: choice for choice in reversed(choices) if choice.error}
    if not by_error:
        return []
    nearest = {min(by_error, key=lambda error: abs(math.log(error / point))) for point in points}
    return [(error, by_error[error]) for error in sorted(nearest)]


def _tried(model: nn.Module, name: str, choice: Choice, whole: Plan, stats: Stats | None, data: list[Any]) -> float:
    small = apply(model, replace(whole, layers={name: choice}), stats=stats)
    return _compared(model, small, name, choice, data)


def _compared(model: nn.Module, small: nn.Module, name: str, choice: Choice, data: list[Any]) -> float:
    error = output_error(model, small, data)
    if not math.isfinite(error):
        raise DataError(
            f"the model's outputs can't be compared with layer {name!r} as {choice.method!r} of rank {choice.rank} "
            f"(error {error}): give it more than one example, and outputs that are floating-point tensors"
        )
    return error


def _measured_block(model: nn.Module, name: str, contest: Contest, data: list[Any]) -> Contest:
    """Give the choices of a block their damage."""
    choices = []
    for choice, solved in zip(contest.choices, contest.solved, strict=True):
        small = replace_block(model, name, copy.deepcopy(solved.layer))
        choices.append(replace(choice, damage=_compared(model, small, name, choice, data) ** 2))
    return replace(contest, choices=tuple(choices))


def _on_curve(choices: Sequence[Choice], errors: Sequence[float], measured: Sequence[float]) -> tuple[Choice, ...]:
    """Give every choice its damage: power laws between the measured points, the square of the error outside them."""
    if not errors:
        return tuple(replace(choice, damage=0.0) for choice in choices)
    x, y = np.log(errors), np.log(np.maximum.accumulate(np.maximum(measured, 1e-12)))

    def damage(error: float | None) -> float:
        if not error:
            return 0.0
        at = math.log(error)
        inside = float(np.clip(at, x[0], x[-1]))
        return math.exp(2 * (float(np.interp(inside, x, y)) + at - inside))

    return tuple(replace(choice, damage=damage(choice.error)) for choice in choices)
