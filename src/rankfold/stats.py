"""Measure a model on one batch: which layers are called, on which shapes, and what each costs."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from rankfold._batches import Arguments, batch_arguments, device_of, example_arguments, to_device
from rankfold._modes import evaluating
from rankfold.errors import DataError, LayerError, PlanError
from rankfold.layers import Call, TiedHead, dense_cost, factorisable, is_factorised


@dataclass(frozen=True)
class LayerStats:
    """What one layer is and what was seen of it.

    Attributes:
        kind: name of the layer's type.
        params: number of its parameters, bias included.
        macs: multiply-adds of all its calls in the batch, divided by the batch size.
        calls: the shapes of every call, in order; empty where the layer was not called as a module.
    """

    kind: str
    params: int
    macs: int
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class Stats:
    """What `measure` saw of a model.

    Attributes:
        layers: per name, every layer that a plan must name: factorisable ones and factorised ones.
        params: number of parameters of the whole model, shared ones once, buffers not counted.
        macs: multiply-adds of the whole model on the batch, divided by the batch size.
        batch_size: first dimension of the first tensor of the input.
    """

    layers: Mapping[str, LayerStats]
    params: int
    macs: int
    batch_size: int

    def to_json(self) -> str:
        """Return the statistics as JSON text."""
        layers = {
            name: {
                "kind": layer.kind,
                "params": layer.params,
                "macs": layer.macs,
                "calls": [[list(call.input), list(call.output)] for call in layer.calls],
            }
            for name, layer in self.layers.items()
        }
        whole = {"params": self.params, "macs": self.macs, "batch_size": self.batch_size}
        return json.dumps({"rankfold_stats": 1, **whole, "layers": layers})

    @classmethod
    def from_json(cls, text: str) -> Stats:
        """Read the statistics that `to_json` wrote.

        Raises:
            PlanError: the text is not what `to_json` writes.
        """
        try:
            data = json.loads(text)
            if data["rankfold_stats"] != 1:
                raise PlanError(f"statistics of version {data['rankfold_stats']!r} cannot be read: measure again")
            layers = {name: _read_layer(layer) for name, layer in data["layers"].items()}
            return cls(layers, int(data["params"]), int(data["macs"]), int(data["batch_size"]))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"not the JSON form of measured statistics ({error!r}): measure again") from error


def _read_layer(data: Mapping[str, Any]) -> LayerStats:
    calls = tuple(Call(tuple(map(int, shape_in)), tuple(map(int, shape_out))) for shape_in, shape_out in data["calls"])
    return LayerStats(str(data["kind"]), int(data["params"]), int(data["macs"]), calls)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every layer that a plan must name, in the order of `named_modules`.

    A module that is registered under several names is yielded once, under its first name. The inside of
    a factorised layer and of an `nn.MultiheadAttention` belongs to that layer and is not visited; that of a
    `TiedHead` belongs to its embedding.
    """
    yield from _walk("", model, set())


