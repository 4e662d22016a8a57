"""Why a layer of a model may not be replaced: what only the whole model can tell."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from rankfold.errors import LayerError
from rankfold.layers import TiedHead, is_factorised, refusal
from rankfold.planning._ties import memory_of, owners_of
from rankfold.stats import walk


def structural_refusals(model: nn.Module) -> dict[str, str]:
    """Return name and reason of every layer whose place in the model forbids replacing it alone, whatever its values.

    Those of `tied_heads` are among them.
    """
    owners = owners_of(model)
    reasons = {}
    for name, layer in walk(model):
        ties = {key: owners[memory_of(p)] - {name} for key, p in layer.named_parameters(recurse=False)}
        if isinstance(layer, TiedHead):
            reasons[name] = "is the head of a factorised embedding: densify the model to plan it again"
        elif is_factorised(layer):
            reasons[name] = (
                f"is factorised already ({layer.method}, rank {layer.rank}): densify the model to plan it again"
            )
        elif any(ties.values()):
            reasons[name] = " and ".join(_tie(key, others) for key, others in ties.items() if others)
    return reasons


def _tie(key: str, others: Iterable[str]) -> str:
    return f"{key} is tied with {', '.join(map(repr, sorted(others)))}"


def without_values(layer: nn.Module) -> nn.Module:
    """Return a shallow copy of a layer with its parameters on the meta device."""
    twin = copy.copy(layer)
    twin._parameters = {
        key: p if p is None or is_lazy(p) else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for key, p in layer._parameters.items()
    }
    return twin


def layer_refusal(name: str, layer: nn.Module) -> str | None:
    """Return why a layer on its own may not be decomposed, or None.

    Raises:
        LayerError: a parameter holds NaN or Inf.
    """
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return "weight is on the meta device: it has no values to decompose"
    for key, parameter in layer.named_parameters(recurse=False):
        if not is_lazy(parameter) and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise LayerError(
                f"layer {name!r} ({type(layer).__name__}): its {key} holds NaN or Inf; "
                f"repair it, or leave the layer out with exclude=({name!r},)"
            )
    return refusal(layer)
