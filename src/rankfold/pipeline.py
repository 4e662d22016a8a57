"""From a model and a budget to a smaller model, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from typing import Any

from torch import nn

from rankfold.planning import Budget, Init, Plan, Select, plan
from rankfold.stats import measure
from rankfold.surgery import apply


def compress(  # noqa: PLR0913
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    example: Any = None,
    budget: Budget | None = None,
    methods: str | Sequence[str] = ("svd", "tucker"),
    rule: str | Select = "optimal",
    init: Init = "decompose",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    multiple: int = 1,
    seed: int = 0,
    executor: Executor | None = None,
) -> tuple[nn.Module, Plan]:
    """Return a smaller model and the plan it was made by: `measure`, `plan` and `apply` in a row.

    Args:
        model: any module; it is not changed.
        loader: an iterable of batches, of which the first is used.
        example: instead of a loader, the arguments of one call.
        budget: fractions of the whole model to keep.
        methods: as in `plan`.
        rule: as in `plan`.
        init: as in `plan` and `apply`.
        include: as in `plan`.
        exclude: as in `plan`.
        multiple: as in `plan`.
        seed: as in `plan` and `apply`.
        executor: as in `plan` and `apply`.

    Raises:
        RankfoldError: as `measure`, `plan` and `apply` do.

    Example:
        >>> import torch, rankfold
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> small, found = compress(model, example=torch.ones(1, 64), budget=rankfold.Budget(params=0.5))
        >>> sum(p.numel() for p in small.parameters()) == found.params
        True
    """
    stats = measure(model, loader, example=example)
    found = plan(
        model,
        budget=budget,
        stats=stats,
        methods=methods,
        rule=rule,
        init=init,
        include=include,
        exclude=exclude,
        multiple=multiple,
        seed=seed,
        executor=executor,
    )
    return apply(model, found, init=init, seed=seed, executor=executor), found
