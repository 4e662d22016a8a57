"""An embedding and the output layer that is tied to it: two layers with one weight, planned by one choice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rankfold.layers import Metric
from rankfold.planning._amounts import Amounts
from rankfold.planning._choice import Choice
from rankfold.planning._metrics import layer_metric
from rankfold.stats import LayerTime, Stats, walk

FOLLOWS = "follows"  # what the reason of a tied head begins with


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Return, per name of an embedding, that of the linear layer which has the very same parameter for a weight.

    These are one `nn.Embedding`, one `nn.Linear` and no other owner of the parameter; every other tie is left alone.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
        >>> model["head"].weight = model["embed"].weight
        >>> tied_heads(model)
        {'embed': 'head'}
    """
    owners = owners_of(model)
    layers = dict(walk(model))
    found = {}
    for name, layer in layers.items():
        if type(layer) is not nn.Embedding:
            continue
        others = owners[memory_of(layer.weight)] - {name}
        head = layers.get(next(iter(others))) if len(others) == 1 else None
        if type(head) is nn.Linear and head.weight is layer.weight:
            found[name] = next(iter(others))
    return found


def owners_of(model: nn.Module) -> Mapping[int, set[str]]:
    """Return the names of the modules that own each parameter, by `memory_of`."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[memory_of(parameter)].add(name)
    return owners


def memory_of(parameter: Tensor) -> int:
    """Return the same for parameters that are one, or that hold the same memory, as a transposed tie does."""
    plain = not is_lazy(parameter) and type(parameter.data) is torch.Tensor and not parameter.is_meta
    return parameter.data_ptr() if plain and parameter.numel() else id(parameter)


def with_partners(names: set[str], ties: Mapping[str, str]) -> set[str]:
    """Return the names, and of each that is tied the name of the other."""
    pairs = [{embedding, head} for embedding, head in ties.items()]
    return names.union(*(pair for pair in pairs if pair & names))


def as_one(choices: Mapping[str, Choice], pair: tuple[str, str]) -> dict[str, Choice]:
    """Return the dense choices of an embedding, to which the work of both is counted, and of the head that follows it.

    What the two have in common is counted to the embedding, the bias of the head to the head.
    """
    embedding, head = (choices[name] for name in pair)
    one, other = embedding.dense, head.dense
    both, rest = one + other, other - one
    shared = replace(both, params=one.params, bytes=one.bytes)
    left = Amounts(rest.params, None if both.macs is None else 0, rest.bytes, None if both.latency is None else 0)
    follows = f"{FOLLOWS} {pair[0]!r}, whose weight it has"
    return {
        pair[0]: replace(embedding, amounts=shared, dense=shared),
        pair[1]: replace(head, amounts=left, dense=left, reason=follows),
    }


def times_of(stats: Stats | None, name: str, head: str | None) -> LayerTime | None:
    """Return the measured times of a layer; of one with a tied head those of both."""
    if stats is None or stats.times is None:
        return None
    found = [stats.times.layers.get(key) for key in (name, head) if key is not None]
    known = [layer for layer in found if layer is not None]
    return LayerTime(tuple(call for layer in known for call in layer.calls)) if len(known) == len(found) else None


def metric_of(
    metric: str, stats: Stats | None, name: str, head: str | None, layers: Mapping[str, nn.Module]
) -> Metric | None:
    """Return the metric of a layer, None on its weight; where a head is tied to it, from the head's inputs."""
    if head is None:
        return layer_metric(metric, stats, name)
    return _tied_metric(layer_metric(metric, stats, head), layers[head])


def _tied_metric(metric: Metric | None, head: Any) -> Metric | None:
    """Return the metric of a table W that is looked up in one layer and multiplied with in the other.

    With C that of the head's inputs, `C + (trace(W C W^T) / trace(W W^T)) I`: the squared error in it, relative to W's
    own, is the mean of that of the head's outputs and that of the rows that are looked up, each row counted alike. C is
    centred where the head has a bias, which then takes up the mean. With weights of the outputs both count them.
    """
    if metric is None:
        return None
    second = metric.second
    if head.bias is not None:
        second = second - metric.mean.unsqueeze(2) * metric.mean.unsqueeze(1)
    squares = head.weight.detach().float() if head.weight.dtype.itemsize < 4 else head.weight.detach()
    weighed = squares if metric.output_weights is None else squares * metric.output_weights.to(squares).unsqueeze(1)
    gram = (weighed.mT @ squares).to(second)
    whole = float(gram.trace())
    outputs = max(float((second[0] * gram).sum()), 0.0)
    unit = torch.eye(len(gram), dtype=second.dtype, device=second.device)
    ratio = outputs / whole if outputs > 0 and whole > 0 else 1.0
    return replace(metric, second=second + ratio * unit)
