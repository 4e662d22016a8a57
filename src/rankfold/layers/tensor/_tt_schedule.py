"""What a scheduled contraction costs for a number of rows, in inference or training: MACs, bytes, calls, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from rankfold._common import real
from rankfold.errors import LayerError
from rankfold.layers.tensor._tt_order import BATCHES, Chain, Pair, Sweep, bucket, schedule_sweep

Schedule = TypeVar("Schedule")


@dataclass(frozen=True)
class TTSchedule:
    """How a tensor-train layer is computed for a number of rows.

    Attributes:
        rows: rows of the input; of a convolution, output positions, batch included.
        training: whether a backward pass follows, with gradients of the cores and of the input.
        groups: (start, stop) of the cores that are merged before they are applied, from left to right.
        from_left: which end the contraction starts at.
        chunk: rows (of a convolution, images) taken at a time.
        macs: multiply-adds of a forward pass.
        backward_macs: multiply-adds of the backward pass, recomputing included; 0 in inference.
        moved: bytes that the products read and write.
        launches: matrix products and convolutions launched, backward included.
        peak: bytes of the largest tensor made in the forward pass, other than the output and a copy of the input.
        saved: bytes of intermediates kept for backward, besides the input, the cores and the merged cores.
        rebuilt: whether the dense weight is rebuilt.
        recomputed: whether backward recomputes the intermediates.
    """

    rows: int
    training: bool
    groups: tuple[Pair, ...]
    from_left: bool
    chunk: int
    macs: int
    backward_macs: int
    moved: int
    launches: int
    peak: int
    saved: int
    rebuilt: bool
    recomputed: bool

    @property
    def order(self) -> str:
        """The order in words: `cores (1 2)(3 4) from the right`."""
        if self.rebuilt:
            return "the dense weight rebuilt"
        merged = "".join(f"({' '.join(str(k + 1) for k in range(*group))})" for group in self.groups)
        return f"cores {merged} from the {'left' if self.from_left else 'right'}"

    def __str__(self) -> str:
        """Return the order and its figures, one line each."""
        chunks = "at once" if self.chunk >= self.rows else f"{self.chunk} at a time"
        backward = f" + {self.backward_macs:,} backward" if self.training else ""
        kept = f", {_bytes(self.saved)} kept for backward" if self.training else ""
        again = ", recomputed in backward" if self.recomputed else ""
        return (
            f"{self.order}: {self.rows} rows {chunks}, {'training' if self.training else 'inference'}\n"
            f"MACs {self.macs:,}{backward} in {self.launches} products, {_bytes(self.moved)} moved\n"
            f"largest intermediate {_bytes(self.peak)}{kept}{again}"
        )


def _bytes(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power:
            return f"{count / 2**power:.3g} {unit}"
    return f"{count} B"


def checked_recompute(owner: str, recompute: object) -> float | None:
    """Return the option `recompute`, or raise a `LayerError`."""
    if recompute is None:
        return None
    why = (
        "; it is how many times input and output the intermediates may take before they are computed again in "
        "backward; None keeps them"
    )
    return real(f"{owner}: recompute", recompute, error=LayerError, why=why)


def sweeps(chain: Chain, recompute: float | None) -> dict[bool, tuple[Sweep, ...]]:
    """Return the sweeps of a matrix for each of `BATCHES`, in inference (False) and training (True)."""
    ends = math.prod(chain.in_shape) + math.prod(chain.out_shape)
    training = [schedule_sweep(chain, rows, training=True) for rows in BATCHES]
    if recompute is not None:
        training = [replace(sweep, recompute=sweep.kept(chain) > recompute * ends) for sweep in training]
    return {False: tuple(schedule_sweep(chain, rows) for rows in BATCHES), True: tuple(training)}


def for_batches(make: Callable[[int, bool], Schedule]) -> dict[bool, tuple[Schedule, ...]]:
    """Return `make(rows, training)` for each of `BATCHES`, in inference (False) and training (True)."""
    return {training: tuple(make(rows, training) for rows in BATCHES) for training in (False, True)}


def pick(schedules: Mapping[bool, Sequence[Schedule]], rows: int | torch.SymInt, training: bool) -> Schedule:
    """Return the schedule made for a number of rows."""
    return schedules[training][bucket(rows)]


def wants_gradients(cores: Sequence[Tensor]) -> bool:
    """Tell whether a computation with the cores will be followed by a backward pass."""
    return torch.is_grad_enabled() and any([core.requires_grad for core in cores])


@lru_cache(maxsize=4096)
def describe(chain: Chain, sweep: Sweep, rows: int, training: bool, itemsize: int, columns: int = 1) -> TTSchedule:
    """Return the figures of a sweep for a number of rows, each carrying a number of columns."""
    steps, chunk = sweep.steps(chain, columns), min(sweep.chunk or rows, rows)
    chunks = -(-rows // chunk) if chunk else 0
    merged = [chain.core(*group) for group in sweep.groups]
    joined = [made for group in sweep.groups for made in chain.merge(*group).made]
    states = [step.given for step in steps[:-1]]
    forward = sum(rows * (step.taken + step.given) for step in steps) + chunks * sum(merged) + 3 * sum(joined)
    scattered = 2 * rows * sum(step.scattered for step in steps)
    recomputed = sweep.recompute and training
    passes = (3 + recomputed) if training else 1
    swept = rows * columns * sweep.row_macs
    return TTSchedule(
        rows=rows,
        training=training,
        groups=sweep.groups,
        from_left=sweep.from_left,
        chunk=chunk,
        macs=sweep.fixed_macs + swept,
        backward_macs=2 * sweep.fixed_macs + (passes - 1) * swept if training else 0,
        moved=itemsize * (passes * forward + (scattered if training else 0)),
        launches=passes * chunks * len(steps) + (3 if training else 1) * len(joined),
        peak=itemsize * max([*merged, *joined, *(chunk * state for state in states)]),
        saved=0 if recomputed or not training else itemsize * rows * sum(states),
        rebuilt=len(sweep.groups) == 1,
        recomputed=recomputed,
    )
