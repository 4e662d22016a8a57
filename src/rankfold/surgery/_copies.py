"""Copy a model with some of its modules replaced; the original is never changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

from rankfold.errors import LayerError
from rankfold.layers import SeparateAttention, is_factorised
from rankfold.surgery._huggingface import remember

# The fused inference path reads `linear1.weight`, which a factorised layer has to compute: correct but slow. It also
# reads the packed weight of an attention, which a separated one doesn't have. It is switched off if either is inside.
FUSED: Mapping[type[nn.Module], tuple[str, Any]] = MappingProxyType(
    {nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0), nn.TransformerEncoder: ("use_nested_tensor", False)}
)
FUSED_BEFORE = "_fused_before_factorising"


def copy_with(model: nn.Module, replacements: Mapping[int, nn.Module], *, shared: bool = False) -> nn.Module:
    """Return a deep copy in which the modules with the given ids are replaced, without copying those.

    If `shared`, the copy has the same parameters and buffers as the model: another structure for the same memory.

    Raises:
        LayerError: the model can't be copied, or its copy lacks a new module.
    """
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} if shared else {}
    try:
        copied = copy.deepcopy(model, kept | dict(replacements))
    except (RuntimeError, TypeError) as error:
        raise LayerError(
            f"the model can't be copied ({error}): remove what is not plain state, such as weight norm or a cached "
            "activation, and try again"
        ) from error
    present = {id(module) for module in copied.modules()}
    replaced = {name: replacements[id(module)] for name, module in model.named_modules() if id(module) in replacements}
    lost = [name for name, new in replaced.items() if id(new) not in present]
    if lost:
        raise LayerError(
            f"the copy of {type(model).__name__} lacks the new layer {lost[0]!r}: a __deepcopy__ of the model's own "
            "must pass its memo on to copy.deepcopy for every submodule"
        )
    for module in copied.modules():
        _switch_fused_path(module)
    remember(copied)
    return copied


def _switch_fused_path(module: nn.Module) -> None:
    """Switch the fused path of a stock transformer encoder off or on, as its layers require."""
    for kind, (flag, off) in FUSED.items():
        if isinstance(module, kind):
            if any(is_factorised(inner) or isinstance(inner, SeparateAttention) for inner in module.modules()):
                vars(module).setdefault(FUSED_BEFORE, getattr(module, flag))
                setattr(module, flag, off)
            elif FUSED_BEFORE in vars(module):
                setattr(module, flag, vars(module).pop(FUSED_BEFORE))
