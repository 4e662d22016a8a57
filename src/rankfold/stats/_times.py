"""Times of layers: measured at a few ranks and interpolated between them. Plain numbers, no model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rankfold._common import Rank, whole
from rankfold.errors import DataError

MOST_AXES = 2  # ranks with more entries are measured by their geometric mean


def coordinates(rank: Rank) -> tuple[float, ...]:
    """Return the position of a rank in a table of times: its one or two entries, or the geometric mean of more."""
    entries = rank if isinstance(rank, tuple) else (rank,)
    if len(entries) <= MOST_AXES:
        return tuple(map(float, entries))
    return (math.prod(entries) ** (1 / len(entries)),)


@dataclass(frozen=True)
class Curve:
    """Times of one method with fixed options at the measured ranks, relative to the dense layer.

    A larger rank is more work, so a smaller time for it is noise: `share` increases in every entry of the rank. It is
    midway between the largest time measured up to a rank and the smallest measured from that rank on. Between measured
    ranks it is (multi)linear; a rank that is not a multiple of the grain takes as long as the next multiple.

    Args:
        method: method of the layer.
        options: its options besides the rank.
        axes: the measured values of each entry of the rank, ascending.
        shares: times divided by the dense layer's, for every combination of these values; the last entry runs fastest.
        grain: ranks up to the next multiple of this take the same time, as measured.

    Raises:
        DataError: an axis does not ascend, the number of shares does not fit, or a share is not positive.

    Example:
        >>> curve = Curve("svd", {}, ((16, 32, 64),), (0.3, 0.5, 0.9), grain=16)
        >>> curve.share(40), curve.share(48)
        (0.7, 0.7)
    """

    method: str
    options: Mapping[str, Any]
    axes: tuple[tuple[float, ...], ...]
    shares: tuple[float, ...]
    grain: int = 1
    _smooth: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = [len(axis) for axis in self.axes]
        ascending = all(a < b for axis in self.axes for a, b in itertools.pairwise(axis))
        if not sizes or not ascending or min(a for axis in self.axes for a in axis) <= 0:
            raise DataError(f"measured ranks of {self.method!r} must be > 0 and ascending, got {self.axes!r:.80}")
        if len(self.shares) != math.prod(sizes):
            raise DataError(f"{len(self.shares)} times of {self.method!r} for {math.prod(sizes)} measured ranks")
        if not all(math.isfinite(share) and share > 0 for share in self.shares):
            raise DataError(f"times of {self.method!r} must be finite and > 0, got {self.shares!r:.80}")
        whole(f"the grain of {self.method!r}", self.grain, error=DataError)
        object.__setattr__(self, "_smooth", _monotone(np.array(self.shares, dtype=np.float64).reshape(sizes)))

    def share(self, rank: Rank) -> float:
        """Return the time at a rank divided by the dense layer's."""
        values = self._smooth
        for axis, x in zip(self.axes, coordinates(rank), strict=True):
            end = math.ceil(x / self.grain) * self.grain if self.grain > 1 else x
            values = _between(axis, min(end, max(x, axis[-1])), values)  # the last measured rank need not be a multiple
        return float(values)


def _monotone(values: Any) -> Any:
    """Return values that increase along every axis, midway between the monotone upper and lower bounds of the input."""
    upper, lower = values.copy(), values.copy()
    for axis in range(values.ndim):
        upper = np.maximum.accumulate(upper, axis=axis)
        lower = np.flip(np.minimum.accumulate(np.flip(lower, axis), axis=axis), axis)
    return (upper + lower) / 2


def _between(axis: Sequence[float], x: float, values: Any) -> Any:
    """Interpolate along the first dimension: constant below the first point, proportional beyond the last."""
    if x <= axis[0] or x >= axis[-1]:
        return values[0] if x <= axis[0] else values[-1] * (x / axis[-1])
    k = int(np.searchsorted(axis, x, side="right")) - 1
    t = (x - axis[k]) / (axis[k + 1] - axis[k])
    return values[k] + t * (values[k + 1] - values[k])


