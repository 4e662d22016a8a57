"""One training step of the wide network, measured in a process of its own: memory, time, multiply-adds."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reproduce.harness import Row
from reproduce.training import params
from reproduce.wide_net.model import CLASSES, IN_FEATURES, wide

ROUNDS = 7
MATMUL = 2_048  # rows and columns of the dense product that tells what the processor can do


def measured(rank: int, batch: int) -> Row:
    """Return the row of a rank, from a fresh process, whose peak memory is that of training steps alone."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(_measured, (rank, batch))


def _measured(rank: int, batch: int) -> Row:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    before = _resident_peak()
    model, x, labels = wide(rank), torch.randn(batch, IN_FEATURES), torch.randint(0, CLASSES, (batch,))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    for _ in range(2):  # the second step has all that a step ever allocates
        step()
    peak = _resident_peak()
    with FlopCounterMode(display=False) as counter:
        step()
    square = torch.randn(MATMUL, MATMUL)
    steps: list[float] = []
    products: list[float] = []
    for _ in range(ROUNDS):
        steps.append(_seconds(step))
        products.append(_seconds(lambda: square @ square))
    macs = counter.get_total_flops() // 2
    return {
        "kind": "step",
        "rank": rank,
        "batch": batch,
        "params": params(model),
        "train_params": {name: params(model.get_submodule(name)) for name in ("tt1", "tt2")},
        "peak_bytes": peak,
        "peak_bytes_before": before,
        "macs": macs,
        "seconds": steps,
        "gflops": 2 * macs / statistics.median(steps) / 1e9,
        "matmul_seconds": products,
        "matmul_gflops": 2 * MATMUL**3 / statistics.median(products) / 1e9,
        "tail_seconds": _tail_seconds(model, batch),
    }


def _tail_seconds(model: nn.Sequential, batch: int) -> float:
    """Return the median time of forward and backward of what stands between the trains, which does no products."""
    between = nn.Sequential(model.norm1, model.relu1)
    x = torch.randn(batch, model.norm1.num_features, requires_grad=True)
    gradient = torch.randn_like(x)

    def both() -> None:
        between(x).backward(gradient)
        x.grad = None

    both()
    return statistics.median(_seconds(both) for _ in range(ROUNDS))


def _seconds(call: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _resident_peak() -> int:
    """Return the most bytes that this process has held in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
