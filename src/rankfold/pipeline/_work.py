"""What the road from a model to a smaller one needs on the way: the data, what was measured, and how to plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from rankfold._common import batch_arguments
from rankfold.errors import DataError, PlanError
from rankfold.planning import Blocks, Budget, Plan, Planning, check_blocks, is_block
from rankfold.stats import Stats, measure
from rankfold.train import flexible_candidates

ROWS = 20_000  # inputs of a block that a flexible layer is fitted at
RUN_AGAIN = ("mask", "loss")  # functions of a planning that are needed after planning, too


KINDS: Mapping[str, tuple[type, str]] = {
    "budget": (Budget, "rankfold.Budget(params=0.5)"),
    "plan": (Plan, "rankfold.Plan, which Plan.from_json(text) reads"),
    "planning": (Planning, "rankfold.Planning(methods='svd')"),
}


def check_kinds(**given: Any) -> None:
    """Raise a `PlanError` where an argument is of another kind than its name says."""
    for name, value in given.items():
        kind, example = KINDS[name]
        if value is not None and not isinstance(value, kind):
            raise PlanError(f"{name}= must be a {example}, got {value!r:.80}")


@dataclass(frozen=True, eq=False)
class Data:
    """The data of a compression: a loader that can be read several times, or an example, or nothing.

    Attributes:
        loader: batches, or None.
        example: the arguments of one call, or None.
        planning: which batches, and which tokens of them, count.
    """

    loader: Iterable[Any] | None
    example: Any
    planning: Planning

    @classmethod
    def of(cls, loader: Iterable[Any] | None, example: Any, planning: Planning) -> Data:
        """Take the data, keeping in memory what an iterator yields only once."""
        kept = list(islice(loader, planning.batches)) if isinstance(loader, Iterator) else loader
        return cls(kept, example, planning)

    def stats(self, model: nn.Module, *, moments: bool) -> Stats | None:
        """Measure the model, with moments where they are wanted and there is a loader; None where there are no data."""
        if self.loader is None:
            return None if self.example is None else measure(model, example=self.example)
        if not moments:
            return measure(model, self.loader)
        how: dict[str, Any] = {name: getattr(self.planning, name) for name in ("batches", "mask", "loss")}
        return measure(model, self.loader, moments=True, **how)

    def shown(self) -> Any:
        """Return the example, or the first batch of the loader as one."""
        if self.example is not None or self.loader is None:
            return self.example
        args, kwargs = next((batch_arguments(batch) for batch in self.loader), ((), {}))
        return args or kwargs or None


@dataclass(frozen=True, eq=False)
class Work:
    """A model, and all that planning it and building a smaller one have in common.

    Attributes:
        model: the dense model.
        data: what it is measured and recalibrated on.
        planning: how it is to be made smaller.
        stats: what was measured; None without data.
        blocks: per name of a block, the layers that were solved for it.
        executor: whose workers decompose layers, if any.
    """

    model: nn.Module
    data: Data
    planning: Planning
    stats: Stats | None
    blocks: Blocks = field(default_factory=dict)
    executor: Executor | None = None


def work_for_planning(
    model: nn.Module, data: Data, stats: Stats | None, executor: Executor | None, quantities: Sequence[str]
) -> Work:
    """Solve the blocks and measure the model, as far as planning it needs that."""
    planning = data.planning
    blocks = planning.blocks
    if blocks:
        check_blocks(planning.rule, quantities, planning.metric, planning.init)
    solved = blocks if isinstance(blocks, Mapping) else _solved(model, blocks, data)
    if stats is None:
        stats = data.stats(model, moments=planning.init != "random" and planning.metric != "weights")
    return Work(model, data, planning, stats, solved, executor)


def work_for_plan(model: nn.Module, data: Data, stats: Stats | None, executor: Executor | None, plan: Plan) -> Work:
    """Solve the blocks and measure the model, as far as building what a plan says needs that."""
    planning = data.planning
    if plan.metric != "weights" and planning.init != "random" and stats is None and data.loader is None:
        raise DataError(
            f"the plan is in the metric {plan.metric!r}, and its factors need the data again: pass the loader that it "
            "was made with (on the command line --data), or stats=measure(model, loader, moments=True)"
        )
    lost = [name for name in planning.missing if name in RUN_AGAIN]
    if lost and data.loader is not None:
        raise PlanError(
            f"the plan was made with {lost[0]}=, a function, which its JSON does not hold: pass "
            f"planning=dataclasses.replace(plan.planning, {lost[0]}=…, missing=()) to use it again"
        )
    chosen = [name for name, choice in plan.layers.items() if is_block(choice)]
    solved: Blocks = planning.blocks if isinstance(planning.blocks, Mapping) else {}
    if chosen and not solved and "blocks" in planning.missing and planning.init != "random":
        raise PlanError(
            f"block {chosen[0]!r} was planned with layers that you had found for it, which JSON does not hold: pass "
            "planning=dataclasses.replace(plan.planning, blocks=…, missing=()) with those layers"
        )
    if chosen and not solved and planning.init != "random":
        solved = _solved(model, chosen, data)
    if stats is None:
        stats = data.stats(model, moments=planning.init != "random" and plan.metric != "weights")
    return Work(model, data, planning, stats, solved, executor)


def _solved(model: nn.Module, names: Sequence[str], data: Data) -> Blocks:
    """Return the layers that `flexible_candidates` finds for blocks on the data."""
    if not names:
        return {}
    if data.loader is None:
        raise PlanError(f"block {names[0]!r} is solved on data: pass a loader")
    batches = data.planning.batches
    loader = data.loader if batches is None else list(islice(data.loader, batches))
    return flexible_candidates(model, names, loader, rows=ROWS, seed=data.planning.seed)
