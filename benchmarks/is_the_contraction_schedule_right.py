"""Is the order in which a tensor-train layer contracts its cores the fastest one?

    OMP_NUM_THREADS=1 python benchmarks/is_the_contraction_schedule_right.py

Every order is timed in the layer itself: all groupings of neighbouring cores, one group (the dense weight rebuilt)
among them, from the left and from the right; a forward pass without gradients, and forward plus backward with the
gradients of all cores and of the input. Orders of more than three times the planned one's multiply-adds are left out,
the others are timed once, and the fastest five and the planned one again in turn. `planned / best` is the median over
the rounds of the ratio of the two; with the fastest order picked from the same rounds, noise makes it larger, not
smaller. Steps of more than a third of a second are measured in three rounds.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _timing import compare, few, options, ratio, verdict, write

from rankfold.layers import TTLinear
from rankfold.layers.tensor._tt_order import BATCHES, LARGEST_MERGE, Chain, Sweep, order_of
from rankfold.layers.tensor._tt_schedule import describe

SQUARE = {"in_shape": (8, 8, 8, 8), "out_shape": (8, 8, 8, 8)}
FC6 = {"in_shape": (2, 7, 8, 8, 7, 4), "out_shape": (4, 4, 4, 4, 4, 4)}
LAYERS = [
    *(("4096 x 4096, 8^4", (4096, 4096), SQUARE, rank, (1, 32, 1024)) for rank in (8, 16, 32)),
    *(("25088 x 4096 (fc6)", (25088, 4096), FC6, rank, (1, 32, 128)) for rank in (1, 2, 4)),
]
MOST_MACS, FINALISTS, TARGET = 3, 5, 1.15
SHORTEST, LONG = 0.02, 0.33  # seconds of one measurement, and of one that is repeated less


def orders(chain: Chain, training: bool) -> Iterator[Sweep]:
    """Yield all groupings that may be merged, from both ends."""
    order = len(chain.out_shape)
    for cuts in itertools.product((False, True), repeat=order - 1):
        bonds = [0, *(k + 1 for k, cut in enumerate(cuts) if cut), order]
        groups = tuple(itertools.pairwise(bonds))
        if all(stop - start == 1 or chain.core(start, stop) <= LARGEST_MERGE for start, stop in groups):
            for from_left in (True, False) if len(groups) > 1 else (False,):
                yield order_of(chain, groups, from_left, training=training)


def step(layer: TTLinear, x: torch.Tensor, sweep: Sweep, seen: torch.Tensor | None) -> Callable[[], None]:
    """Return a call of the layer in a given order, with its backward pass where `seen` is the output's gradient."""

    def run() -> None:
        layer._schedules = {mode: (sweep,) * len(BATCHES) for mode in (False, True)}
        if seen is None:
            with torch.no_grad():
                layer(x)
        else:
            torch.autograd.grad(layer(x), [x, *layer.parameters()], seen)

    return run


def repeated(run: Callable[[], None], times: int) -> Callable[[], None]:
    return lambda: [run() for _ in range(times)]  # type: ignore[return-value,func-returns-value]


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def words(sweep: Sweep, chain: Chain) -> str:
    return describe(chain, sweep, 1, False, 4).order


def row(layer: TTLinear, batch: int, training: bool, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, layer.in_features, generator=generator).requires_grad_(training)
    seen = torch.randn(batch, layer.out_features, generator=generator) if training else None
    chain, schedule = layer._chain, layer.schedule(batch, training)
    everything = {(sweep.groups, sweep.from_left): sweep for sweep in orders(chain, training)}
    planned = (schedule.groups, schedule.from_left) if len(schedule.groups) > 1 else (schedule.groups, False)
    limit = MOST_MACS * everything[planned].macs(batch)
    runs = {key: step(layer, x, sweep, seen) for key, sweep in everything.items() if sweep.macs(batch) <= limit}
    runs[planned]()
    once = {key: seconds(run) for key, run in runs.items()}
    if min(once.values()) < SHORTEST:
        once = {key: min(once[key], seconds(run)) for key, run in runs.items()}
    finalists = {*sorted(once, key=once.__getitem__)[:FINALISTS], planned}
    per = max(1, int(SHORTEST / once[planned]))
    rounds = min(rounds, 3) if once[planned] > LONG else rounds
    times = compare({str(key): repeated(runs[key], per) for key in finalists}, rounds=rounds, warmup=1, per=per)
    best = min(finalists, key=lambda key: times[str(key)].median)
    reached = ratio(times[str(planned)], times[str(best)])
    return {
        "mode": "training" if training else "inference",
        "batch": batch,
        "planned": words(everything[planned], chain),
        "planned time": times[str(planned)],
        "best": words(everything[best], chain),
        "best time": times[str(best)],
        "planned / best": reached,
        "target": verdict(reached, TARGET, most=True),
        "orders timed": f"{len(runs)} of {len(everything)}",
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    for name, sizes, shapes, rank, batches in few(LAYERS):
        layer = TTLinear(*sizes, bias=False, rank=rank, **shapes)
        cases = itertools.product((False, True), batches)
        for training, batch in cases:
            found = row(TTLinear(*sizes, bias=False, rank=rank, **shapes), batch, training, rounds)
            rows.append({"layer": name, "rank": layer.rank, **found})
    title = "Is the order in which a tensor-train layer contracts its cores the fastest one?"
    write("is_the_contraction_schedule_right", rows, title=title, dtype="float32", rounds=rounds)


if __name__ == "__main__":
    main()
