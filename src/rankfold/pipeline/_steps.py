"""What `compress` and `search` do in a row: measure once, then plan and build for as many budgets as there are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rankfold._common import batch_arguments, output_error
from rankfold.errors import DataError, PlanError
from rankfold.latency import Timing, time_layers
from rankfold.pipeline._damage import calibrate
from rankfold.pipeline._latency_check import plan_in_time
from rankfold.planning import CALIBRATED, SQUARES, Blocks, Budget, Candidates, Init, Plan, candidates, check_blocks
from rankfold.recalibration import recalibrate
from rankfold.stats import Stats, measure
from rankfold.surgery import apply
from rankfold.train import flexible_candidates, reestimate_batchnorm

TRIED = 4  # batches that a calibrated plan tries each layer on
ROWS = 20_000  # inputs of a block that a flexible layer is fitted at
AUTO = "auto"  # the objective of `compress` and `search` unless told otherwise


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a compression: a loader that can be read several times, or an example.

    Attributes:
        loader: batches, or None.
        example: the arguments of one call, or None.
        batches: how many batches to read at most.
        mask: which tokens count, as in `measure`.
    """

    loader: Iterable[Any] | None
    example: Any
    batches: int | None
    mask: Any

    @classmethod
    def of(cls, loader: Iterable[Any] | None, example: Any, batches: int | None, mask: Any) -> Data:
        """Take the data, keeping in memory what an iterator yields only once."""
        kept = list(islice(loader, batches)) if isinstance(loader, Iterator) else loader
        return cls(kept, example, batches, mask)

    def stats(self, model: nn.Module, *, moments: bool, loss: Callable[[Any, Any], Any] | None) -> Stats:
        """Measure the model on the data."""
        more = {"moments": True, "batches": self.batches, "mask": self.mask, "loss": loss} if moments else {}
        return measure(model, self.loader, example=self.example if self.loader is None else None, **more)

    def shown(self) -> Any:
        """Return the example, or the first batch of the loader as one."""
        if self.example is not None or self.loader is None:
            return self.example
        args, kwargs = next((batch_arguments(batch) for batch in self.loader), ((), {}))
        return args or kwargs or None


def solved_blocks(  # noqa: PLR0913
    model: nn.Module,
    blocks: str | Sequence[str] | Blocks,
    data: Data,
    quantities: Sequence[str],
    search: Mapping[str, Any],
    init: str = "decompose",
) -> Blocks:
    """Return the solved layers of blocks: those given, or by name as `flexible_candidates` finds them on the data."""
    if not blocks:
        return {}
    check_blocks(search["rule"], quantities, search["metric"], init)
    if isinstance(blocks, Mapping):
        return blocks
    if data.loader is None:
        raise PlanError("blocks= are solved for on data: pass a loader")
    loader = data.loader if data.batches is None else list(islice(data.loader, data.batches))
    return flexible_candidates(model, blocks, loader, rows=ROWS, seed=search["seed"])


def planner(
    model: nn.Module, data: Data, quantities: Sequence[str], timing: Timing | None, *, stats: Stats, **search: Any
) -> Callable[[Budget | None], Plan]:
    """Return a function from a budget on some quantities to a plan; the layers are decomposed once, here.

    The plan of a budget on latency keeps it in the whole model.
    """
    if "latency" not in quantities:
        return _candidates(model, data, quantities, stats, search).plan
    example = data.shown()
    if example is None:
        raise DataError("a budget on latency is measured on an example: pass example=… or a loader")
    if stats.times is None:
        stats = time_layers(model, stats, example=example, methods=search["methods"], timing=timing)
    elif timing is None:
        timing = Timing(runtime=stats.times.setting.runtime, threads=stats.times.setting.threads)
    found = _candidates(model, data, quantities, stats, search)
    return lambda budget: plan_in_time(model, found, budget or Budget(latency=1.0), example=example, timing=timing)


def _candidates(
    model: nn.Module, data: Data, quantities: Sequence[str], stats: Stats, search: dict[str, Any]
) -> Candidates:
    """Return what the layers could become; calibrated on the first batches where that is the objective."""
    objective = search["objective"]
    automatic = objective == AUTO
    if automatic:
        objective = CALIBRATED if _tells(data, stats, search) else SQUARES
    if objective != CALIBRATED:
        return candidates(model, quantities=tuple(quantities), stats=stats, **{**search, "objective": objective})
    if data.loader is None:
        raise PlanError(f"objective {CALIBRATED!r} measures the outputs of the model on data: pass a loader")
    found = candidates(model, quantities=tuple(quantities), stats=stats, **{**search, "objective": SQUARES})
    limit = TRIED if data.batches is None else min(TRIED, data.batches)
    try:
        return calibrate(found, model, data.loader, stats=stats, batches=limit, seed=search["seed"])
    except DataError:
        if automatic:  # outputs that can't be compared say nothing of the layers
            return found
        raise


def _tells(data: Data, stats: Stats, search: dict[str, Any]) -> bool:
    """Tell whether there is data to calibrate on, and a rule and a metric that ask for it."""
    measured = any(layer.moments is not None for layer in stats.layers.values())
    asked = search["rule"] == "optimal" and search["metric"] != "weights" and search.get("init") != "random"
    return data.loader is not None and measured and asked


@dataclass(frozen=True, eq=False)
class Builder:
    """How a model is made from a plan.

    Attributes:
        model: the dense model.
        data: what it is recalibrated on.
        stats: what was measured.
        init: as in `apply`.
        recalibrate: whether the layers are fitted to the inputs that they get.
        batchnorm: whether BatchNorm is re-estimated where that lowers the error of the outputs.
        seed: as in `apply`.
        executor: as in `apply`.
        blocks: as in `apply`.
    """

    model: nn.Module
    data: Data
    stats: Stats
    init: Init
    recalibrate: bool
    batchnorm: bool
    seed: int
    executor: Executor | None
    blocks: Blocks = field(default_factory=dict)

    def build(self, found: Plan) -> nn.Module:
        """Return the model of a plan."""
        settings: dict[str, Any] = {"init": self.init, "seed": self.seed, "executor": self.executor}
        small = apply(self.model, found, stats=self.stats, blocks=self.blocks, **settings)
        loader, batches = self.data.loader, self.data.batches
        if loader is None or self.init == "random":
            return small
        if self.recalibrate:
            weights = self.stats if found.metric == "fisher" else None
            small = recalibrate(
                small, self.model, loader, batches=batches, mask=self.data.mask, stats=weights, seed=self.seed
            )
        return _reestimated(self.model, small, loader, batches) if self.batchnorm else small


def _reestimated(model: nn.Module, small: nn.Module, loader: Iterable[Any], batches: int | None) -> nn.Module:
    """Return the small model with BatchNorm re-estimated, if its outputs are then nearer to the dense model's."""
    if not any(isinstance(module, _BatchNorm) for module in small.modules()):
        return small
    other = copy.deepcopy(small)
    data = list(islice(loader, batches))
    reestimate_batchnorm(other, data, batches=max(1, len(data)))
    return other if output_error(model, other, data) < output_error(model, small, data) else small
