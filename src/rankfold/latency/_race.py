"""Time models side by side, so that any disturbance affects all of them."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from rankfold._common import device_of, evaluating, real, whole
from rankfold.errors import DataError
from rankfold.latency._runtimes import Run, Runtime, runtime_of

LEAST_ROUNDS = 5
WARM_UP_CALLS = 3
SAMPLE_SECONDS = 0.005  # a sample this long is far above the timer's resolution and the cost of a call
MOST_CALLS = 1000
CLOSE = 1.15  # how much slower a dense model may be in channels_last, because compressed ones gain more from it


@dataclass(frozen=True)
class Timing:
    """How latencies are measured for a budget on latency.

    Args:
        runtime: "eager", "compile", "onnxruntime", or a function `(model, example) -> callable`.
        threads: threads per operation; by default torch's setting.
        seconds: time limit for timing layers; those that are not timed by then stay dense.
        cache: whether to cache times of layers in the user's cache folder; a path names another folder. Times in a
            runtime given as a function are not cached.

    Raises:
        DataError: the runtime is unknown, or threads or seconds are not positive.

    Example:
        >>> Timing(threads=1).runtime
        'eager'
    """

    runtime: str | Runtime = "eager"
    threads: int | None = None
    seconds: float = 90.0
    cache: bool | str | Path = True

    def __post_init__(self) -> None:
        runtime_of(self.runtime)
        _check_limits(self.threads, self.seconds)


@dataclass(frozen=True)
class Latency:
    """Times of one model in a comparison in which all models ran in every round.

    Attributes:
        seconds: seconds per call, one sample per round.
        ratios: time of the first model divided by the time of this one, per round; above 1 is faster.
        calls: number of calls averaged in each sample.
        threads: number of threads that an operation could use.
        device: type of the device: "cpu", "cuda", ….
        runtime: name of the runtime.
    """

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    calls: int
    threads: int
    device: str
    runtime: str

    @property
    def median(self) -> float:
        """Return the median of the seconds per call."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Return the lower and the upper quartile of the seconds per call."""
        return _quartiles(self.seconds)

    @property
    def ratio(self) -> float:
        """Return the median over rounds of the speed-up over the first model."""
        return statistics.median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """Return the lower and the upper quartile of the speed-up."""
        return _quartiles(self.ratios)


Clock: TypeAlias = Callable[[], float]


def steady_clock(model: nn.Module, threads: int | None = None) -> Clock:
    """Return the clock that other programs disturb least.

    On one CPU thread that is the processor time of this process, which equals wall-clock time on an idle machine; with
    several threads, or on another device, it is wall-clock time.
    """
    alone = device_of(model).type == "cpu" and (threads or torch.get_num_threads()) == 1
    return time.process_time if alone else time.perf_counter


