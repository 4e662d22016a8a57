"""The first fully connected layer of VGG-16 as a tensor train: how much smaller, how fast (Novikov et al. 2015).

python -m reproduce.vgg_fc6.run            # what results.json lacks, then table.md and plot.png
python -m reproduce.vgg_fc6.run --redraw   # table.md and plot.png from results.json
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import rankfold as rf
from reproduce import harness
from reproduce.harness import Row
from reproduce.vgg_fc6 import drawing

IN_SHAPE, OUT_SHAPE = (2, 7, 8, 8, 7, 4), (4, 4, 4, 4, 4, 4)
IN_FEATURES, OUT_FEATURES = 25_088, 4_096
RANKS = (1, 2, 4)
BATCHES = (1, 32, 100)
ROUNDS = 11
LEAST_SECONDS = 0.05  # of one sample, far above the clock's resolution
SEED = 0

Step = Callable[[], object]


def layers() -> dict[str, nn.Module]:
    """Return the dense layer and the tensor trains, without bias as the parameters are counted."""
    torch.manual_seed(SEED)
    trains = {
        f"rank {rank}": rf.layers.TTLinear(
            IN_FEATURES, OUT_FEATURES, bias=False, rank=rank, in_shape=IN_SHAPE, out_shape=OUT_SHAPE
        )
        for rank in RANKS
    }
    return {"dense": nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False), **trains}


def forward(layer: nn.Module, x: Tensor) -> None:
    """Take the output for a batch, as in use."""
    with torch.inference_mode():
        layer(x)


def training(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Take the gradients of all weights and of the input, as within a network."""
    layer(x).backward(gradient)
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


def measured(layer_of: dict[str, nn.Module], batch: int) -> list[Row]:
    """Return the rows of one batch size."""
    x = torch.randn(batch, IN_FEATURES)
    steps = {
        "forward": {name: partial(forward, layer, x) for name, layer in layer_of.items()},
        "training": {
            name: partial(training, layer, x.clone().requires_grad_(), torch.randn(batch, OUT_FEATURES))
            for name, layer in layer_of.items()
        },
    }
    rows: list[Row] = [
        {"layer": name, "batch": batch, "params": sum(p.numel() for p in layer.parameters()), "macs": macs(layer, x)}
        for name, layer in layer_of.items()
    ]
    for kind, contestants in steps.items():
        samples = timed(contestants)
        for row in rows:
            seconds = samples[row["layer"]]
            ratios = [dense / own for dense, own in zip(samples["dense"], seconds, strict=True)]
            row[kind] = {
                "seconds": seconds,
                "faster": statistics.median(ratios),
                "peak_bytes": peak_bytes(contestants[row["layer"]]),
            }
    return rows


def macs(layer: nn.Module, x: Tensor) -> int:
    """Return the multiply-adds of a forward pass, counted by torch on the products that run."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    return counter.get_total_flops() // 2


def timed(contestants: dict[str, Step]) -> dict[str, list[float]]:
    """Return processor seconds a call, a sample a round: all contestants take turns, in a changing order."""
    calls = {name: calls_per_sample(step) for name, step in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(ROUNDS):
        for name in order:
            gc.collect()
            start = time.process_time()
            for _ in range(calls[name]):
                contestants[name]()
            seconds[name].append((time.process_time() - start) / calls[name])
        order.reverse()
    return seconds


def calls_per_sample(step: Step) -> int:
    """Return how many calls take long enough to be timed; the first one, which allocates, does not count."""
    step()
    start = time.process_time()
    step()
    return max(1, round(LEAST_SECONDS / max(time.process_time() - start, 1e-6)))


def peak_bytes(step: Step) -> int:
    """Return the most bytes held at one time of those allocated by a call: torch's profiler sees each allocation."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        seen.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Measure every batch size that is missing, all layers together, on one thread."""
    torch.set_num_threads(1)
    layer_of = layers()
    for batch in BATCHES:
        if any(f"{name} {batch}" not in rows for name in layer_of):
            for row in measured(layer_of, batch):
                keep(f"{row['layer']} {batch}", row)


QUICK = {"RANKS": (2,), "BATCHES": (1,), "ROUNDS": 2}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
