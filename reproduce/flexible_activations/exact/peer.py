"""The package `decoupling` on the problems of one file: run by the interpreter of its own environment.

    python peer.py problems.npz answers.npz

needs numpy and decoupling alone. It computes in double precision, on one thread.
"""

from __future__ import annotations

import os
import sys
import time
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import numpy as np
from decoupling import Algorithm

SWEEPS, STARTS = 100, 3
# Cubic polynomials it is told of. For ReLUs its defaults, smoothed cubic splines, do better than linear pieces.
SPLINES = {"polynomial": {"splines_degree": 3, "splines_dof": 4, "use_smoothing": False}, "ReLU": {}}


def solved(problem: dict[str, np.ndarray], rank: int, kind: str, seed: int) -> dict[str, np.ndarray | float]:
    """Return the factors found for a problem, the values at its fresh inputs, and its seconds of processor time."""
    start = time.process_time()
    key = jax.random.key(seed)
    algorithm = Algorithm(rank, key, niters=SWEEPS, ninits=STARTS, show_progress=False, **SPLINES[kind])
    try:
        found = algorithm.run(problem["inputs"], problem["values"], problem["jacobians"])
    except RuntimeError:  # all starts failed
        return {"seconds": time.process_time() - start}
    left, right = np.asarray(found.W), np.asarray(found.V)
    seconds = time.process_time() - start
    got = np.asarray(jax.vmap(found)(problem["fresh"]))
    # its model has no bias: it gets the one that fits the samples
    bias = problem["values"].mean(0) - np.asarray(jax.vmap(found)(problem["inputs"])).mean(0)
    return {"left": left, "right": right, "got": got + bias, "seconds": seconds}


def main(source: str, target: str) -> None:
    """Solve every problem of a file and write the answers to another; the first is solved twice, as it compiles."""
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    answers: dict[str, np.ndarray | float] = {}
    with np.load(source) as given:
        rank, kind = int(given["rank"]), str(given["kind"])
        for index in [given["seeds"][0], *given["seeds"]]:
            problem = {name: given[f"{index} {name}"] for name in ("inputs", "values", "jacobians", "fresh")}
            for name, value in solved(problem, rank, kind, int(index)).items():
                answers[f"{index} {name}"] = value
    np.savez(target, **answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