def _walk(name: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen or isinstance(module, TiedHead):
        return
    seen.add(id(module))
    found = is_factorised(module) or factorisable(module)
    if found:
        yield name, module
    if found and not _has_layers_of_its_own(module):
        return
    for key, child in module.named_children():
        yield from _walk(f"{name}.{key}" if name else key, child, seen)


def _has_layers_of_its_own(module: nn.Module) -> bool:
    """Tell whether a user's subclass of a stock layer carries further layers (an adapter, say)."""
    return not (is_factorised(module) or isinstance(module, nn.MultiheadAttention))


def measure(model: nn.Module, loader: Iterable[Any] | None = None, *, example: Any = None) -> Stats:
    """Run a model once on one batch and return what was called and what it costs.

    The model runs in eval mode without gradients. Its training flags, its buffers and torch's random
    state are left as they were. MACs are counted over the whole batch and divided by the batch size
    (the first dimension of the first tensor of the input). The MACs of the model are the larger of
    what `torch.utils.flop_counter` sees and the sum over its layers.

    Args:
        model: any module.
        loader: an iterable of batches, of which the first is used: tensors, tuples with the inputs first,
            or mappings of keyword arguments.
        example: instead of a loader, the arguments of one call: a tensor, a tuple or a mapping.

    Raises:
        DataError: neither or both of loader and example are given, or the loader is empty.
        LayerError: a lazy layer has not seen its first input yet.

    Example:
        >>> import torch, rankfold
        >>> stats = rankfold.measure(torch.nn.Linear(8, 4), example=torch.ones(2, 8))
        >>> stats.params, stats.macs, stats.batch_size
        (36, 32, 2)
    """
    if (loader is None) == (example is None):
        raise DataError("give either a loader or example=, and not both")
    _refuse_lazy(model)
    layers = dict(walk(model))
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    counter = FlopCounterMode(display=False)
    with _left_alone(model):
        args, kwargs = to_device(_arguments(loader, example), device_of(model))
        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(_recorder(calls[name]), with_kwargs=True).remove)
            stack.enter_context(_uncompiled())
            stack.enter_context(counter)
            model(*args, **kwargs)
        batch_size = _batch_size((args, kwargs))
        # Still in eval mode: in train mode a spectral norm takes a step whenever the weight is read.
        measured = {name: _layer_stats(layer, tuple(calls[name]), batch_size) for name, layer in layers.items()}
    macs = max(counter.get_total_flops() // 2 // batch_size, sum(layer.macs for layer in measured.values()))
    return Stats(measured, count_params(model), macs, batch_size)


def count_params(module: nn.Module) -> int:
    """Return the number of parameters of a module: shared ones once, uninitialised ones as none."""
    return sum(parameter.numel() for parameter in module.parameters() if not is_lazy(parameter))


def _refuse_lazy(model: nn.Module) -> None:
    lazy = next((name for name, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise LayerError(
            f"parameter {lazy!r} of a lazy layer has no shape yet and measuring would initialise it: "
            "call the model on a batch first"
        )


def _arguments(loader: Iterable[Any] | None, example: Any) -> Arguments:
    if loader is None:
        return example_arguments(example)
    for batch in loader:
        return batch_arguments(batch)
    raise DataError("the loader is empty: it must yield at least one batch")


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; give back flags, buffers and random state as they were."""
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
            # The fused path of the transformer layers reads weights without calling the layers that hold them.
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        with torch.no_grad():
            for module, key, buffer, before in buffers:
                module._buffers[key] = buffer.copy_(before)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Call what `torch.compile` returned as it was before: hooks see every layer, and nothing is compiled."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        # about the hooks of the counter, which do no harm to a model that runs eagerly
        warnings.filterwarnings("ignore", message=r"Using `torch.compile\(module\)` when there are global hooks")
        yield


def _recorder(calls: list[Call]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        source, result = _first_tensor((args, kwargs)), _first_tensor(output)
        if source is not None and result is not None:
            calls.append(Call(tuple(source.shape), tuple(result.shape)))

    return record


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor inside nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := _first_tensor(item)) is not None), None)
    return None


def _batch_size(arguments: Arguments) -> int:
    first = _first_tensor(arguments)
    return max(1, first.shape[0]) if first is not None and first.dim() else 1


def _layer_stats(layer: nn.Module, calls: tuple[Call, ...], batch_size: int) -> LayerStats:
    return LayerStats(type(layer).__name__, count_params(layer), _macs(layer, calls) // batch_size, calls)


def _macs(layer: nn.Module, calls: tuple[Call, ...]) -> int:
    """Return the multiply-adds of all calls; none for a kind whose cost is not known (it is never replaced)."""
    if is_factorised(layer):
        # A twin without memory: costs depend on shapes alone.
        twin: Any = copy.deepcopy(layer).to("meta")
        return int(type(twin).cost(twin.to_dense(), calls, rank=twin.rank, **twin.options).macs)
    return dense_cost(layer, calls).macs if isinstance(getattr(layer, "weight", None), Tensor) else 0