def time_models(  # noqa: PLR0913
    models: Mapping[str, nn.Module],
    example: Any,
    *,
    runtime: str | Runtime = "eager",
    threads: int | None = None,
    rounds: int = 25,
    seconds: float = 10.0,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Time models on the same example in interleaved rounds.

    Every round takes one sample of every model, in alternating order, so that a change of load or clock speed
    affects all of them. A speed-up is the median of the ratios within rounds, never a ratio of two medians. Models
    run in eval mode under `torch.inference_mode`, each on its own device; modes and number of threads are restored.
    Compare ratios, not milliseconds, between runs.

    Args:
        models: models by name; ratios are relative to the first one.
        example: a tensor, a tuple of arguments or a dict of keyword arguments.
        runtime: "eager", "compile", "onnxruntime", or a function `(model, example) -> callable`.
        threads: threads per operation; by default torch's setting.
        rounds: largest number of rounds.
        seconds: time limit after which no further round starts, once there have been five.
        clock: a function that returns the time in seconds.

    Returns:
        A `Latency` per name, in the given order.

    Raises:
        DataError: there are no models, the runtime is unknown, or threads, rounds or seconds are not positive.

    Example:
        >>> import torch
        >>> from rankfold.latency._race import time_models
        >>> models = {"wide": torch.nn.Linear(64, 512), "narrow": torch.nn.Linear(64, 8)}
        >>> times = time_models(models, torch.randn(4, 64), rounds=5)
        >>> len(times["narrow"].seconds), times["wide"].ratio
        (5, 1.0)
    """
    _check(models, threads, rounds, seconds)
    prepare = runtime_of(runtime).model
    with using_threads(threads), evaluating(*models.values()), torch.inference_mode():
        runs = {name: (prepare(model, example), device_of(model)) for name, model in models.items()}
        calls = {name: _calls_per_sample(run, device, clock) for name, (run, device) in runs.items()}
        samples: dict[str, list[float]] = {name: [] for name in runs}
        order = list(runs)
        start = time.perf_counter()
        for done in range(rounds):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
                break
            for name in order:
                samples[name].append(_sample(*runs[name], calls[name], clock))
            order.reverse()
        return {
            name: Latency(
                seconds=tuple(samples[name]),
                ratios=tuple(a / b for a, b in zip(samples[next(iter(models))], samples[name], strict=True)),
                calls=calls[name],
                threads=torch.get_num_threads(),
                device=device.type,
                runtime=runtime if isinstance(runtime, str) else getattr(runtime, "__name__", "custom"),
            )
            for name, (_, device) in runs.items()
        }


def _check(models: Mapping[str, nn.Module], threads: int | None, rounds: int, seconds: float) -> None:
    if not models:
        raise DataError("there is no model to time: pass a mapping from names to models")
    whole("rounds", rounds, error=DataError)
    _check_limits(threads, seconds)


def _check_limits(threads: int | None, seconds: float) -> None:
    if threads is not None:
        whole("threads", threads, error=DataError)
    real("seconds", seconds, ends="(]", error=DataError)


def fastest_layout(
    model: nn.Module, example: Any, *, runtime: str | Runtime = "eager", threads: int | None = None
) -> torch.memory_format:
    """Return the memory format to compress a model in: `channels_last`, unless it is clearly slower on an example.

    It is clearly slower if the contiguous model is faster by more than 15 %, because compressed layers gain more from
    `channels_last` than dense ones. A model without four-dimensional weights is not timed. Convolutions of a model in
    `channels_last` return their results in that format, whatever the format of the example. A compressed model has the
    format of the model that it is made from, so choose the format before compressing.

    Args:
        model: any module; copies of it are timed.
        example: a tensor, a tuple of arguments or a dict of keyword arguments.
        runtime: "eager", "compile", "onnxruntime", or a function `(model, example) -> callable`.
        threads: threads per operation; by default torch's setting.

    Returns:
        `torch.contiguous_format` or `torch.channels_last`, for `model.to(memory_format=…)`.

    Raises:
        DataError: the runtime is unknown, or threads are not positive.

    Example:
        >>> import torch
        >>> model = torch.nn.Conv2d(4, 4, 3)
        >>> layout = fastest_layout(model, torch.ones(1, 4, 8, 8))
        >>> layout in (torch.contiguous_format, torch.channels_last)
        True
    """
    if all(parameter.dim() != 4 for parameter in model.parameters()):
        return torch.contiguous_format
    formats = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    models = {name: copy.deepcopy(model).to(memory_format=layout) for name, layout in formats.items()}
    clock = steady_clock(model, threads)
    times = time_models(models, example, runtime=runtime, threads=threads, clock=clock)
    return formats["channels last" if CLOSE * times["channels last"].ratio >= 1 else "contiguous"]


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Set the number of threads per operation within a `with` block; None changes nothing."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if threads is None else threads)
        yield
    finally:
        torch.set_num_threads(before)


def _calls_per_sample(run: Run, device: torch.device, clock: Clock) -> int:
    """Warm up (caches, compilation, clock) and return how many calls a sample needs to be long enough."""
    once = min(_sample(run, device, 1, clock) for _ in range(WARM_UP_CALLS))
    return min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / max(once, 1e-9)))


def _sample(run: Run, device: torch.device, calls: int, clock: Clock) -> float:
    _synchronise(device)
    start = clock()
    for _ in range(calls):
        run()
    _synchronise(device)
    return (clock() - start) / calls


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
