"""Time the layers of a model and their possible replacements, with the shapes that the model calls them with."""

from __future__ import annotations

import itertools
import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rankfold._common import device_of, example_arguments, first_tensor, to_device, track
from rankfold.errors import DataError
from rankfold.latency._cache import cache_file, cache_folder, read_cases, write_cases
from rankfold.latency._race import Latency, Timing, steady_clock, time_models
from rankfold.latency._runtimes import runtime_of
from rankfold.layers import (
    FactorisedLayer,
    Rank,
    is_channels_last,
    is_factorised,
    layer_class,
    methods_for,
    refusal,
    stock_twin,
)
from rankfold.stats import (
    CallTime,
    Curve,
    LayerTime,
    LayerTimes,
    Setting,
    Stats,
    coordinates,
    left_alone,
    uncompiled,
    walk,
)

ALLOCATORS = ("GLIBC_TUNABLES", "LD_PRELOAD")  # and MALLOC_…: variables that choose or configure the allocator
TIMED_SHARES = {1: (1 / 8, 1 / 4, 1 / 2, 4 / 5), 2: (1 / 6, 2 / 5, 4 / 5)}
"""Ranks to time, as fractions of the largest rank that saves parameters, by the number of entries of a rank."""
GRAINS = (4, 8, 16, 32)
"""Steps that may suit the hardware: ranks in these steps are tried on the largest layer of each kind."""
LARGEST_BASE, LEAST_BASE = 256, 32
SAME = 0.02  # times that differ by less than this are considered equal
FEWEST = 4  # if fewer steps fit into the ranks of a layer, smaller steps are taken
ROUNDS, ROUND_SECONDS = 9, 1.0
WHOLE_ROUNDS, WHOLE_SECONDS = 15, 4.0
LATE = "not timed: the {:g} s of timing were over (Timing(seconds=…))"

Form = tuple[type[FactorisedLayer], dict[str, Any]]


@dataclass(frozen=True)
class _Input:
    """What the time of a layer depends on in its input."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @staticmethod
    def of(tensor: Tensor) -> _Input:
        return _Input(tuple(tensor.shape), tensor.dtype, _lies_channels_last(tensor))

    def tensor(self, layer: nn.Module) -> Tensor:
        """Return a tensor of this kind."""
        device = device_of(layer)
        if not self.dtype.is_floating_point:
            rows = torch.arange(math.prod(self.shape), device=device) % getattr(layer, "num_embeddings", 1)
            return rows.reshape(self.shape).to(self.dtype)
        source = torch.Generator().manual_seed(0)
        values = torch.randn(self.shape, generator=source).to(device, self.dtype)
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values


@dataclass(frozen=True, eq=False)
class _Case:
    """A layer with one kind of input; identical cases are timed once."""

    layer: nn.Module
    input: _Input
    forms: tuple[Form, ...]

    @property
    def key(self) -> str:
        """The same text for identical cases, whatever the names of the layers."""
        weight: Any = self.layer.weight
        forms = [(cls.method, sorted(options.items())) for cls, options in self.forms]
        layout = "channels last" if is_channels_last(weight) else "contiguous"
        return f"{type(self.layer).__name__}({self.layer.extra_repr()}) {weight.dtype} {layout} {self.input} {forms}"

    @property
    def lasting(self) -> bool:
        """Whether its times may be kept for other processes: a class of the user's may be another one by then."""
        return all(cls.__module__.startswith("rankfold.") for cls, _ in self.forms)

    @property
    def kind(self) -> tuple[str, torch.dtype, bool]:
        """What the best steps of ranks depend on."""
        return type(self.layer).__name__, self.input.dtype, self.input.channels_last


def time_layers(
    model: nn.Module,
    stats: Stats,
    *,
    example: Any,
    methods: str | Sequence[str] = ("svd", "tucker"),
    timing: Timing | None = None,
) -> Stats:
    """Return statistics with the measured times of layers, for a budget on latency.

    Every kind of call of a layer (type, shapes, dtype, memory format) is timed once: the dense layer, and what each
    method makes of it at a few ranks, all in turn within each round, as in `time_models`. The largest layer of each
    kind shows in which steps ranks should be chosen: the largest of 4, 8, 16 and 32 for which the last rank of a step
    is no slower than the first. The dense model is timed too; if its layers take longer than the model in total, their
    times are scaled down to it. For the runtime "compile", single layers are timed without it, because one layer has
    nothing to fuse; whole models always run in the runtime itself. On one CPU thread, processor time is measured,
    which other programs disturb least.

    Times of layers are kept in the user's cache folder, in one file per device, versions, runtime and threads.

    Args:
        model: the dense model; it is not changed.
        stats: the statistics that `measure` returned for it.
        example: the arguments of one call, with the batch size that the budget is for.
        methods: name or names of the methods to time, such as "svd" or ("svd", "tucker", "cp"): those that the plan
            may choose from.
        timing: where and how to measure.

    Raises:
        DataError: the statistics are of another model, or the model has no values.

    Example:
        >>> import torch, rankfold
        >>> from rankfold.latency._race import Timing
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(64, 64)), torch.ones(1, 64)
        >>> stats = rankfold.measure(model, example=x)
        >>> timed = time_layers(model, stats, example=x, timing=Timing(cache=False))
        >>> timed.times.layers["0"].dense > 0
        True
    """
    timing = timing or Timing()
    if any(parameter.is_meta for parameter in model.parameters()):
        raise DataError("a model on the meta device can't be timed: give it its values first")
    names = (methods,) if isinstance(methods, str) else tuple(methods)
    calls = _calls(model, names, example)
    if unknown := sorted(calls.keys() - stats.layers.keys()):
        raise DataError(f"the statistics are of another model: they have no layer {unknown[0]!r}; measure this one")
    table = _Table(timing, _setting(model, timing))
    late = table.fill(_ordered(calls, stats))
    whole = _whole(model, example, timing)
    layers = {name: table.layer_time(cases) for name, cases in calls.items() if not late & {c.key for c in cases}}
    total = math.fsum(layer.dense for layer in layers.values())
    if total > whole:
        layers = {name: layer.scaled(whole / total) for name, layer in layers.items()}
    left_out = {name: LATE.format(timing.seconds) for name in calls if name not in layers}
    return replace(stats, times=LayerTimes(layers, whole, table.setting, left_out))


