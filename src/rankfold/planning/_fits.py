"""Whether a plan fits a model: every layer that it names, and what it makes of each."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from rankfold._common import near
from rankfold.errors import PlanError
from rankfold.layers import FactorisedLayer, refusal, tied_methods
from rankfold.planning._blocks import is_block
from rankfold.planning._choice import Choice
from rankfold.planning._layer import fitting
from rankfold.planning._refusals import structural_refusals, without_values
from rankfold.planning._rules import Init
from rankfold.planning._ties import tied_heads
from rankfold.stats import walk

Fit = tuple[nn.Module, type[FactorisedLayer]]


def fits(model: nn.Module, choices: Mapping[str, Choice], init: Init) -> dict[str, Fit]:
    """Return, for every layer that the choices replace, its stock twin and the class that replaces it.

    Raises:
        PlanError: a layer that the model doesn't have, that can't be replaced, or that the choice doesn't fit.
    """
    layers, heads = dict(walk(model)), tied_heads(model)
    refused = _refused(model, layers, heads, init)
    found = {}
    for name, choice in choices.items():
        if is_block(choice):
            continue
        if name not in layers:
            raise PlanError(f"the plan names a layer {name!r} that the model doesn't have{near(name, layers)}")
        if choice.method == "dense":
            continue
        layer, head = layers[name], heads.get(name)
        reason = refused.get(name) or _unfit(layer, init)
        if reason:
            raise PlanError(f"layer {name!r} ({type(layer).__name__}) can't be replaced: {reason}")
        if head is not None and choice.method not in tied_methods():
            known = " or ".join(tied_methods())
            raise PlanError(f"layer {name!r} is tied with {head!r}: {known} can replace both, {choice.method!r} can't")
        found[name] = fitting(name, layer, choice)
    return found


def _refused(model: nn.Module, layers: Mapping[str, nn.Module], heads: Mapping[str, str], init: Init) -> dict[str, str]:
    """Return why some layers can't be replaced; an embedding and its tied head can only be replaced together."""
    refused = structural_refusals(model)
    for embedding, head in heads.items():
        unfit = _unfit(layers[head], init)
        refused[head] = f"weight is tied with {embedding!r}, whose choice stands for both: leave this one dense"
        if unfit:
            refused[embedding] = f"weight is tied with {head!r}, and there {unfit}"
        else:
            del refused[embedding]
    return refused


def _unfit(layer: nn.Module, init: Init) -> str | None:
    """Return why a layer on its own can't be replaced; its values don't matter for a random initialisation."""
    if init == "random":
        return refusal(without_values(layer))
    if any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return "its weight is on the meta device and has no values: use init='random'"
    return refusal(layer)
