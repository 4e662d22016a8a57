"""Which modules are layers that a plan must name, and why some of them may not be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from rankfold.errors import LayerError
from rankfold.layers._dense import DENSE_TYPES, dense_type_of, qualified_name, stock_names

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_quantised(module: nn.Module) -> bool:
    """Tell the quantised twins of torch: some derive from no stock layer."""
    path, name = type(module).__module__, type(module).__name__
    ours = path.startswith(("torch.ao.nn.", "torch.nn.quantized.")) and "PackedParams" not in name
    return ours and any(row.name in name for row in DENSE_TYPES if row.twin is None)


def factorisable(module: nn.Module) -> bool:
    """Tell whether a plan must name this module: a kind of layer with a weight to factorise, usable or not.

    Example:
        >>> [factorisable(m) for m in (nn.Linear(2, 2), nn.ConvTranspose1d(2, 2, 2), nn.ReLU())]
        [True, True, False]
    """
    return dense_type_of(module, subclasses=True) is not None or is_quantised(module)


def stock_twin(module: nn.Module) -> nn.Module:
    """Return the stock layer that computes what `module` does: itself, or an `nn.Linear` for Hugging Face's Conv1D.

    The `nn.Linear` has a weight of its own. Raises a `LayerError` for anything that has no such twin.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> stock_twin(layer) is layer
        True
    """
    row = dense_type_of(module)
    if row is not None and row.stock:
        return module
    if row is None or row.twin is None:
        raise LayerError(f"{qualified_name(module)} has no stock twin; the stock layers are {stock_names()}")
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor = module.bias  # type: ignore[assignment]
    into, out = weight.shape
    twin = nn.Linear(into, out, device="meta", dtype=weight.dtype)
    for name, source in {"weight": weight.T, "bias": bias}.items():
        values = source.detach().clone(memory_format=torch.contiguous_format)
        setattr(twin, name, nn.Parameter(values, requires_grad=source.requires_grad))
    return twin.train(module.training)


def untwinned(twin: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return the layer of the class `kind` whose stock twin is `twin`: itself, or Hugging Face's Conv1D; no copies."""
    if not isinstance(twin, nn.Linear) or issubclass(kind, nn.Linear):
        return twin
    make: Any = kind
    with torch.device("meta"):
        layer: nn.Module = make(twin.out_features, twin.in_features)
    layer.weight = nn.Parameter(twin.weight.detach().T.contiguous(), requires_grad=twin.weight.requires_grad)
    layer.bias = twin.bias
    return layer.train(twin.training)


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the hooks of a module of its own: functions that see it, or its output, before or after a call."""
    return tuple(hook for name in HOOKS for hook in getattr(module, name).values())


def refusal(layer: nn.Module) -> str | None:
    """Return why a layer may not be replaced by a factorised one, or None where it may.

    Replacing is refused wherever it would change what the layer computes or what its owner reads, and
    where the weight cannot be decomposed.

    Example:
        >>> refusal(nn.Linear(2, 2)) is None
        True
        >>> refusal(nn.Conv1d(2, 2, 2, dtype=torch.complex64))
        'its weight is torch.complex64, and only real floating-point weights are decomposed'
    """
    return next((reason for check in CHECKS if (reason := check(layer)) is not None), None)


def _quantised(layer: nn.Module) -> str | None:
    return f"it is quantised ({qualified_name(layer)}): factorise before quantising" if is_quantised(layer) else None


def _lazy(layer: nn.Module) -> str | None:
    waiting = isinstance(layer, LazyModuleMixin) or any(is_lazy(p) for p in layer.parameters(recurse=False))
    return "it is lazy, and has no weight before its first call: call the model once" if waiting else None


def _parametrised(layer: nn.Module) -> str | None:
    if not parametrize.is_parametrized(layer):
        return None
    names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
    return f"its {names} is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"


def _unsupported(layer: nn.Module) -> str | None:
    row = dense_type_of(layer, subclasses=True)
    return row.refused or None if row is not None else None


def _not_stock(layer: nn.Module) -> str | None:
    if dense_type_of(layer) is not None:
        return None
    base = dense_type_of(layer, subclasses=True)
    if base is None:
        return f"{qualified_name(layer)} is no layer that is factorised"
    return f"{qualified_name(layer)} is a subclass of nn.{base.name}, and may compute or read something else"


def _hooked(layer: nn.Module) -> str | None:
    hooks = hooks_of(layer)
    if hooks:
        names = ", ".join(sorted({getattr(hook, "__name__", type(hook).__name__) for hook in hooks}))
        return f"it has hooks, which see the layer itself ({names}): remove them first"
    return "its forward was overwritten on the instance" if "forward" in vars(layer) else None


def _unfit_weight(layer: nn.Module) -> str | None:
    weight: Any = layer.weight
    if type(weight) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(weight).__name__}, not a plain parameter"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}, not a plain tensor"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}, and only real floating-point weights are decomposed"
    return None if weight.numel() else "its weight is empty"


def _rescales_rows(layer: nn.Module) -> str | None:
    norm = getattr(layer, "max_norm", None)
    return None if norm is None else f"max_norm={norm} rescales rows of its table at each look-up"


def _unfit_values(layer: nn.Module) -> str | None:
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if weight.is_meta:
        return None
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        return f"{bad} of the {weight.numel()} entries of its weight are NaN or Inf: repair or retrain it"
    return None if bool(weight.any()) else "its weight is zero everywhere"


CHECKS: tuple[Callable[[nn.Module], str | None], ...] = (
    _quantised,
    _lazy,
    _parametrised,
    _unsupported,
    _not_stock,
    _hooked,
    _unfit_weight,
    _rescales_rows,
    _unfit_values,
)