@dataclass(frozen=True)
class CallTime:
    """One kind of call of a layer.

    Attributes:
        dense: seconds per call of the dense layer.
        count: number of such calls.
        curves: times of the layers that could replace it.
    """

    dense: float
    count: int
    curves: tuple[Curve, ...]

    def curve(self, method: str, options: Mapping[str, Any]) -> Curve | None:
        """Return the times of a method with these options; None if they were not measured."""
        same = (curve for curve in self.curves if curve.method == method and dict(curve.options) == dict(options))
        return next(same, None)


@dataclass(frozen=True)
class LayerTime:
    """Times of all calls of one layer in one pass of the model."""

    calls: tuple[CallTime, ...]

    @property
    def dense(self) -> float:
        """Seconds of the dense layer in one pass."""
        return math.fsum(call.count * call.dense for call in self.calls)

    def grain(self, method: str, options: Mapping[str, Any]) -> int:
        """Return the step to which ranks should be rounded: within a step, lower ranks are no faster."""
        curves = [call.curve(method, options) for call in self.calls]
        return math.lcm(1, *(curve.grain for curve in curves if curve is not None))

    def seconds(self, method: str, options: Mapping[str, Any], rank: Rank) -> float | None:
        """Return the seconds that a choice takes in one pass; None if the method was not measured."""
        total = 0.0
        for call in self.calls:
            curve = call.curve(method, options)
            if curve is None:
                return None
            total += call.count * call.dense * curve.share(rank)
        return total

    def scaled(self, factor: float) -> LayerTime:
        """Return all times multiplied by a factor."""
        return LayerTime(tuple(CallTime(factor * call.dense, call.count, call.curves) for call in self.calls))


@dataclass(frozen=True)
class Setting:
    """Where times were measured; times from different settings are not compared.

    Attributes:
        runtime: "eager", "compile", "onnxruntime", or the name of a user's function.
        threads: threads per operation.
        device: type of the device, such as "cpu".
        hardware: what distinguishes the device from others of its type, and allocator settings in the environment.
        torch: version of torch.
        library: version of the runtime's library, if that is not torch.
    """

    runtime: str
    threads: int
    device: str
    hardware: str
    torch: str
    library: str = ""

    def __str__(self) -> str:
        """Return the setting in words."""
        return f"{self.runtime}, {self.device}, {self.threads} thread{'s' * (self.threads != 1)}"


@dataclass(frozen=True)
class LayerTimes:
    """The table of times used to plan for a budget on latency.

    Attributes:
        layers: the layers that were timed, by name.
        whole: seconds that the dense model takes.
        setting: where they were measured.
        left_out: why a layer was not timed, by name.

    Example:
        >>> curve = Curve("svd", {}, ((8, 16),), (0.4, 0.8))
        >>> layer = LayerTime((CallTime(0.002, 1, (curve,)),))
        >>> times = LayerTimes({"fc": layer}, 0.003, Setting("eager", 1, "cpu", "a processor", "2.6"))
        >>> round(times.layers["fc"].seconds("svd", {}, 12), 6)
        0.0012
    """

    layers: Mapping[str, LayerTime]
    whole: float
    setting: Setting
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the table: milliseconds at the measured ranks, per layer and method."""
        lines = [f"whole model: {1e3 * self.whole:.3f} ms ({self.setting})"]
        for name, layer in self.layers.items():
            lines.append(f"{name or '(model)'}: dense {1e3 * layer.dense:.3f} ms")
            lines += _lines(layer)
        return "\n".join([*lines, *(f"{name or '(model)'}: {why}" for name, why in self.left_out.items())])


def _lines(layer: LayerTime) -> Iterable[str]:
    for call in layer.calls:
        for curve in call.curves:
            options = ", ".join(f"{key}={value}" for key, value in curve.options.items())
            points = zip(itertools.product(*curve.axes), curve.shares, strict=True)
            times = ", ".join(f"{'x'.join(f'{r:g}' for r in rank)}: {1e3 * call.dense * s:.3f}" for rank, s in points)
            grain = f", in steps of {curve.grain}" if curve.grain > 1 else ""
            calls = f", {call.count} calls" if call.count > 1 else ""
            yield f"  {curve.method}{f' ({options})' if options else ''}: {times}{grain}{calls}"
