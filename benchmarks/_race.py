"""Contestants that compute the same function: checked, then their memory and time side by side.

A contestant is a forward pass and the tensors that it trains. In training a step is the forward pass and the backward
pass down to the input, gradients freshly allocated each time as after `zero_grad`. All contestants of a race are timed
in every round, in an order drawn anew so that none always follows one that has emptied the caches; those that are near
the leader with as many calls each, so that the first, cold one weighs the same; those that the first call shows to be
far behind it in the first rounds only.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _memory import peak_bytes
from torch import Tensor, nn

SHORTEST = 4e-3
"""Seconds that one measurement lasts at least: shorter calls are repeated within it."""

LONG = 1.0
"""Seconds of a first call from which on a contestant far behind is not run again."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """A way to compute a layer."""

    name: str
    forward: Forward
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, name: str, layer: nn.Module) -> Contestant:
        """Make a contestant of a layer."""
        return cls(name, layer, tuple(layer.parameters()))


@dataclass(frozen=True)
class Result:
    """Seconds of every round, and the peak in bytes."""

    seconds: tuple[float, ...]
    peak: int = 0

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles over the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def step(contestant: Contestant, x: Tensor, upstream: Tensor | None) -> Callable[[], Any]:
    """Return one call: the forward pass, and with an upstream gradient the backward pass as well."""
    if upstream is None:
        return lambda: contestant.forward(x)
    leaf = x.detach().requires_grad_(x.is_floating_point())

    def train() -> None:
        contestant.forward(leaf).backward(upstream)
        leaf.grad = None
        for weight in contestant.weights:
            weight.grad = None

    return train


def check(contestants: Iterable[Contestant], truth: Contestant, x: Tensor, *, rows: int = 4) -> None:
    """Raise where a contestant's output or its gradient with respect to the input is not that of the truth."""
    x = x[:rows]
    wanted = _values(truth, x)
    for contestant in contestants:
        for what, value, expected in zip(("output", "gradient"), _values(contestant, x), wanted, strict=False):
            error = float((value - expected).norm() / expected.norm())
            if not error < 1e-4:
                raise RuntimeError(f"{contestant.name}: its {what} is off by {error:.2g}")


def _values(contestant: Contestant, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.detach().requires_grad_(x.is_floating_point())
    output = contestant.forward(leaf)
    if not x.is_floating_point():
        return (output.detach(),)
    seed = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    return output.detach(), torch.autograd.grad(output, leaf, seed)[0]


def _clock(run: Callable[[], Any], repeats: int) -> float:
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def once(contestant: Contestant, x: Tensor, upstream: Tensor | None, *, limit: float) -> float:
    """Return about the time of a call: of a first one that clearly exceeds the limit, else the least of more."""
    run = step(contestant, x, upstream)
    with torch.inference_mode(upstream is None):
        first = _clock(run, 1)
        if first > 1.5 * limit and first > SHORTEST:
            return first
        repeats = max(1, min(20, math.ceil(2e-3 / max(first, 1e-6))))
        return min(_clock(run, repeats) for _ in range(1 if first > 0.02 else 2))


def first_call(contestant: Contestant, x: Tensor, upstream: Tensor | None) -> tuple[float, int]:
    """Return about the seconds of a call, and its peak in bytes."""
    run, taken = step(contestant, x, upstream), []
    with torch.inference_mode(upstream is None):
        peak = peak_bytes(lambda: taken.append(_clock(run, 1)))
    return taken[0], peak


def _repeats(seconds: float) -> int:
    """Return how many calls of about these seconds make a measurement."""
    return max(1, min(200, math.ceil(SHORTEST / seconds)))


def race(
    contestants: Sequence[Contestant],
    x: Tensor,
    upstream: Tensor | None,
    *,
    seconds: float,
    known: Mapping[str, float],
    hopeless: float = 4.0,
    rounds: tuple[int, int] = (3, 25),
) -> dict[str, tuple[float, ...]]:
    """Return the seconds of every round of all contestants.

    Args:
        contestants: those that take part.
        x: the input.
        upstream: the gradient of the output, or nothing for inference.
        seconds: about how long the timing of all that are near the leader may take.
        known: the seconds of a first call, where there has been one.
        hopeless: how many times slower than the fastest a contestant may be and still run in every round.
        rounds: the least and the most rounds.
    """
    runs = {contestant.name: step(contestant, x, upstream) for contestant in contestants}
    with torch.inference_mode(upstream is None):
        gc.collect()
        crude = {}
        for name, run in runs.items():
            slow = known.get(name, 0.0) > LONG
            crude[name] = known[name] if slow else _clock(run, 1)
        best = min(crude.values())
        near = {name for name in runs if crude[name] < hopeless * best}
        repeats = {name: _repeats(best if name in near else crude[name]) for name in runs}
        one = sum(repeats[name] * crude[name] for name in near)
        count = max(rounds[0], min(rounds[1], int(seconds / one)))
        wanted = {name: count if name in near else 2 if crude[name] < LONG else 0 for name in runs}
        measured: dict[str, list[float]] = {name: [] for name in runs}
        gc.disable()
        orders = random.Random(0)
        for number in range(count):
            for name in orders.sample(list(runs), len(runs)):
                if number < wanted[name]:
                    measured[name].append(_clock(runs[name], repeats[name]))
        gc.enable()
    return {name: tuple(measured[name]) or (crude[name],) for name in runs}
