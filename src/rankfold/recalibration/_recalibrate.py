"""Recalibration: layer by layer, what a compressed model got wrong is put right where the next layer starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import real, track, whole
from rankfold.errors import DataError
from rankfold.layers import FlexibleLayer, TiedHead, dense_type_of, is_factorised, output_size, row_size
from rankfold.recalibration._passes import Calibration, bytes_of, solved_part
from rankfold.recalibration._refit import refit
from rankfold.stats import Stats, observing, walk
from rankfold.surgery import copy_with, with_named_projections

PATCHES = 64
LEAST_WEIGHT = 1e-2  # of an output, over the mean of its layer's: gradients of few samples miss what is seldom used
MEMORY = 2**31
EPS = 1e-12  # the least damping that float64 resolves
DENSE_FIRST = "it comes before the first compressed layer, and gets what it got in the original"


@dataclass(frozen=True)
class Refit:
    """What became of one layer.

    Attributes:
        name: of the layer.
        before: relative error of its outputs on its real inputs, before.
        after: the same afterwards; equal to `before` where the layer was kept as it was.
        damping: the share of the mean diagonal that was added to the second moment of the inputs.
        kept: whether the new factors are in the model that was returned.
    """

    name: str
    before: float
    after: float
    damping: float
    kept: bool


@dataclass(frozen=True)
class Recalibration:
    """What a recalibration did.

    Attributes:
        error_before: relative error of the model's outputs on the calibration data, before.
        error_after: the same afterwards, never above `error_before`.
        layers: the layers that were solved for, in the order of their calls.
        left_out: the others that could be thought of, and why they were left as they are.
    """

    error_before: float
    error_after: float
    layers: tuple[Refit, ...]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Refitting:
    """How the layers of a recalibration are solved for.

    Args:
        include_dense: whether dense linear layers and convolutions after the first compressed layer are fitted too.
        per_pass: layers that are solved for on the inputs of one run, without regard to each other; None for all of
            them at once.
        damping: what is added to the diagonal of the second moment E[x' x'^T], over its mean diagonal; by default the
            best of several on rows left out. Those rows are of the same data: where the data in use will differ, 10
            keeps layers near what they are.

    Raises:
        DataError: a number of layers that is none, or a damping that is no finite number float64 resolves.
    """

    include_dense: bool = True
    per_pass: int | None = 1
    damping: float | None = None

    def __post_init__(self) -> None:
        if self.per_pass is not None:
            whole("per_pass", self.per_pass, error=DataError)
        if self.damping is not None:
            real("damping", self.damping, EPS, error=DataError)


def recalibrate(  # noqa: PLR0913 (twelve at most)
    small: nn.Module,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = None,
    patches: int = PATCHES,
    refitting: Refitting | None = None,
    mask: Any = None,
    stats: Stats | None = None,
    memory: int = MEMORY,
    seed: int = 0,
    watch: Callable[[Recalibration], None] | None = None,
) -> nn.Module:
    """Return a copy of a compressed model whose layers are fitted, in the order of their calls, to what they get.

    A compressed layer feeds the next ones other inputs x' than those x that they were made for. With the outputs y
    of the original as the target, each layer is solved again on the inputs that it really gets, once all layers
    before it have been: W = E[y x'^T] (E[x' x'^T] + eps I)^-1 for a dense layer, drawn towards the weight that it has;
    the projection of that on the leading eigenvectors of W C W^T, C the metric, for an SVD by channels (reduced-rank
    regression); and for any other form its factors in turn, by conjugate gradients in that metric. A bias takes up the
    means. No gradient step is taken through the model.

    A layer's new factors are taken only where they have the smaller error on the quarter of the rows that they were
    not solved on, and those of the last layers are given up where the outputs of the whole model are better without
    them: the error on the calibration data never rises. The original runs once, as long as `memory` suffices for its
    outputs and those of its layers, and the small model once per layer, or once for `Refitting.per_pass` of them.
    Batches stay in memory.

    Args:
        small: the compressed model, as `apply` made it; it is not changed.
        model: the original; it is not changed.
        loader: a few hundred typical inputs, in batches, read once and kept: tensors, tuples with the inputs first, or
            mappings of keyword arguments.
        batches: how many to read at most; all of them if None, which takes a loader that ends.
        patches: positions per image in each convolution, at random, the same in both models.
        refitting: whether dense layers are fitted too, how many layers a run, and how strongly each is damped.
        mask: which tokens of a batch count: the key of a tensor in mappings, "attention_mask" say, or a function of a
            batch to one (batch, tokens), True or 1 where a token counts.
        stats: from `measure` with a loss: each output of a layer then counts by its mean squared gradient. It is what
            goes with a plan in the metric "fisher": in transformers few outputs are so large that they drown the rest.
        memory: bytes that the moments of one layer, and the outputs kept of the original, may take. Of a low-rank layer
            that needs more, the second stage alone is solved for; another one is left as it is.
        seed: seed of the positions.
        watch: called at the end with what was done.

    Raises:
        DataError: no batches, or an iterator without `batches`; NaN or Inf in the input of a layer;
            settings out of range.
        LayerError: the model can't be copied.

    References:
        Zhang, Zou, He, Sun 2016, section 3.3 (asymmetric reconstruction); Izenman 1975 (reduced-rank regression).

    Example:
        >>> import torch, rankfold as rf
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> small, _ = rf.compress(model, example=torch.ones(1, 16), budget=rf.Budget(params=0.5))
        >>> data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(0))]
        >>> better = recalibrate(small, model, data, watch=lambda done: print(done.error_after <= done.error_before))
        True
    """
    whole("memory", memory, error=DataError)
    how = refitting or Refitting()
    data = _read(loader, batches)
    result = copy_with(small, {})
    model = with_named_projections(model, dict(walk(small)).keys())
    settings = {"patches": patches, "mask": mask, "seed": seed}
    order, left_out = _order(result, model, data[0], settings, how.include_dense, memory)
    weights = {name: _weights(stats, name) for name in order}
    done = _Run(result, Calibration(model, data, order, settings, memory), how.damping, weights)
    size = max(1, len(order)) if how.per_pass is None else how.per_pass
    for start in track(range(0, len(order), size), "Recalibrating"):
        done.solve(order[start : start + size])
    report = done.finish(left_out)
    if watch is not None:
        watch(report)
    return result


class _Run:
    """The groups that were solved for so far, each with the state before it and the error of the outputs then."""

    def __init__(
        self,
        small: nn.Module,
        calibration: Calibration,
        damping: float | None,
        weights: Mapping[str, Tensor | None],
    ) -> None:
        self.weights = weights
        self.small, self.calibration, self.damping = small, calibration, damping
        self.groups: list[list[Refit]] = []
        self.errors: list[float] = []
        self.before: list[dict[str, dict[str, Tensor]]] = []

    def solve(self, names: Sequence[str]) -> None:
        """Solve for the layers of one group."""
        pairs, error = self.calibration.pairs(self.small, names)
        self.errors.append(error)
        self.groups.append([])
        self.before.append({})
        for name in names:
            part = solved_part(self.small.get_submodule(name), self.calibration.memory)
            place = f"{name}.{part}" if part else name
            layer = self.small.get_submodule(place)
            solve, check = pairs.pop(name)
            if not solve.count:
                raise DataError(f"layer {name!r} gets no rows: mask= leaves nothing of the data")
            weights = self.weights[name]
            found = refit(layer, solve, check, self.damping, weights)
            squares = (solve.yy + check.yy).flatten()
            whole = float((squares if weights is None else squares * weights.to(squares)).sum())
            whole = whole / (solve.count + check.count) or 1.0
            before, after = (math.sqrt(loss / whole) for loss in (found.before, found.after))
            self.groups[-1].append(Refit(name, before, after, found.damping, found.state is not None))
            if found.state is not None:
                self.before[-1][place] = {key: value.clone() for key, value in layer.state_dict().items()}
                layer.load_state_dict(found.state)

    def finish(self, left_out: Mapping[str, str]) -> Recalibration:
        """Undo what came after the least error of the outputs, and return what was done."""
        _, last = self.calibration.pairs(self.small, ())
        errors = [*self.errors, last]
        best = min(range(len(errors)), key=lambda k: (not math.isfinite(errors[k]), errors[k]))
        for states in reversed(self.before[best:]):
            for place, state in states.items():
                self.small.get_submodule(place).load_state_dict(state)
        layers = [
            Refit(one.name, one.before, one.after, one.damping, one.kept and number < best)
            for number, group in enumerate(self.groups)
            for one in group
        ]
        return Recalibration(errors[0], errors[best], tuple(layers), left_out)


def _weights(stats: Stats | None, name: str) -> Tensor | None:
    """Return the mean squared gradients in the outputs of a layer, of mean one; none is less than `LEAST_WEIGHT`."""
    metric = None if stats is None else stats.metric(name, weighted=True)
    if metric is None or metric.output_weights is None or not bool(metric.output_weights.any()):
        return None
    return (metric.output_weights / metric.output_weights.mean()).clamp_min(LEAST_WEIGHT)


def _read(loader: Iterable[Any], batches: int | None) -> list[Any]:
    if batches is not None:
        whole("batches", batches, error=DataError)
    if isinstance(loader, Tensor):
        raise DataError("loader is an iterable of batches, such as a DataLoader or a list of tensors, not a tensor")
    if batches is None and isinstance(loader, Iterator):
        raise DataError(f"a {type(loader).__name__} may never end: say how many batches= to read")
    data = list(islice(loader, batches))
    if not data:
        raise DataError("the loader is empty: it must yield at least one batch")
    return data


def _order(
    small: nn.Module, model: nn.Module, batch: Any, settings: Mapping[str, Any], include_dense: bool, memory: int
) -> tuple[list[str], dict[str, str]]:
    """Return the layers to solve for in the order of their calls, and why others are left out."""
    originals, layers = dict(walk(model)), dict(walk(small))
    left_out: dict[str, str] = {}
    fit = []
    for name, layer in layers.items():
        reason = _unfit(small, layer, originals.get(name), memory) if _wanted(layer, include_dense) else ""
        if reason:
            left_out[name] = reason
        elif _wanted(layer, include_dense):
            fit.append(name)
    if not fit:
        return [], left_out
    # A compressed layer that can't be solved for, an embedding say, may come before all others.
    early = any(is_factorised(layers[name]) for name in left_out)
    blocks = _entrances(small)
    with observing(small, [*fit, *blocks], **{**settings, "patches": 1}) as run:
        called = list(run(batch))
    left_out |= {name: "it is not called on the data" for name in fit if name not in called}
    changed = (place for place, name in enumerate(called) if name in blocks or is_factorised(layers[name]))
    drifting = 0 if early else next(changed, len(called))
    left_out |= dict.fromkeys(called[:drifting], DENSE_FIRST)
    return [name for name in called[drifting:] if name not in blocks], left_out


def _entrances(small: nn.Module) -> set[str]:
    """Return the first layers inside of those that stand for whole blocks, which are left as they were solved."""
    inside = ((name, module) for name, module in small.named_modules() if isinstance(module, FlexibleLayer))
    return {f"{name}.down" if name else "down" for name, _ in inside}


def _wanted(layer: nn.Module, include_dense: bool) -> bool:
    row = dense_type_of(layer)
    dense = include_dense and row is not None and row.stock and row.rows != "none"
    return dense or is_factorised(layer) or isinstance(layer, TiedHead)


def _unfit(small: nn.Module, layer: nn.Module, original: nn.Module | None, memory: int) -> str:
    """Return why a layer is left as it is; "" where it isn't."""
    if isinstance(layer, TiedHead):
        return "its factors are those of its embedding"
    size = row_size(layer)
    if size is None:
        return f"a {type(layer).__name__} does not multiply its input by a weight"
    if original is None or row_size(original) != size or output_size(original) != output_size(layer):
        return "the original has no layer of this name and size"
    weights = list(layer.parameters())
    if any(p.is_meta or not torch.is_floating_point(p) for p in weights):
        return "it has no values, or not of a floating-point type"
    inside = {id(module) for module in layer.modules()}
    held = {id(p) for m in small.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    if any(id(p) in held for p in weights):
        return "it shares a weight with another module"
    if solved_part(layer, memory) is None:
        return f"its moments take {bytes_of(layer):,} bytes, and memory= is {memory:,}"
    return ""
