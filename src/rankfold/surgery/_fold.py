"""Fold BatchNorm into the layer before it, for inference: fewer passes over the activations, the same function."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from rankfold._common import device_of, example_arguments, tensors_in, to_device
from rankfold.errors import LayerError
from rankfold.layers import DENSE_TYPES, FlexibleActivation, along_outputs, dense_type_of, hooks_of, is_factorised
from rankfold.stats import left_alone, uncompiled
from rankfold.surgery._copies import copy_with

NORMS = frozenset(norm for row in DENSE_TYPES for norm in row.norms)
"""Every kind of BatchNorm that normalises the outputs of some layer channel by channel."""
ROUNDING = 10.0  # in roots of the machine precision: rounding in a deep network stays below, an error does not


def fold_batchnorm(model: nn.Module, *, example: Any = None) -> nn.Module:
    """Return a new model for inference in which every BatchNorm that can be is part of the layer before it.

    With `s = weight / sqrt(running_var + eps)` the layer's weight becomes `s W` by output channel, its bias
    `s (b - running_mean) + bias`, and an `nn.Identity` takes the place of the BatchNorm. In a factorised layer the last
    of its stages changes. A pair is folded only where the output of the layer goes to the BatchNorm and nowhere
    else, each is called once, and neither has hooks, parametrisations or weights in common with other
    modules. The result computes what the model computes in eval mode, to rounding, and is in eval mode; it can't be
    trained on as before. The model itself is not changed. Names of all other parameters stay, so the model made from a
    folded dense one can be saved with its plan and loaded into a folded skeleton.

    Pairs are found by `torch.fx`. Where a model can't be traced, they are found while it runs on the example.

    Args:
        model: dense or compressed.
        example: the arguments of one call; needed only where the model can't be traced. Where it is given, the outputs
            of both models are compared. A linear layer before `nn.BatchNorm1d` is taken to give (batch, features).

    Raises:
        LayerError: a BatchNorm after a foldable layer has no running statistics; or the model can't be traced and
            there is no example; or it can't be copied; or the outputs on the example differ.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> folded, x = fold_batchnorm(model), torch.randn(1, 3, 8, 8)
        >>> folded[1], folded[0].bias.shape
        (Identity(), torch.Size([8]))
        >>> torch.testing.assert_close(folded(x), model(x))
    """
    replacements: dict[int, nn.Module] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for layer, norm in _foldable(model, _pairs(model, example)):
        if norm.running_mean is None or norm.running_var is None:
            raise LayerError(
                f"BatchNorm {names[id(norm)]!r} has no running statistics: it normalises every batch by itself, and "
                "can't be folded; train it with track_running_stats=True"
            )
        replacements[id(layer)] = folded(layer, norm)
        replacements[id(norm)] = nn.Identity()
    result = copy_with(model, replacements).eval()
    if example is not None:
        _check(model, result, example)
    return result


def _pairs(model: nn.Module, example: Any) -> list[tuple[nn.Module, Any]]:
    """Return layers and the BatchNorm that alone takes their output."""
    graph = _traced(model)
    if graph is not None:
        return list(_pairs_of_graph(model, graph))
    if example is None:
        raise LayerError(
            f"{type(model).__name__} can't be traced by torch.fx, so that its BatchNorms must be found while it runs: "
            "pass example=, the arguments of one call"
        )
    return _pairs_of_run(model, example)


class _Tracer(fx.Tracer):
    """Sees factorised layers and flexible activations as stock ones: from outside."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_factorised(m) or isinstance(m, FlexibleActivation) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.Graph | None:
    with left_alone(model):
        try:
            return _Tracer().trace(model)
        except Exception:  # whatever the user's code raises when it is called with stand-ins for tensors
            return None


def _pairs_of_graph(model: nn.Module, graph: fx.Graph) -> Iterator[tuple[nn.Module, Any]]:
    modules = dict(model.named_modules(remove_duplicate=False))
    called = {node: modules[str(node.target)] for node in graph.nodes if node.op == "call_module"}
    counts = Counter(map(id, called.values()))
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    reads = {id(part) for name in read if name in modules for part in modules[name].modules()}
    for node, norm in called.items():
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source not in called or len(source.users) > 1:
            continue
        layer = called[source]
        if counts[id(layer)] == counts[id(norm)] == 1 and not {id(p) for p in layer.modules()} & reads:
            yield layer, norm


def _pairs_of_run(model: nn.Module, example: Any) -> list[tuple[nn.Module, Any]]:
    """Find pairs while the model runs: which tensor object is used by which call."""
    seen = _Uses()
    with left_alone(model), uncompiled(), ExitStack() as stack:
        for module in model.modules():
            if _stage_of(module) is not None or type(module) in NORMS:
                stack.callback(module.register_forward_pre_hook(seen.enter).remove)
                stack.callback(module.register_forward_hook(seen.leave).remove)
        args, kwargs = to_device(example_arguments(example), device_of(model))
        with seen:
            output = model(*args, **kwargs)
        seen.count(output)
    return seen.pairs()


