"""How many values one output of each factor adds up: what learning rates of a factorised layer are scaled by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from rankfold.errors import LayerError
from rankfold.layers._dense import DenseType, dense_type_of, stock_type
from rankfold.layers._table import TABLE, is_factorised
from rankfold.layers.svd_form._svd_form import SVDForm
from rankfold.layers.tensor._structured import StructuredLinear
from rankfold.layers.tensor._tt_conv import TTConv
from rankfold.layers.tensor._tt_embedding import TTEmbedding
from rankfold.layers.tensor._tt_linear import TTLinear


@dataclass(frozen=True, eq=False)
class FanIns:
    """The fan-in of a dense layer, and of every factor (biases are none) of the layer that stands in for it.

    A layer in SVD form has none: its matrices are orthonormal, and not of the size that keeps the variance.
    """

    dense: int
    factors: tuple[tuple[nn.Parameter, int], ...]


def fan_ins(layer: nn.Module) -> FanIns:
    """Return each factor of a factorised layer with its fan-in: the values that one of its outputs adds up.

    Raises a `LayerError` for a layer that is not factorised.

    Example:
        >>> from rankfold.layers import CPConv2d
        >>> found = fan_ins(CPConv2d(64, 32, 3, rank=8))
        >>> found.dense, [fan_in for _, fan_in in found.factors]
        (576, [64, 9, 8])
    """
    if not is_factorised(layer):
        raise LayerError(f"{type(layer).__name__} is no factorised layer: only those have factors with a fan-in each")
    twin: Any = layer
    rules = (rule for kind, rule in _FACTORS.items() if isinstance(layer, kind))
    factors = next(rules, _of_itself if hasattr(layer, "fan_ins") else _of_stages)(twin)
    return FanIns(_dense_fan_in(stock_type(twin.dense_type), twin), tuple(factors))


Factors = Iterator[tuple[nn.Parameter, int]]


def _of_stages(layer: Any) -> Factors:
    """Yield the weights of a chain of stock layers; an output of a look-up is one value."""
    within = {id(parameter) for stage in layer.children() for parameter in stage.parameters()}
    lost = [name for name, parameter in layer.named_parameters() if id(parameter) not in within and name != "bias"]
    stages = [stage for stage in layer.children() if dense_type_of(stage, subclasses=True) is None]
    if lost or stages:
        unknown = lost[0] if lost else type(stages[0]).__name__
        raise LayerError(
            f"the fan-in of {unknown} in a {type(layer).__name__} is not known: give the class a method fan_ins() that "
            "returns each factor with the number of values that one of its outputs adds up"
        )
    for stage in layer.children():
        yield stage.weight, _dense_fan_in(dense_type_of(stage, subclasses=True), stage)


def _of_itself(layer: Any) -> Factors:
    """Yield what a layer says of its own factors."""
    yield from layer.fan_ins()


def _dense_fan_in(row: DenseType | None, layer: nn.Module) -> int:
    if row is None or row.fan_in is None:
        raise LayerError(f"{type(layer).__name__} is no layer whose fan-in is known")
    return row.fan_in(layer)


def _of_train(layer: Any) -> Factors:
    """Yield the cores (r, out, in, r'), which add up inputs and the bond to the right, as they are initialised."""
    for core in layer.cores:
        yield core, core.shape[2] * core.shape[3]


def _of_train_conv(layer: Any) -> Factors:
    """Yield the cores of a train whose first one holds the positions of the kernel, which are added up too."""
    (first, taps), *others = _of_train(layer)
    yield first, taps * first.shape[1]
    yield from others


def _of_table(layer: Any) -> Factors:
    """Yield the cores of a table: a look-up takes one slice of each, and adds up its bond alone."""
    for core in layer.cores:
        yield core, core.shape[3]


def _of_structured(layer: Any) -> Factors:
    """Yield the cores of a layer that knows their fan-ins, asked of a twin with shapes alone: cores may be sharded."""
    kind: Any = next(kind for kind in TABLE.values() if isinstance(layer, kind))
    twin = kind(layer.in_features, layer.out_features, False, "meta", rank=layer.rank, **layer.options)
    for core, (_, fan_in) in zip(layer.cores, twin.fan_ins(), strict=True):
        yield core, fan_in


def _of_svd_form(layer: Any) -> Factors:  # noqa: ARG001
    """Yield nothing."""
    yield from ()


_FACTORS: Mapping[type[nn.Module], Callable[[Any], Factors]] = MappingProxyType(
    {
        TTLinear: _of_train,
        TTEmbedding: _of_table,
        TTConv: _of_train_conv,
        StructuredLinear: _of_structured,
        SVDForm: _of_svd_form,
    }
)
