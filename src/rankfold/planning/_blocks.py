"""Blocks: several modules in a row that one layer replaces, named "first:last" in a plan."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from rankfold._common import near
from rankfold.errors import LayerError, PlanError
from rankfold.layers import BLOCKS, block_class, pointwise_twin, stock_twin
from rankfold.planning._amounts import Amounts
from rankfold.planning._choice import Choice
from rankfold.stats import Stats, count_bytes, count_params, walk


@dataclass(frozen=True, eq=False)
class SolvedBlock:
    """A layer that was found to replace a block of a model.

    Attributes:
        layer: a `rankfold.layers.FlexibleLinear`, or one over channels.
        error: relative error of the block's values with it, on data that it was not found from.
    """

    layer: nn.Module
    error: float


Blocks = Mapping[str, Sequence[SolvedBlock]]


def is_block(choice: Choice) -> bool:
    """Tell whether a choice is that of a whole block, whose name is "first:last"."""
    return any(choice.method == method for _, method in BLOCKS)


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


def check_apart(model: nn.Module, names: Iterable[str]) -> None:
    """Raise a `PlanError` where two blocks have a module in common, or where the model has no such block."""
    blocks = {name: block_modules(model, name) for name in names}
    for (one, modules), (other, others) in combinations(blocks.items(), 2):
        both = modules.keys() & others.keys()
        if both:
            raise PlanError(f"blocks {one!r} and {other!r} have {min(both)!r} in common: leave one of them out")


def block_choice(model: nn.Module, name: str, solved: SolvedBlock, stats: Stats | None = None) -> Choice:
    """Return the choice of a layer for a block, with all that is known of its cost.

    Raises:
        PlanError: the block is not there, or the layer is not of its kind and sizes.
    """
    layer: Any = solved.layer
    modules = block_modules(model, name)
    ends = [list(modules.values())[k] for k in (0, -1)]
    try:
        twins = [stock_twin(end) for end in ends]
        kind = block_class(twins[0], twins[1], getattr(layer, "method", ""))
        first, last = map(pointwise_twin, twins)
    except LayerError as problem:
        raise PlanError(f"block {name!r}: {problem}") from problem
    sizes = (first.in_features, last.out_features)
    found = (layer.down.weight.shape[1], layer.up.weight.shape[0]) if type(layer) is kind else ()
    if found != sizes:
        raise PlanError(f"block {name!r} takes a {kind.__name__} from {sizes[0]} to {sizes[1]}, not {layer}")
    before, macs = None, None
    if stats is not None:
        before = sum(stats.layers[key].macs for key, _ in walk(model) if key in modules)
        calls = stats.layers[next(iter(modules))].calls
        rows = sum(math.prod(call.input) for call in calls) // sizes[0]
        macs = kind.cost(*sizes, rows, rank=layer.rank, **layer.options).macs // stats.batch_size
    params, size = (sum(map(count, modules.values())) for count in (count_params, count_bytes))
    return Choice(
        layer.method,
        layer.rank,
        dict(layer.options),
        amounts=Amounts(count_params(layer), macs, count_bytes(layer)),
        dense=Amounts(params, before, size),
        error=solved.error,
    )


def solved_block(model: nn.Module, name: str, choice: Choice, blocks: Blocks) -> nn.Module:
    """Return a copy of the solved layer that a plan chose for a block.

    Raises:
        PlanError: there is none of the choice's rank and options.
    """
    for solved in blocks.get(name, ()):
        found = block_choice(model, name, solved)
        if (found.method, found.rank, found.options) == (choice.method, choice.rank, choice.options):
            return copy.deepcopy(solved.layer)
    raise PlanError(
        f"block {name!r}: a {choice.method} layer is found from data, which a plan does not hold: pass the blocks= "
        f"that the plan was made with (of rank {choice.rank}), call rankfold.train.decouple, or use init='random'"
    )


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def fresh_block(model: nn.Module, name: str, choice: Choice) -> nn.Module:
    """Return a layer for a block of the model, as the choice says, with fresh values on the block's device.

    Raises:
        PlanError: the block is not there, its ends are not linear layers or convolutions of kernel 1, or the options
            do not fit.
    """
    modules = list(block_modules(model, name).values())
    try:
        ends = [stock_twin(module) for module in (modules[0], modules[-1])]
        make: Any = block_class(ends[0], ends[1], choice.method)
        first, last = map(pointwise_twin, ends)
        where: dict[str, Any] = {"device": first.weight.device, "dtype": first.weight.dtype}
        options: dict[str, Any] = {"rank": choice.rank, **choice.options}
        layer: nn.Module = make(first.in_features, last.out_features, **where, **options)
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
    if BLOCKS.get((getattr(layer, "dense_type", nn.Module), choice.method)) is not type(layer):
        return f"a {type(layer).__name__} where it says {choice.method!r}"
    if layer.rank != choice.rank:
        return f"{choice.method!r} of rank {layer.rank} where it says rank {choice.rank}"
    options = {key: value for key, value in choice.options.items() if layer.options.get(key) != value}
    return f"options {dict(layer.options)} where it says {options}" if options else ""
