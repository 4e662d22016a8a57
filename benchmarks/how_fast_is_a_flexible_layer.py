"""How fast is a flexible layer, against the Linear-ReLU-Linear of the same rank?

    OMP_NUM_THREADS=1 python benchmarks/how_fast_is_a_flexible_layer.py

Forward passes without gradients and training steps (forward and backward), float32. The flexible layer has the same two
matrices; what it adds are the activations of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from _timing import compare, few, options, ratio, verdict, write
from torch import Tensor, nn

from rankfold.layers import FlexibleLinear

SHAPES = (  # in, rank, out, batch
    (512, 64, 512, 256),
    (1568, 64, 10, 256),
    (4096, 256, 4096, 128),
    (384, 128, 384, 2048),
)
BASES = {
    "piecewise, 8": {"basis": "piecewise", "size": 8},
    "legendre, 4": {"basis": "legendre", "size": 4},
    "spline, 8": {"basis": "spline", "size": 8},
}
TARGET = 1.5


def forward(model: nn.Module, x: Tensor, calls: int) -> Callable[[], None]:
    """Return a function that applies a model several times."""

    def run() -> None:
        with torch.no_grad():
            for _ in range(calls):
                model(x)

    return run


def step(model: nn.Module, x: Tensor, calls: int) -> Callable[[], None]:
    """Return a function that computes gradients several times."""

    def run() -> None:
        for _ in range(calls):
            model.zero_grad(set_to_none=True)
            model(x).sum().backward()

    return run


def measure(shape: tuple[int, int, int, int], rounds: int, calls: int) -> list[dict[str, Any]]:
    """Return a row per basis and pass."""
    into, rank, out, batch = shape
    x = torch.randn(batch, into)
    plain = nn.Sequential(nn.Linear(into, rank), nn.ReLU(), nn.Linear(rank, out))
    layers = {name: FlexibleLinear(into, out, rank=rank, **options) for name, options in BASES.items()}
    rows = []
    for what, job in {"forward": forward, "step": step}.items():
        contestants = {name: job(model, x, calls) for name, model in {"plain": plain, **layers}.items()}
        times = compare(contestants, rounds=rounds, warmup=2, per=calls)
        for name in layers:
            reached = ratio(times[name], times["plain"])
            target = TARGET if what == "forward" and name.startswith("piecewise") else None
            rows.append(
                {
                    "shape (in, rank, out, batch)": str(shape),
                    "basis": name,
                    "pass": what,
                    "Linear-ReLU-Linear": times["plain"],
                    "flexible": times[name],
                    "ratio": reached,
                    "target": verdict(reached, target, most=True),
                }
            )
    return rows


def main() -> None:
    """Measure every case and write the table."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [row for shape in few(SHAPES) for row in measure(shape, rounds, calls=5)]
    title = "How fast is a flexible layer, against the Linear-ReLU-Linear of the same rank?"
    write("how_fast_is_a_flexible_layer", rows, title=title, dtype="float32", time="per call")


if __name__ == "__main__":
    main()
