"""From a model and a budget to a smaller model, in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from torch import nn

from rankfold.errors import PlanError
from rankfold.latency import Timing
from rankfold.pipeline._search import Evaluate, search
from rankfold.pipeline._steps import AUTO, Builder, Data, planner, solved_blocks
from rankfold.planning import CALIBRATED, SQUARES, Blocks, Budget, Init, Plan, Select, plan
from rankfold.stats import Stats


def compress(  # noqa: PLR0913
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example: Any = None,
    stats: Stats | None = None,
    budget: Budget | None = None,
    max_drop: float | None = None,
    evaluate: Evaluate | None = None,
    methods: str | Sequence[str] = ("svd", "tucker"),
    rule: str | Select = "optimal",
    metric: str = "auto",
    objective: str = AUTO,
    init: Init = "decompose",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    multiple: int = 1,
    recalibrate: bool = True,
    batchnorm: bool = True,
    batches: int | None = None,
    mask: Any = None,
    loss: Callable[[Any, Any], Any] | None = None,
    timing: Timing | None = None,
    seed: int = 0,
    executor: Executor | None = None,
    blocks: str | Sequence[str] | Blocks = (),
) -> tuple[nn.Module, Plan]:
    """Return a smaller model and the plan it was made by: `measure`, `plan` and `apply` in a row.

    With a loader it does the best it can from the data without training: the inputs of all layers are measured, ranks
    and factors are chosen by the errors of outputs instead of weights, the new layers are fitted to the inputs that
    they get in the smaller model (`recalibrate`), and the BatchNorm statistics are measured anew where that brings
    the outputs on the same data nearer to the dense model's. Each part can be switched off by its name.

    Args:
        model: any module; it is not changed.
        loader: an iterable of batches as in `measure`: a few hundred typical inputs. It is read several times, and an
            iterator, which can't be, is kept in memory.
        example: instead of a loader, the arguments of one call, from which only shapes are taken. Beside a loader it is
            what latency is measured on, instead of the loader's first batch.
        stats: what `measure` found before; it is then not measured again.
        budget: fractions of the whole model to keep. For a latency, layers are timed (`rankfold.latency.time_layers`),
            and the latency of the whole model is measured at the end (`rankfold.pipeline.plan_in_time`).
        max_drop: instead of a budget, how far the score of the model may fall: the model with the fewest MACs that
            `rankfold.search` finds within that.
        evaluate: with `max_drop`, a function of a model to its score, as in `rankfold.search`.
        methods: as in `plan`.
        rule: as in `plan`.
        metric: as in `plan`; "weights" plans and decomposes without looking at the data.
        objective: as in `plan`, or "calibrated": what each layer alone does to the outputs of the model is measured on
            the first batches (`rankfold.pipeline.calibrate`), and made small. It takes two runs per layer. "auto" is
            that where rule "optimal" has data to go by and the outputs can be compared, and else "squares".
        init: as in `plan` and `apply`; with "random" only shapes are taken from the data.
        include: as in `plan`.
        exclude: as in `plan`.
        multiple: as in `plan`.
        recalibrate: with a loader, fit the new layers to the inputs that they get.
        batchnorm: with a loader, re-estimate BatchNorm where that lowers the error of the outputs.
        batches: how many batches to read at most; all of them if None.
        mask: as in `measure`: which tokens count.
        loss: as in `measure`; needed for the metrics "fisher" and "fwsvd".
        timing: runtime, threads and duration of these measurements; by default eager PyTorch as it is set.
        seed: as in `plan` and `apply`.
        executor: as in `plan` and `apply`.
        blocks: names "first:last" of blocks, stretches of linear layers or convolutions of kernel 1, that a flexible
            layer may stand for where that is better than factorising their layers. Five are found for each from the
            loader, with values fitted at 20,000 inputs, which takes minutes; or give what
            `rankfold.train.flexible_candidates` found, with ranks and settings of your own.

    Raises:
        PlanError: a budget and `max_drop`, or only one of `max_drop` and `evaluate`.
        RankfoldError: as `measure`, `plan`, `apply` and `search` do.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> small, found = compress(model, example=torch.ones(1, 64), budget=rankfold.Budget(params=0.5))
        >>> sum(p.numel() for p in small.parameters()) == found.params
        True
    """
    settings: dict[str, Any] = {
        "methods": methods,
        "rule": rule,
        "metric": metric,
        "objective": objective,
        "include": include,
        "exclude": exclude,
        "multiple": multiple,
        "seed": seed,
        "executor": executor,
    }
    if max_drop is not None or evaluate is not None:
        if max_drop is None or evaluate is None or budget is not None or init != "decompose":
            raise PlanError("max_drop= goes with evaluate=, without a budget and with init='decompose'")
        settings |= {"recalibrate": recalibrate, "batchnorm": batchnorm, "batches": batches, "mask": mask, "loss": loss}
        settings |= {"example": example, "stats": stats, "timing": timing, "blocks": blocks}
        found = search(model, loader, evaluate=evaluate, max_drop=max_drop, **settings)
        return found.model, found.plan
    data = Data.of(loader, example, batches, mask)
    limited = tuple(budget.limits) if budget else ()
    settings["blocks"] = found_blocks = solved_blocks(model, blocks, data, limited, settings, init)
    if stats is None:
        stats = data.stats(model, moments=loader is not None and init != "random" and metric != "weights", loss=loss)
    settings["init"] = init
    if budget is None and objective != CALIBRATED:
        made = plan(model, stats=stats, **{**settings, "objective": SQUARES if objective == AUTO else objective})
    else:
        made = planner(model, data, limited, timing, stats=stats, **settings)(budget)
    builder = Builder(model, data, stats, init, recalibrate, batchnorm, seed, executor, found_blocks)
    return builder.build(made), made
