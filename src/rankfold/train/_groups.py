"""A learning rate for every factor, derived from the rate tuned for the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from rankfold._common import real
from rankfold.errors import LayerError, RankfoldError
from rankfold.layers import fan_ins, is_factorised

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float | None = None, decay_all: bool = False
) -> list[dict[str, Any]]:
    """Return the parameters of a model in groups, each with its own learning rate, for Adam and its relatives.

    A step of Adam changes every entry by about the learning rate, whatever the size of the gradient, so an output
    that is a sum over n inputs changes by about n times that. A factor of fan-in n in a layer of k factors gets

        lr * (n_dense / n) / k,

    where n_dense is the fan-in of the dense layer. All factors of a layer together then change the output as much as
    the dense layer would at `lr`, at every rank, so one tuned dense rate serves all ranks and methods. Dense layers,
    norms, biases and layers in SVD form get `lr` itself. This assumes factors as they are initialised for training
    from scratch, which preserve the variance; the factors of a decomposed weight have other scales. For SGD, whose
    step grows with the gradient, use a single rate.

    Args:
        model: any module; a parameter that occurs several times is listed once.
        lr: the learning rate tuned for the dense model.
        weight_decay: weight decay of the weights; biases and norms get 0. None leaves it to the optimiser.
        decay_all: whether biases and norms decay like the weights.

    Returns:
        Dicts with "params", "lr", "multiplier" (the rate divided by `lr`) and, if it is given, "weight_decay", in the
        order of the model's parameters.

    Raises:
        RankfoldError: the rate or the decay is out of range.
        LayerError: a parameter is lazy and has no shape yet.

    Reference:
        Qiu, Potapczynski, Finzi, Goldblum, Wilson 2024, Compute better spent, section 3.

    Example:
        >>> import torch, rankfold
        >>> model = nn.Sequential(rankfold.layers.LowRankLinear(64, 10, rank=8), nn.ReLU(), nn.Linear(10, 2))
        >>> groups = parameter_groups(model, lr=1e-3, weight_decay=0.1)
        >>> [(group["multiplier"], group["weight_decay"], len(group["params"])) for group in groups]
        [(0.5, 0.1, 1), (4.0, 0.1, 1), (1.0, 0.0, 2), (1.0, 0.1, 1)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay or 0.0)):
        real(name, value)
    if decay_all and weight_decay is None:
        raise RankfoldError("decay_all=True says what weight_decay is used on: give weight_decay too")
    multipliers = _multipliers(model)
    groups: dict[tuple[float, float | None], dict[str, Any]] = {}
    for parameter, weighs in _parameters(model):
        multiplier = multipliers.get(id(parameter), 1.0)
        decay = weight_decay if weighs or decay_all or weight_decay is None else 0.0
        settings = {"lr": lr * multiplier, "multiplier": multiplier}
        if decay is not None:
            settings["weight_decay"] = decay
        group = groups.setdefault((multiplier, decay), {"params": [], **settings})
        group["params"].append(parameter)
    return list(groups.values())


def _multipliers(model: nn.Module) -> dict[int, float]:
    """Return the multiplier of every factor by the id of its parameter."""
    multipliers: dict[int, float] = {}
    for layer in filter(is_factorised, model.modules()):
        found = fan_ins(layer)
        for parameter, fan_in in found.factors:
            multipliers.setdefault(id(parameter), found.dense / fan_in / len(found.factors))
    return multipliers


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Yield every parameter once, in the order of `model.parameters()`, and whether it is subject to weight decay."""
    kept = {id(p) for module in model.modules() if isinstance(module, NORMS) for p in module.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise LayerError(f"parameter {name!r} is lazy and has no shape yet: call the model on a batch first")
        yield parameter, parameter.ndim > 1 and id(parameter) not in kept
