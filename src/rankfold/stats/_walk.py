"""Find the modules that a plan must name, and run a model without leaving a trace."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold._common import device_of, evaluating
from rankfold.layers import TiedHead, factorisable, is_factorised


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and module of every layer that a plan must name, in the order of `named_modules`.

    A module registered under several names is yielded once, under its first name. The modules inside a factorised layer
    or an `nn.MultiheadAttention` belong to that layer and are not visited, nor are those inside a `TiedHead`, which
    belong to its embedding.
    """
    yield from _walk("", model, set())


def _walk(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    found = is_factorised(module) or factorisable(module) or isinstance(module, TiedHead)
    if found:
        yield name, module
    if found and not _has_layers_of_its_own(module):
        return
    for key, child in module.named_children():
        yield from _walk(f"{name}.{key}" if name else key, child, seen)


def _has_layers_of_its_own(module: nn.Module) -> bool:
    """Tell whether a user's subclass of a stock layer has further layers inside, such as an adapter."""
    return not (is_factorised(module) or isinstance(module, nn.MultiheadAttention | TiedHead))


def count_params(module: nn.Module) -> int:
    """Return the number of parameters of a module; shared ones count once, uninitialised ones not at all."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def count_bytes(module: nn.Module) -> int:
    """Return the size of a module's saved state in bytes: parameters and persistent buffers, shared ones once."""
    kept = (
        (key, value)
        for part in module.modules()
        for key, value in (*part._parameters.items(), *part._buffers.items())
        if key not in part._non_persistent_buffers_set
    )
    found = [value for _, value in kept if isinstance(value, Tensor) and not is_lazy(value)]
    tensors = {tensor.data_ptr() or id(tensor): tensor for tensor in found}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; restore flags, buffers and random state afterwards."""
    buffers = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    device = device_of(model)
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        with evaluating(model), torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            # The fused path of the transformer layers reads weights without calling their layers.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer.copy_(before)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules in eager mode, so that hooks see every layer and nothing is compiled."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        # about the counter's hooks, which do no harm in eager mode
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield
