"""How fast is a sweep of CP, against tensorly's and against the two matrix products it cannot do without?

    OMP_NUM_THREADS=1 python benchmarks/how_fast_is_cp.py

Both libraries get the same tensor in the same dtype, the same first factors and the same number of sweeps, each
with the error evaluated after every sweep, no early stop and no correction (tensorly has none). Rounds are
interleaved in one process on one thread. A time per sweep is that of a whole call divided by its sweeps, in
processor time (on one thread that is what a clock shows on an idle machine, and other programs disturb it less);
the median over rounds is shown. Errors are those of the returned factors, measured in float64. Results are kept in
benchmarks/results/how_fast_is_cp.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from rankfold.decompose import CP, cp

RESULTS = Path(__file__).parent / "results" / "how_fast_is_cp.json"
CASES = [  # shape, rank, sweeps per call, rounds
    ((64, 64, 9), 32, 50, 7),
    ((64, 64, 3, 3), 32, 50, 7),
    ((256, 256, 9), 128, 20, 5),
    ((512, 512, 9), 256, 5, 3),
]
TARGETS = {(256, 256, 9): 8.0, (512, 512, 9): 6.0}
FLOOR_TARGET = 2.5
COLUMNS = ("tensor", "rank", "dtype", "tensorly ms", "rankfold ms", "times faster", "products ms", "sweep / products")


def kernel_like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a random tensor whose two channel modes have slowly decaying spectra, as trained kernels do."""
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mode in (0, 1):
        scale = torch.arange(1, shape[mode] + 1, dtype=torch.float64).rsqrt()
        tensor = tensor * scale.reshape([-1 if k == mode else 1 for k in range(len(shape))])
    return tensor.to(dtype)


def first_factors(shape: tuple[int, ...], rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(dim, rank, generator=generator, dtype=torch.float64).to(dtype) for dim in shape)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def error(tensor: Tensor, factors: tuple[Tensor, ...]) -> float:
    difference = CP(tuple(factor.double() for factor in factors)).to_dense() - tensor.double()
    return float(difference.norm() / tensor.double().norm())


def measure(shape: tuple[int, ...], rank: int, sweeps: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    tensor, factors = kernel_like(shape, dtype), first_factors(shape, rank, dtype)

    def ours() -> tuple[Tensor, ...]:
        start = CP(factors)
        options = {"starts": (), "tolerance": 0.0, "max_degeneracy": float("inf"), "dtype": dtype}
        result = cp(tensor, rank, initial=start, iterations=sweeps, **options)
        if result.iterations != sweeps:
            raise RuntimeError(f"{shape}: stopped after {result.iterations} of {sweeps} sweeps")
        return result.factors

    def theirs() -> tuple[Tensor, ...]:
        start = CPTensor((None, [factor.clone() for factor in factors]))
        result, errors = parafac(tensor, rank, n_iter_max=sweeps, init=start, tol=1e-30, return_errors=True)
        if len(errors) != sweeps:
            raise RuntimeError(f"{shape}: tensorly stopped after {len(errors)} of {sweeps} sweeps")
        return (result.factors[0] * result.weights, *result.factors[1:])

    half = tensor.reshape(shape[0], -1)
    long, short = torch.randn(rank, half.shape[1], dtype=dtype), torch.randn(rank, shape[0], dtype=dtype)

    def two_products() -> None:
        for _ in range(sweeps):
            torch.mm(long, half.T)
            torch.mm(short, half)

    calls = {"rankfold": ours, "tensorly": theirs, "products": two_products}
    errors = {"rankfold": error(tensor, ours()), "tensorly": error(tensor, theirs())}
    two_products()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(1e3 * seconds(call) / sweeps)
    ms = {name: statistics.median(values) for name, values in taken.items()}
    ratios = [b / a for a, b in zip(taken["rankfold"], taken["tensorly"], strict=True)]
    over = [a / b for a, b in zip(taken["rankfold"], taken["products"], strict=True)]
    return {
        "tensor": "x".join(map(str, shape)),
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "ms_per_sweep": ms,
        "times_faster": statistics.median(ratios),
        "times_faster_range": [min(ratios), max(ratios)],
        "sweep_over_products": statistics.median(over),
        "sweep_over_products_range": [min(over), max(over)],
        "sweeps": sweeps,
        "rounds": rounds,
        "error": errors,
        "targets": {
            "times_faster": TARGETS.get(shape),
            "sweep_over_products": FLOOR_TARGET if shape in TARGETS else None,
        },
    }


def row(result: dict[str, Any]) -> str:
    ms, targets = result["ms_per_sweep"], result["targets"]

    def against(name: str, sign: str) -> str:
        low, high = result[f"{name}_range"]
        target = f", target {sign} {targets[name]:g}" if targets[name] else ""
        return f"{result[name]:.2f} ({low:.2f} to {high:.2f}{target})"

    cells = [
        result["tensor"],
        str(result["rank"]),
        result["dtype"],
        f"{ms['tensorly']:.2f}",
        f"{ms['rankfold']:.2f}",
        against("times_faster", ">="),
        f"{ms['products']:.2f}",
        against("sweep_over_products", "<="),
        f"{result['error']['tensorly']:.8f}",
        f"{result['error']['rankfold']:.8f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: list[dict[str, Any]]) -> str:
    names = [*COLUMNS, "error tensorly", "error rankfold"]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*head, *map(row, results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds, and nothing is written")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    results = []
    for dtype in (torch.float32, torch.float64):
        for shape, rank, sweeps, rounds in CASES:
            results.append(measure(shape, rank, sweeps, 3 if quick else rounds, dtype))
            print(row(results[-1]), flush=True)
    print("\n" + table(results))
    if not quick:
        RESULTS.parent.mkdir(exist_ok=True)
        versions = {"torch": torch.__version__, "tensorly": tensorly.__version__}
        RESULTS.write_text(json.dumps({"versions": versions, "threads": 1, "results": results}, indent=1) + "\n")
        caption = f"Processor ms per sweep, median (range); torch {versions['torch']}, tensorly {versions['tensorly']}."
        RESULTS.with_suffix(".md").write_text(f"# How fast is CP?\n\n{caption}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
