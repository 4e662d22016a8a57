"""Layers of the user's own: a class that satisfies the contract becomes a method like those that are built in."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from rankfold.errors import LayerError
from rankfold.layers._contract import FactorisedLayer, Stages
from rankfold.layers._dense import stock_names, stock_type
from rankfold.layers._table import BLOCKS, ENTRIES

C = TypeVar("C", bound=type)
SETTINGS = {
    "method": "the name of the method, a str",
    "dense_type": "the type of layer that it factorises, such as nn.Linear",
    "stages": "a rankfold.layers.Stages, or None",
}
RESERVED = ("dense", *dict.fromkeys(method for _, method in BLOCKS))


def register(layer: C) -> C:
    """Make a method of a class that satisfies the contract, and return the class: `register` is a decorator, too.

    From then on its `method` is known to `plan`, `compress`, `apply`, `save`, `load`, `densify`, latency timing,
    recalibration and the command line, for layers of its `dense_type`. It is known until the process ends, and to this
    process alone: one that loads a file, or works for an `executor`, registers the class as well, which comes by itself
    where the class is decorated in a module that it imports. Registering a class twice is fine, and so is defining it
    again under the same name in the same module, as a notebook does.

    What it must have is written down in `rankfold.layers.FactorisedLayer`; whether it keeps its word is what
    `rankfold.testing.check_layer` tries. A method `fan_ins()` that returns each factor with the number of values that
    one of its outputs adds up is asked by `rankfold.train.parameter_groups`, unless the factors are stock layers.

    Args:
        layer: an `nn.Module` class. Its constructor takes `rank` as a keyword, and beside it, as keywords too, the
            options that a plan may name.

    Raises:
        LayerError: something of the contract is missing, or takes other arguments; a `dense_type` that is not in
            `rankfold.layers.DENSE_TYPES`; a method of this name exists for this type of layer, by another class.

    Example:
        >>> register(nn.ReLU)
        Traceback (most recent call last):
        ...
        rankfold.errors.LayerError: ReLU can't be registered: it lacks method (the name of the method, a str)...
    """
    _check_members(layer)
    _check_settings(layer)
    _check_arguments(layer)
    key = (layer.dense_type, layer.method)  # type: ignore[attr-defined]
    known = ENTRIES.get(key)
    if known is not None and _path(known) != _path(layer):
        raise LayerError(
            f"{layer.__name__} can't be registered: method {key[1]!r} of nn.{key[0].__name__} is {_path(known)} "
            "already: give your method another name"
        )
    ENTRIES[key] = layer
    return layer


@contextmanager
def registered(*layers: type) -> Iterator[None]:
    """Register classes for the length of a `with` block, as tests do that must leave no trace.

    Raises:
        LayerError: as `register` does.
    """
    before = dict(ENTRIES)
    try:
        for layer in layers:
            register(layer)
        yield
    finally:
        ENTRIES.clear()
        ENTRIES.update(before)


def _path(layer: type) -> str:
    return f"{layer.__module__}.{layer.__qualname__}"


def _refuse(layer: Any, reason: str) -> None:
    name = getattr(layer, "__name__", repr(layer))
    raise LayerError(f"{name} can't be registered: {reason}; the contract is rankfold.layers.FactorisedLayer")


def _check_members(layer: Any) -> None:
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        _refuse(layer, "it is no class of nn.Module")
    declared = {name for kind in layer.__mro__ for name in vars(kind).get("__annotations__", ())}
    missing = [f"{name} ({meaning})" for name, meaning in SETTINGS.items() if not hasattr(layer, name)]
    members = [name for name in vars(FactorisedLayer) if not name.startswith("_")]
    missing += [name for name in members if not hasattr(layer, name) and name not in declared]
    if layer.forward is nn.Module.forward:
        missing.append("forward")
    if missing:
        _refuse(layer, f"it lacks {', '.join(missing)}")


def _check_settings(layer: Any) -> None:
    method, kind, stages = layer.method, layer.dense_type, layer.stages
    if not isinstance(method, str) or not method.isidentifier():
        _refuse(layer, f"method={method!r} is no name of letters, digits and underscores")
    if method in RESERVED:
        _refuse(layer, f"method {method!r} is taken: give your method another name")
    if stock_type(kind) is None:
        _refuse(layer, f"dense_type={_shown(kind)} is none of the types that can be factorised: {stock_names()}")
    if stages is not None and not isinstance(stages, Stages):
        _refuse(layer, f"stages={stages!r} is neither a rankfold.layers.Stages nor None")


def _shown(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else repr(kind)


def _check_arguments(layer: Any) -> None:
    """Refuse a constructor without `rank`, and class methods that can't be called as those of the contract are."""
    rank = inspect.signature(layer).parameters.get("rank")
    if rank is None or rank.kind is not rank.KEYWORD_ONLY:
        _refuse(layer, "its constructor must take rank, and its options after it, as keywords alone (after a *)")
    for name, member in vars(FactorisedLayer).items():
        if not isinstance(member, classmethod):
            continue
        if not isinstance(inspect.getattr_static(layer, name), classmethod | staticmethod):
            _refuse(layer, f"{name} is no classmethod")
        wanted = inspect.signature(getattr(FactorisedLayer, name)).parameters.values()
        keywords = {p.name: None for p in wanted if p.kind is p.KEYWORD_ONLY}
        values = [None for p in wanted if p.kind is p.POSITIONAL_OR_KEYWORD]
        try:
            inspect.signature(getattr(layer, name)).bind(*values, **keywords)
        except TypeError as problem:
            _refuse(layer, f"{name}{inspect.signature(getattr(FactorisedLayer, name))} can't be called so ({problem})")
