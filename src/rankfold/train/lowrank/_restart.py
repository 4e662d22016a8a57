"""The optimiser after layers were replaced: the same settings for the new parameters, and a warm restart."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rankfold._common import whole
from rankfold.errors import RankfoldError
from rankfold.train.lowrank._targets import unwrapped


def restarted(
    optimizer: torch.optim.Optimizer, before: nn.Module, after: nn.Module, *, warmup: int = 100
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return an optimiser of the same kind for a model whose layers were replaced, and a warm-up schedule for it.

    A parameter joins the group of the parameter of the same name in the old model; the factors of a replaced layer
    join the group of that layer's weight. The state of the optimiser (momentum, second moments) is kept for parameters
    whose values are unchanged and starts from scratch for all others, which is why the learning rate rises linearly
    over the first steps.

    Args:
        optimizer: the optimiser of the old model; it is not changed.
        before: the old model.
        after: the new model, such as `prune` returns.
        warmup: number of steps over which the learning rate rises to its current value.

    Returns:
        The optimiser, and a scheduler whose `step()` is to be called after each optimiser step.

    Raises:
        RankfoldError: the optimiser trains no parameter of the old model.

    Example:
        >>> import rankfold as rf
        >>> form, _ = rf.train.svd_form(nn.Sequential(nn.Linear(16, 16)))
        >>> optimizer = torch.optim.SGD(form.parameters(), lr=0.1, momentum=0.9)
        >>> small, _ = rf.train.SVDTraining(form).prune(budget=rf.Budget(params=0.5))
        >>> optimizer, schedule = restarted(optimizer, form, small, warmup=10)
        >>> round(optimizer.param_groups[0]["lr"], 6), optimizer.param_groups[0]["momentum"]
        (0.01, 0.9)
    """
    whole("warmup", warmup)
    owners = {id(p): k for k, group in enumerate(optimizer.param_groups) for p in group["params"]}
    old = {name: p for name, p in unwrapped(before).named_parameters() if id(p) in owners}
    if not old:
        raise RankfoldError(
            "the optimiser trains no parameter of the model before: pass the model that it was made for"
        )
    groups: list[dict[str, Any]] = [
        {**{key: value for key, value in group.items() if key not in ("params", "initial_lr")}, "params": []}
        for group in optimizer.param_groups
    ]
    same: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in unwrapped(after).named_parameters():
        if not parameter.requires_grad:
            continue
        source = _source(name, old)
        groups[owners[id(old[source])]]["params"].append(parameter)
        if torch.equal(old[source], parameter):
            same[parameter] = old[source]
    fresh = _like(optimizer, [group for group in groups if group["params"]])
    for parameter, twin in same.items():
        if twin in optimizer.state:
            fresh.state[parameter] = {
                key: value.clone() if isinstance(value, torch.Tensor) else value
                for key, value in optimizer.state[twin].items()
            }
    return fresh, LambdaLR(fresh, lambda step: min(1.0, (step + 1) / warmup))


def _like(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return an optimiser of the same class and defaults, leaving out defaults that the class does not accept."""
    kind: Any = type(optimizer)
    taken = inspect.signature(kind).parameters
    fresh: torch.optim.Optimizer = kind(groups, **{k: v for k, v in optimizer.defaults.items() if k in taken})
    return fresh


def _source(name: str, old: dict[str, nn.Parameter]) -> str:
    """Return the name of the old parameter whose group a new one joins: the one with the longest common prefix."""
    parts = name.split(".")

    def likeness(other: str) -> tuple[int, bool]:
        common = 0
        for mine, theirs in zip(parts, other.split("."), strict=False):
            if mine != theirs:
                break
            common += 1
        return common, other.rpartition(".")[2] == parts[-1]

    return name if name in old else max(old, key=likeness)
