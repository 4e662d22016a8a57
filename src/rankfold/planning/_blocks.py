"""Blocks: several modules in a row that one layer stands for, named "first:last" in a plan."""

from __future__ import annotations

from typing import Any

from torch import nn

from rankfold.errors import LayerError, PlanError
from rankfold.layers import BLOCKS, stock_twin
from rankfold.planning._names import near
from rankfold.planning._plan import Choice


def is_block(choice: Choice) -> bool:
    """Tell whether a choice stands for a whole block, its name then being "first:last"."""
    return choice.method in BLOCKS


def block_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules of a block "first:last" by name: the two and every module without children between them.

    The order is that of `named_modules`. The first one counts as a whole, whatever it is made of, so that the block
    is found again once one layer has taken its place.

    Raises:
        PlanError: the name has another form, a module is missing, the last comes before the first, or a module of
            the block is used elsewhere under another name.
    """
    first, colon, last = name.partition(":")
    named = dict(model.named_modules(remove_duplicate=False))
    if not colon or not first or not last or first == last:
        raise PlanError(f"a block is named 'first:last' after its first and its last module, not {name!r}")
    for end in (first, last):
        if end not in named:
            raise PlanError(f"block {name!r}: the model has no module {end!r}{near(end, named)}")
    names = list(named)
    if names.index(last) < names.index(first):
        raise PlanError(f"block {name!r}: {last!r} comes before {first!r} in the model; exchange them")
    between = names[names.index(first) + 1 : names.index(last)]
    inner = [key for key in between if not key.startswith(f"{first}.") and not _has_children(named[key])]
    block = {key: named[key] for key in (first, *inner, last)}
    members = {id(module) for module in block.values()}
    shared = [key for key, module in named.items() if id(module) in members and key not in block]
    if shared:
        raise PlanError(f"block {name!r}: one of its modules is {shared[0]!r} too, and cannot be replaced in one place")
    return block


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def fresh_block(model: nn.Module, name: str, choice: Choice) -> nn.Module:
    """Return a layer for a block of the model, as the choice says, with fresh values on the block's device.

    Raises:
        PlanError: the block is not there, does not begin and end with a linear layer, or the options do not fit.
    """
    modules = list(block_modules(model, name).values())
    try:
        ends: list[Any] = [stock_twin(module) for module in (modules[0], modules[-1])]
        if not all(isinstance(end, nn.Linear) for end in ends):
            raise LayerError("its ends are not linear layers")
        where: dict[str, Any] = {"device": ends[0].weight.device, "dtype": ends[0].weight.dtype}
        options: dict[str, Any] = {"rank": choice.rank, **choice.options}
        layer: nn.Module = BLOCKS[choice.method](ends[0].in_features, ends[-1].out_features, **where, **options)
    except (LayerError, TypeError) as problem:
        raise PlanError(f"block {name!r} and the plan: {problem}") from problem
    return layer


def stand_ins(model: nn.Module, name: str, layer: nn.Module) -> dict[int, nn.Module]:
    """Return what takes the place of each module of a block, by id: the layer for the first, identities behind it."""
    first, *rest = block_modules(model, name).values()
    replaced: dict[int, nn.Module] = {id(module): nn.Identity().train(module.training) for module in rest}
    return {id(first): layer.train(first.training), **replaced}


def block_difference(modules: dict[str, nn.Module], name: str, choice: Choice) -> str:
    """Return how the layer in a block's place differs from the choice; "" where it does not."""
    layer: Any = modules.get(name.partition(":")[0])
    if type(layer) is not BLOCKS[choice.method]:
        return f"a {type(layer).__name__} where it says {choice.method!r}"
    if layer.rank != choice.rank:
        return f"{choice.method!r} of rank {layer.rank} where it says rank {choice.rank}"
    options = {key: value for key, value in choice.options.items() if layer.options.get(key) != value}
    return f"options {dict(layer.options)} where it says {options}" if options else ""
