"""How fast is a sweep of CP, against tensorly's and against the two matrix products it cannot do without?

    OMP_NUM_THREADS=1 python benchmarks/how_fast_is_cp.py

Both libraries get the same tensor in the same dtype, the same first factors and the same number of sweeps, each
with the error evaluated after every sweep, no early stop and no correction (tensorly has none). A time per sweep is
that of a whole call divided by its sweeps. Errors are those of the returned factors, measured in float64.
"""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import tensorly
import torch
from _timing import compare, few, options, ratio, verdict, write
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor

from rankfold.decompose import CP, cp

CASES = (  # shape, rank, sweeps per call, rounds
    ((64, 64, 9), 32, 50, 7),
    ((64, 64, 3, 3), 32, 50, 7),
    ((256, 256, 9), 128, 20, 9),
    ((512, 512, 9), 256, 5, 5),
)
TARGETS = {(256, 256, 9): 8.0, (512, 512, 9): 6.0}
FLOOR_TARGET = 2.5


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


def error(tensor: Tensor, factors: tuple[Tensor, ...]) -> float:
    difference = CP(tuple(factor.double() for factor in factors)).to_dense() - tensor.double()
    return float(difference.norm() / tensor.double().norm())


def measure(shape: tuple[int, ...], rank: int, sweeps: int, rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row of the table."""
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

    times = compare({"tensorly": theirs, "rankfold": ours, "products": two_products}, rounds=rounds, per=sweeps)
    faster, over = ratio(times["tensorly"], times["rankfold"]), ratio(times["rankfold"], times["products"])
    target = TARGETS.get(shape)
    return {
        "tensor": "x".join(map(str, shape)),
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        **times,
        "times faster": faster,
        "target ": verdict(faster, target),
        "sweep / products": over,
        "target": verdict(over, target and FLOOR_TARGET, most=True),
        "error tensorly": error(tensor, theirs()),
        "error rankfold": error(tensor, ours()),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="instead of five to nine")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    rows = [
        measure(shape, rank, sweeps, rounds or usual, dtype)
        for dtype in (torch.float32, torch.float64)
        for shape, rank, sweeps, usual in few(CASES)
    ]
    title = "How fast is a sweep of CP, and how far from its two matrix products?"
    write("how_fast_is_cp", rows, title=title, tensorly=tensorly.__version__, time="per sweep")


if __name__ == "__main__":
    main()
