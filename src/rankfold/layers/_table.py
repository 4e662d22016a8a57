"""The table (type of dense layer, method) -> factorised layer, and what is asked of any layer through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from rankfold.errors import LayerError
from rankfold.layers._contract import Call, Cost, FactorisedLayer
from rankfold.layers._dense import dense_type_of
from rankfold.layers._embedding import LowRankEmbedding
from rankfold.layers._linear import LowRankLinear
from rankfold.layers._refusal import is_quantised
from rankfold.layers.conv._conv_cp import CPConv1d, CPConv2d, CPConv3d
from rankfold.layers.conv._conv_svd import LowRankConv1d, LowRankConv2d, LowRankConv3d
from rankfold.layers.conv._conv_tucker import TuckerConv1d, TuckerConv2d, TuckerConv3d
from rankfold.layers.flexible._flexible import FlexibleLayer, FlexibleLinear
from rankfold.layers.flexible._flexible_conv import FlexibleConv1d, FlexibleConv2d, FlexibleConv3d, pointwise_twin
from rankfold.layers.svd_form._svd_form import SVDLinear
from rankfold.layers.svd_form._svd_form_conv import SVDConv1d, SVDConv2d, SVDConv3d
from rankfold.layers.tensor._btt import BTTLinear
from rankfold.layers.tensor._kronecker import KroneckerLinear
from rankfold.layers.tensor._ring import TRLinear
from rankfold.layers.tensor._tt_conv import TTConv1d, TTConv2d, TTConv3d
from rankfold.layers.tensor._tt_embedding import TTEmbedding
from rankfold.layers.tensor._tt_linear import TTLinear

_CLASSES: tuple[Any, ...] = (  # each takes options of its own, where the contract leaves them open
    LowRankLinear,
    LowRankEmbedding,
    *(LowRankConv1d, LowRankConv2d, LowRankConv3d),
    *(CPConv1d, CPConv2d, CPConv3d),
    *(TuckerConv1d, TuckerConv2d, TuckerConv3d),
    *(TTLinear, TTEmbedding, TTConv1d, TTConv2d, TTConv3d),
    *(BTTLinear, KroneckerLinear, TRLinear),
    *(SVDLinear, SVDConv1d, SVDConv2d, SVDConv3d),
)
ENTRIES: dict[tuple[type[nn.Module], str], type[FactorisedLayer]] = {
    (layer.dense_type, layer.method): layer for layer in _CLASSES
}
"""What `TABLE` shows. `register` alone adds to it."""
TABLE: Mapping[tuple[type[nn.Module], str], type[FactorisedLayer]] = MappingProxyType(ENTRIES)
"""(Type of dense layer, method) -> factorised layer, those of the user's own among them."""
_FLEXIBLE: tuple[type[FlexibleLayer], ...] = (FlexibleLinear, FlexibleConv1d, FlexibleConv2d, FlexibleConv3d)
BLOCKS: Mapping[tuple[type[nn.Module], str], type[FlexibleLayer]] = MappingProxyType(
    {(layer.dense_type, layer.method): layer for layer in _FLEXIBLE}
)
"""(Type of dense layer, method) -> layer that stands for several of these in a row, and not for one."""


def _stock_type(layer: nn.Module) -> type[nn.Module]:
    row = dense_type_of(layer)
    return type(layer) if row is None or row.twin is None else row.twin


def methods_for(layer: nn.Module) -> tuple[str, ...]:
    """Return the methods that know this type of layer; a class's `variants` says whether one pays for this layer.

    Example:
        >>> methods_for(nn.ReLU())
        ()
        >>> methods_for(nn.Conv2d(8, 8, 3))[:3]
        ('svd', 'cp', 'tucker')
    """
    kind = _stock_type(layer)
    return tuple(method for dense_type, method in TABLE if dense_type is kind)


def layer_class(layer: nn.Module, method: str) -> type[FactorisedLayer]:
    """Return the class that factorises this type of layer by this method, or raise a `LayerError`.

    Example:
        >>> layer_class(nn.Linear(2, 2), "svd").__name__
        'LowRankLinear'
    """
    found = TABLE.get((_stock_type(layer), method))
    if found is None:
        known = methods_for(layer)
        advice = f"its methods are {', '.join(known)}" if known else "no method factorises this type of layer"
        own = "a class of your own that does it must be registered with rankfold.layers.register first"
        raise LayerError(f"method {method!r} does not fit {type(layer).__name__}: {advice}; {own}")
    return found


def tied_methods() -> tuple[str, ...]:
    """Return the methods whose two stages of an `nn.Embedding` serve the linear layer that has its very weight, too.

    Example:
        >>> tied_methods()
        ('svd',)
    """
    tables = ((method, cls.stages) for (kind, method), cls in TABLE.items() if kind is nn.Embedding)
    return tuple(method for method, stages in tables if stages is not None and stages.plain)


def block_class(first: nn.Module, last: nn.Module, method: str) -> type[FlexibleLayer]:
    """Return the class of the layer that may stand for a block by its first and last layer, or raise a `LayerError`.

    Example:
        >>> block_class(nn.Linear(8, 4), nn.Linear(4, 2), "flexible").__name__
        'FlexibleLinear'
    """
    for end in (first, last):
        pointwise_twin(end)
    found = BLOCKS.get((type(first), method))
    if found is None or type(first) is not type(last):
        raise LayerError(f"no layer stands for all from a {type(first).__name__} to a {type(last).__name__}")
    return found


def is_factorised(module: nn.Module) -> bool:
    """Tell whether a module is one of the factorised layers, its factors as they were built: not quantised, say.

    A layer of a user's class is one from the time that the class is registered.

    Example:
        >>> is_factorised(LowRankLinear(4, 4, rank=1)), is_factorised(nn.Linear(4, 4))
        (True, False)
    """
    kind: Any = _own_type(module)
    method, dense_type = getattr(kind, "method", None), getattr(kind, "dense_type", None)
    if not isinstance(method, str) or not isinstance(dense_type, type) or TABLE.get((dense_type, method)) is not kind:
        return False
    return not any(map(is_quantised, module.children()))


def _own_type(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, or the one that it had before `torch.distributed.fsdp.fully_shard` made it FSDP."""
    kind, *bases = type(module).__mro__
    sharded = bases[0].__qualname__ == "FSDPModule" and bases[0].__module__.startswith("torch.distributed")
    return bases[1] if sharded else kind


def dense_cost(layer: nn.Module, calls: Sequence[Call]) -> Cost:
    """Return the parameters of a dense layer (bias included) and its multiply-adds over the calls.

    A look-up costs no multiply-add. Raises a `LayerError` for a module whose cost is not known by its shape.

    Example:
        >>> dense_cost(nn.Conv2d(3, 8, 3), [Call((2, 3, 10, 10), (2, 8, 8, 8))])
        Cost(params=224, macs=27648)
    """
    params = sum(parameter.numel() for parameter in layer.parameters())
    row = dense_type_of(layer, subclasses=True)
    if row is None or row.macs is None:
        raise LayerError(f"the cost of {type(layer).__name__} does not follow from its shape alone")
    return Cost(params, sum(row.macs(layer, call) for call in calls))
