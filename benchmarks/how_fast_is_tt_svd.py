"""How fast is the TT-SVD of a 4096 x 4096 matrix folded to 8^4 x 8^4, against tensorly's `tensor_train`?

    OMP_NUM_THREADS=1 python benchmarks/how_fast_is_tt_svd.py

Both libraries get the same folded tensor of order 4 (modes of 64, paired rows and columns) in the same dtype and
return cores of the same ranks. Errors are those of the returned cores, measured in float64. The matrix is random
with slowly decaying scales of its columns: it has no tensor-train structure, so the errors only compare the libraries.
"""

from __future__ import annotations

from typing import Any

import tensorly
import torch
from _timing import compare, few, options, ratio, write
from tensorly.decomposition import tensor_train as peer_tensor_train
from torch import Tensor

from rankfold.decompose import TT, pair_modes, tensor_train

SIZE, SHAPE = 4096, (8, 8, 8, 8)
RANKS = (8, 16)
DTYPES = (torch.float32, torch.float64)
TARGET = 15


def folded_matrix() -> Tensor:
    """Return a weight-like matrix, folded to (64, 64, 64, 64), in float64."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, SIZE + 1, dtype=torch.float64).pow(-0.25)
    return pair_modes(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) * scale, SHAPE, SHAPE)


def error(cores: tuple[Tensor, ...], tensor: Tensor) -> float:
    dense = TT(tuple(core.double() for core in cores)).to_dense()
    return float(torch.linalg.vector_norm(dense - tensor) / torch.linalg.vector_norm(tensor))


def row(tensor: Tensor, rank: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    given = tensor.to(dtype)
    contestants = {
        "tensorly": lambda: tuple(peer_tensor_train(given, [1, rank, rank, rank, 1])),
        "rankfold": lambda: tensor_train(given, rank).cores,
    }
    times = compare(contestants, rounds=rounds)
    return {
        "rank": rank,
        "dtype": str(dtype).removeprefix("torch."),
        **times,
        "times faster": ratio(times["tensorly"], times["rankfold"]),
        "target": TARGET,
        **{f"{name} error": error(run(), tensor) for name, run in contestants.items()},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    tensorly.set_backend("pytorch")
    tensor = folded_matrix()
    rows = [row(tensor, rank, dtype, rounds) for rank in few(RANKS) for dtype in DTYPES]
    title = "How fast is the TT-SVD of 4096 x 4096 folded to 8^4 x 8^4?"
    write("how_fast_is_tt_svd", rows, title=title, tensorly=tensorly.__version__, rounds=rounds)


if __name__ == "__main__":
    main()
