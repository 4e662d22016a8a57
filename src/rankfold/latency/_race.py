"""How long do models take? Timed side by side, so that what disturbs one disturbs all."""

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
CLOSE = 1.15  # a dense model may be so much slower in channels_last: compressed ones gain more from it


@dataclass(frozen=True)
class Timing:
    """How latencies are measured for a budget on latency.

    Args:
        runtime: "eager", "compile", "onnxruntime", or a function `(model, example) -> callable`.
        threads: threads per operation; by default what torch is set to.
        seconds: after so long no further layer is timed; those left stay dense.
        cache: whether times of layers are kept in the user's cache folder; a path names another folder. Times in a
            function of the user's are not kept.

    Raises:
        DataError: an unknown runtime, or threads or seconds that are not positive.

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
    """Times of one model in one comparison; all models of the comparison ran in every round.

    Attributes:
        seconds: Seconds per call, one sample per round.
        ratios: Time of the comparison's first model divided by this model's, one per round: above 1 is faster.
        calls: Calls averaged in one sample.
        threads: Threads that an operation could use.
        device: Type of the device: "cpu", "cuda", ….
        runtime: Name of the runtime.
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
        """Return the median over the rounds of the speed-up over the comparison's first model."""
        return statistics.median(self.ratios)

    @property
    def ratio_quartiles(self) -> tuple[float, float]:
        """Return the lower and the upper quartile of the speed-up."""
        return _quartiles(self.ratios)


Clock: TypeAlias = Callable[[], float]


def steady_clock(model: nn.Module, threads: int | None = None) -> Clock:
    """Return the clock for measurements that other programs should not disturb.

    On one thread of a processor that is the processor time of this process, which is what a clock on the wall shows on
    an idle machine; where more work together, it is the time on the wall.
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

    Every round takes one sample of every model, in an order that alternates, so that a change of load or
    clock speed during the measurement falls on all of them; a speed-up is the median of the ratios within
    rounds and never a quotient of two medians. Models run in eval mode under `torch.inference_mode`, each
    on its own device; modes and thread count are restored. Compare ratios, not milliseconds, between runs.

    Args:
        models: Name to model; the first one is what the ratios compare with.
        example: A tensor, a tuple of arguments or a dict of keyword arguments.
        runtime: "eager", "compile", "onnxruntime", or a function `(model, example) -> callable`.
        threads: Threads per operation; by default what torch is set to.
        rounds: Rounds to measure.
        seconds: Time after which no further round starts, once there are five.
        clock: what is read before and after a sample, in seconds.

    Returns:
        Name to `Latency`, in the order given.

    Raises:
        DataError: For no models, an unknown runtime, or threads, rounds or seconds that are not positive.

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

    That is, unless the contiguous model is faster by more than 15 %: compressed layers gain more from
    `channels_last` than dense ones. A model without four-dimensional weights has one format only and is not timed.
    Convolutions of a model in `channels_last` give their results in it, whatever the format of the example. Weights
    that a compressed model takes from such a model are in it too, so choose the format before compressing.

    Args:
        model: any module; copies of it are timed.
        example: as in `time_models`.
        runtime: as in `time_models`.
        threads: as in `time_models`.

    Returns:
        `torch.contiguous_format` or `torch.channels_last`, for `model.to(memory_format=…)`.

    Raises:
        DataError: as `time_models` does.

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
    """Let operations use that many threads for the length of a block; None changes nothing."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if threads is None else threads)
        yield
    finally:
        torch.set_num_threads(before)


def _calls_per_sample(run: Run, device: torch.device, clock: Clock) -> int:
    """Warm up (caches, compilation, clock) and return how many calls make a sample long enough."""
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