def _whole(model: nn.Module, example: Any, timing: Timing) -> float:
    return time_models(
        {"model": model},
        example,
        runtime=timing.runtime,
        threads=timing.threads,
        rounds=WHOLE_ROUNDS,
        seconds=WHOLE_SECONDS,
        clock=steady_clock(model, timing.threads),
    )["model"].median


def _calls(model: nn.Module, methods: tuple[str, ...], example: Any) -> dict[str, Counter[_Case]]:
    """Return the cases of every layer that can be replaced, with the number of calls of each."""
    layers = {name: layer for name, layer in walk(model) if not is_factorised(layer) and not refusal(layer)}
    inputs: dict[str, list[_Input]] = {name: [] for name in layers}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
            source = first_tensor((args, kwargs))
            if source is not None:
                inputs[name].append(_Input.of(source))

        return see

    with left_alone(model), uncompiled(), ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(name), with_kwargs=True).remove)
        args, kwargs = to_device(example_arguments(example), device_of(model))
        model(*args, **kwargs)
    found = {}
    for name, layer in layers.items():
        twin = stock_twin(layer)
        forms = _forms(twin, methods)
        if forms and inputs[name]:
            found[name] = Counter({_Case(twin, one, forms): n for one, n in Counter(inputs[name]).items()})
    return found


def _forms(layer: nn.Module, methods: tuple[str, ...]) -> tuple[Form, ...]:
    """Return the layer class and the options of everything that could replace a layer."""
    known = methods_for(layer)
    classes = [layer_class(layer, method) for method in methods if method in known]
    return tuple((cls, dict(options)) for cls in classes for options in cls.variants(layer))


def _ordered(calls: Mapping[str, Counter[_Case]], stats: Stats) -> list[_Case]:
    """Return one case per key, those with the most work first."""
    work: Counter[str] = Counter()
    cases: dict[str, _Case] = {}
    for name, counted in calls.items():
        for case in counted:
            cases.setdefault(case.key, case)
            work[case.key] += stats.layers[name].macs
    return sorted(cases.values(), key=lambda case: -work[case.key])


