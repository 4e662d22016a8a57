"""Separate the packed projections of an attention into layers that a plan can name, and join them again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import nn

from rankfold.errors import LayerError
from rankfold.layers import PROJECTIONS, SeparateAttention
from rankfold.planning import selected
from rankfold.surgery._copies import copy_with


def separate_attention(
    model: nn.Module, *, include: str | Sequence[str] = (), exclude: str | Sequence[str] = ()
) -> nn.Module:
    """Return a new model that computes the same, with the projections of each `nn.MultiheadAttention` as layers.

    The attention "attention" becomes a `rankfold.layers.SeparateAttention` with the layers "attention.q_proj",
    "attention.k_proj", "attention.v_proj" and "attention.out_proj", which `measure`, `plan` and `compress` treat like
    any others. It takes the same arguments. The stock transformer layers no longer take their fused inference path,
    which reads the packed weight. A plan that names these layers can also be applied to the original model, which is
    also the skeleton for `load`; `densify` restores `nn.MultiheadAttention`.

    Args:
        model: any module; it is not changed.
        include: names or patterns (`*`, `?`) of the attentions to separate; all attentions if empty.
        exclude: names or patterns of attentions to leave as they are.

    Raises:
        PlanError: a name or pattern matches no `nn.MultiheadAttention`.
        LayerError: an attention is a subclass, has hooks, is parametrised, or shares a weight with another module.

    Example:
        >>> import torch, rankfold
        >>> model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        >>> separate = separate_attention(model)
        >>> list(rankfold.measure(separate, example=torch.ones(1, 5, 32)).layers)[:2]
        ['self_attn.q_proj', 'self_attn.k_proj']
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    chosen = (selected(found, include) if include else set(found)) - selected(found, exclude)
    return copy_with(model, _separated(model, chosen))


def with_named_projections(model: nn.Module, names: Collection[str]) -> nn.Module:
    """Return the model with each attention separated of which a projection is named; the model itself if none is.

    The new model shares the parameters of the old one, except those of the separated attentions.

    Raises:
        LayerError: an attention is a subclass, has hooks, is parametrised, or shares a weight with another module.
    """
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    chosen = {name for name in attentions if any(_joined(name, part) in names for part in PROJECTIONS)}
    return copy_with(model, _separated(model, chosen), shared=True) if chosen else model


def joined_attention(model: nn.Module) -> nn.Module:
    """Return the model with every separated attention that is dense joined again; the model itself if there is none.

    The new model shares the parameters of the old one, except those of the joined attentions.
    """
    separate = [module for module in model.modules() if isinstance(module, SeparateAttention) and module.is_dense]
    return copy_with(model, {id(module): module.to_dense() for module in separate}, shared=True) if separate else model


def _separated(model: nn.Module, names: Collection[str]) -> dict[int, nn.Module]:
    """Return what replaces the named attentions, by id."""
    owners = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(name)
    separated: dict[int, nn.Module] = {}
    for name in sorted(names):
        attention = model.get_submodule(name)
        shared = set().union(*(owners[id(p)] for p in attention.parameters())) - {name, _joined(name, "out_proj")}
        try:
            if shared:
                raise LayerError(f"a weight of it is shared with {sorted(shared)[0]!r}")
            separated[id(attention)] = SeparateAttention.from_dense(attention)
        except LayerError as error:
            raise LayerError(f"attention {name!r}: {error}; exclude it, to leave it as it is") from error
    return separated


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