class _Uses(TorchFunctionMode):
    """Counts how often tensors are used outside of the modules that are watched, and as inputs of these."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._uses: Counter[int] = Counter()
        self._calls: Counter[nn.Module] = Counter()
        # the tensors of both are held: an id stays theirs
        self._made: dict[int, tuple[nn.Module, Tensor]] = {}
        self._fed: dict[nn.Module, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if not self._depth:
            self.count((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def count(self, value: Any) -> None:
        """Count one use of every tensor in a value."""
        self._uses.update(map(id, tensors_in(value)))

    def enter(self, module: nn.Module, args: Any) -> None:
        if not self._depth:
            self.count(args)
            self._calls[module] += 1
            self._fed[module] = args[0] if args else None
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        self._depth -= 1
        if not self._depth and isinstance(output, Tensor):
            if id(output) not in self._made:  # what was counted under its id was of tensors that are gone
                del self._uses[id(output)]
            self._made[id(output)] = module, output

    def pairs(self) -> list[tuple[nn.Module, Any]]:
        """Return layer and BatchNorm wherever the output of one is used by the other alone, each called once."""
        found = []
        for norm, given in self._fed.items():
            source = id(given)
            layer = self._made[source][0] if source in self._made else norm
            read = any(self._uses[id(parameter)] for parameter in layer.parameters())
            if self._uses[source] == self._calls[layer] == self._calls[norm] == 1 and layer is not norm and not read:
                found.append((layer, norm))
        return found


def _foldable(model: nn.Module, pairs: list[tuple[nn.Module, Any]]) -> Iterator[tuple[nn.Module, Any]]:
    """Yield the pairs of layers that fit together, and that nothing else has a part in."""
    owners: dict[int, set[int]] = defaultdict(set)
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)].add(id(module))
    for layer, norm in pairs:
        stage = _stage_of(layer)
        row = None if stage is None else dense_type_of(stage)
        if row is None or type(norm) not in row.norms or norm.num_features != getattr(stage, row.outputs):
            continue
        tied = any(len(owners[id(parameter)]) > 1 for part in (layer, norm) for parameter in part.parameters())
        if not tied and all(_is_plain(part) for part in (*layer.modules(), norm)):
            yield layer, norm


def _stage_of(layer: nn.Module) -> Any:
    """Return the stock layer that makes the outputs: the layer itself, or the last stage of a factorised one."""
    stages = list(layer.children()) if is_factorised(layer) else [layer]
    stage: Any = stages[-1] if stages else None
    row = None if stage is None else dense_type_of(stage)
    # A stage that does not hold the bias of its layer does not make the outputs alone.
    return stage if row is not None and row.norms and getattr(layer, "bias", None) is stage.bias else None


def _is_plain(module: Any) -> bool:
    """Tell whether a module computes what its class does, from plain tensors."""
    hooked = bool(hooks_of(module)) or "forward" in vars(module)
    plain = all(type(parameter) is nn.Parameter for parameter in module._parameters.values() if parameter is not None)
    return plain and not hooked and not parametrize.is_parametrized(module)


def folded(layer: nn.Module, norm: Any) -> nn.Module:
    """Return a copy of a layer with the BatchNorm after it in it, as it is in eval mode; computed in float64."""
    new = copy.deepcopy(layer)
    stage, wide = _stage_of(new), torch.float64
    with torch.no_grad():
        scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight.to(wide)
        shift = -norm.running_mean.to(wide) * scale
        shift = shift if norm.bias is None else shift + norm.bias.to(wide)
        shift = shift if stage.bias is None else shift + scale * stage.bias.to(wide)
        stage.weight.copy_(stage.weight.to(wide) * along_outputs(stage, scale))
        grad = stage.weight.requires_grad if stage.bias is None else stage.bias.requires_grad
        stage.bias = nn.Parameter(shift.to(stage.weight), requires_grad=grad)
    return new


def _check(model: nn.Module, folded: nn.Module, example: Any) -> None:
    """Raise where the two models differ by more than rounding."""
    args, kwargs = to_device(example_arguments(example), device_of(model))
    outputs = []
    for one in (model, folded):
        with left_alone(one):
            outputs.append(tensors_in(one(*args, **kwargs)))
    for before, after in zip(*outputs, strict=True):
        if before.is_meta or not before.is_floating_point():
            continue
        distance = float((after - before).double().norm() / before.double().norm().clamp_min(1e-300))
        if distance > ROUNDING * torch.finfo(before.dtype).eps ** 0.5:
            raise LayerError(
                f"the folded model differs from {type(model).__name__} by {distance:.2g} on the example: an output of "
                "a layer is used where it was not seen; leave this model as it is"
            )