class _Table:
    """Times of cases: read from the cache, measured if they are missing, and written back."""

    def __init__(self, timing: Timing, setting: Setting) -> None:
        self.setting = setting
        self._timing = timing
        self._file = _kept_in(timing, setting)
        self._times = read_cases(self._file, setting) if self._file else {}
        self._grains: dict[Any, int] = {}

    def fill(self, cases: Sequence[_Case]) -> set[str]:
        """Time the cases that are not in the table, within the time limit; return the keys of those that are left."""
        missing = [case for case in cases if case.key not in self._times]
        late, end = set(), time.perf_counter() + self._timing.seconds
        try:
            for case in track(missing, "Timing layers"):
                if time.perf_counter() > end:
                    late.add(case.key)
                    continue
                if case.kind not in self._grains:
                    self._grains[case.kind] = self._grain(case)
                self._times[case.key] = self._time(case)
        finally:  # even after Ctrl-C, so that the next run continues from here
            passing = {case.key for case in cases if not case.lasting}
            if self._file is not None and any(case.key in self._times for case in missing if case.lasting):
                write_cases(self._file, self.setting, {k: v for k, v in self._times.items() if k not in passing})
        return late

    def layer_time(self, cases: Mapping[_Case, int]) -> LayerTime:
        """Return the times of a layer, given its cases and their numbers of calls."""
        return LayerTime(tuple(replace(self._times[case.key], count=count) for case, count in cases.items()))

    def _time(self, case: _Case) -> CallTime:
        """Time one case: the dense layer and every form of it, in turn."""
        drafts = [_draft(form, case.layer, self._grains[case.kind]) for form in case.forms]
        models = {"dense": case.layer}
        for form, draft in zip(case.forms, drafts, strict=True):
            models |= {_label(form, rank): _fresh(form, case.layer, rank) for rank in draft.ranks}
        times = self._race(case, models)
        curves = (
            Curve(form[0].method, form[1], draft.axes, _over(times, form, draft.ranks), draft.grain)
            for form, draft in zip(case.forms, drafts, strict=True)
        )
        return CallTime(min(times["dense"].seconds), 1, tuple(curves))

    def _grain(self, case: _Case) -> int:
        """Return the largest step whose last rank is as fast as its first, for the first form of two stages."""
        for cls, options in case.forms:
            full, grid = cls.full_rank(case.layer, **options), cls.rank_grid(case.layer, **options)
            if isinstance(full, tuple) or cls.stages is None:
                continue
            base = min(LARGEST_BASE, max(map(_first, grid)) // 2 // max(GRAINS) * max(GRAINS))
            if base >= LEAST_BASE:
                ranks = [base + step for step in (1, *GRAINS) if base + step <= full]
                models = {str(rank): _fresh((cls, options), case.layer, rank) for rank in ranks}
                times = self._race(case, models)
                least = [min(times[str(rank)].seconds) for rank in ranks]
                return max(rank - base for rank, x in zip(ranks, least, strict=True) if x <= least[0] * (1 + SAME))
        return 1

    def _race(self, case: _Case, models: Mapping[str, nn.Module]) -> dict[str, Latency]:
        return time_models(
            models,
            case.input.tensor(case.layer),
            runtime=runtime_of(self._timing.runtime).layer,
            threads=self._timing.threads,
            rounds=ROUNDS,
            seconds=ROUND_SECONDS,
            clock=steady_clock(case.layer, self._timing.threads),
        )


def _kept_in(timing: Timing, setting: Setting) -> Path | None:
    """Return the cache file; None for a user's function, whose name does not identify it."""
    if timing.cache is False or not isinstance(timing.runtime, str):
        return None
    return cache_file(cache_folder() if timing.cache is True else Path(timing.cache), setting)


@dataclass(frozen=True)
class _Draft:
    """The ranks at which a curve is to be measured."""

    axes: tuple[tuple[float, ...], ...]
    ranks: tuple[Rank, ...]
    grain: int


def _draft(form: Form, layer: nn.Module, grain: int) -> _Draft:
    """Choose a few ranks of the planner's grid, in steps of the grain if the grid is wide enough."""
    cls, options = form
    top = max(max(coordinates(rank)) for rank in cls.rank_grid(layer, **options))
    while grain > 1 and (top < FEWEST * grain or not cls.rank_grid(layer, multiple=grain, **options)):
        grain //= 2
    points = {coordinates(rank): rank for rank in cls.rank_grid(layer, multiple=grain, **options)}
    values = [sorted(set(column)) for column in zip(*points, strict=True)]
    axes = tuple(
        tuple(sorted({min(column, key=lambda x: abs(x - share * column[-1])) for share in TIMED_SHARES[len(values)]}))
        for column in values
    )
    # A pair that the grid leaves out because it saves nothing is still a valid rank.
    ranks = tuple(points.get(point, tuple(map(int, point))) for point in itertools.product(*axes))
    return _Draft(axes, ranks, grain)


def _first(rank: Rank) -> int:
    return rank[0] if isinstance(rank, tuple) else rank


def _fresh(form: Form, layer: nn.Module, rank: Rank) -> nn.Module:
    cls, options = form
    new: nn.Module = cls.like(layer, rank=rank, **options)  # type: ignore[assignment]
    return new


def _label(form: Form, rank: Rank) -> str:
    return f"{form[0].method} {form[1]} {rank}"


def _over(times: Mapping[str, Latency], form: Form, ranks: Sequence[Rank]) -> tuple[float, ...]:
    """Return times divided by the dense layer's, from the fastest rounds, because disturbances only add time."""
    return tuple(min(times[_label(form, rank)].seconds) / min(times["dense"].seconds) for rank in ranks)


def _lies_channels_last(tensor: Tensor) -> bool:
    """Tell whether an input is in channels-last order in memory and not contiguous as well."""
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _setting(model: nn.Module, timing: Timing) -> Setting:
    """Return the conditions of a measurement."""
    device, runtime = device_of(model), timing.runtime
    name = runtime if isinstance(runtime, str) else getattr(runtime, "__name__", "custom")
    return Setting(
        runtime=name,
        threads=timing.threads or torch.get_num_threads(),
        device=device.type,
        hardware=_hardware(device),
        torch=torch.__version__,
        library=_version(runtime_of(runtime).library),
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return ", ".join([_processor(), torch.backends.cpu.get_cpu_capability(), f"{os.cpu_count()} cores", *_allocator()])


def _allocator() -> list[str]:
    """Return the allocator settings in the environment: getting new pages for every large tensor takes time."""
    chosen = {key: value for key, value in sorted(os.environ.items()) if key in ALLOCATORS or key.startswith("MALLOC_")}
    return [f"{key}={value}" for key, value in chosen.items() if value]


def _processor() -> str:
    """Return the name of the processor, on Linux from a file, elsewhere from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package) if package else ""
    except PackageNotFoundError:
        return ""
