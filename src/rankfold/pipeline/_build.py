"""The second half of the road: from a plan to the model that it describes, as good as the data can make it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold._common import output_error
from rankfold.pipeline._work import Work
from rankfold.planning import Plan
from rankfold.recalibration import recalibrate
from rankfold.surgery import apply
from rankfold.train import reestimate_batchnorm


def build(work: Work, plan: Plan) -> nn.Module:
    """Return the model of a plan: its factors in the plan's metric, fitted to the data, BatchNorm re-estimated."""
    planning, data = work.planning, work.data
    how: dict[str, Any] = {"init": planning.init, "seed": planning.seed, "executor": work.executor}
    small = apply(work.model, plan, stats=work.stats, blocks=work.blocks, **how)
    if data.loader is None or planning.init == "random":
        return small
    if planning.recalibrate:
        weights = work.stats if plan.metric == "fisher" else None
        how = {"batches": planning.batches, "mask": planning.mask, "seed": planning.seed}
        small = recalibrate(small, work.model, data.loader, stats=weights, **how)
    return _reestimated(work.model, small, data.loader, planning.batches) if planning.batchnorm else small


def _reestimated(model: nn.Module, small: nn.Module, loader: Iterable[Any], batches: int | None) -> nn.Module:
    """Return the small model with BatchNorm re-estimated, if its outputs are then nearer to the dense model's."""
    if not any(isinstance(module, _BatchNorm) for module in small.modules()):
        return small
    other = copy.deepcopy(small)
    data = list(islice(loader, batches))
    reestimate_batchnorm(other, data, batches=max(1, len(data)))
    return other if output_error(model, other, data) < output_error(model, small, data) else small
