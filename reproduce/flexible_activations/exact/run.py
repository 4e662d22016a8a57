"""Are functions made of known activations found again? Success rates of `coupled` and of the package `decoupling`.

    python -m reproduce.flexible_activations.exact.run                      # what results.json lacks, table, plot
    python -m reproduce.flexible_activations.exact.run --peer VENV/python   # with decoupling, by its interpreter
    python -m reproduce.flexible_activations.exact.run --redraw             # table and plot from results.json

Answers are written ten problems at a time; what was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import rankfold as rf
from reproduce import harness
from reproduce.flexible_activations.exact import drawing
from reproduce.flexible_activations.exact.problems import DEGREE, KINDS, Problem, cosine, error, problem
from reproduce.harness import Row

CELLS = [(6, 6, rank, samples) for rank in (4, 9) for samples in (40, 200)]  # in, out, rank, samples
PROBLEMS, CHUNK = 50, 10
BASES = {"polynomial": rf.decompose.Basis("legendre", DEGREE), "ReLU": rf.decompose.Basis("piecewise", 8)}
Answer = tuple[np.ndarray, np.ndarray, np.ndarray, float]  # left, right, values at the fresh inputs, seconds


def ours(kind: str, sizes: tuple[int, int, int, int], seeds: range) -> list[Answer | float]:
    """Return the answers of `rf.decompose.coupled` with its default starts."""
    answers: list[Answer | float] = []
    for seed in seeds:
        one = problem(kind, sizes, seed)
        jacobians, values, inputs = map(torch.from_numpy, (one.jacobians, one.values.T, one.inputs.T))
        start = time.process_time()
        found = rf.decompose.coupled(jacobians, values, inputs, sizes[2], basis=BASES[kind], seed=seed)
        seconds = time.process_time() - start
        got = found.evaluate(torch.from_numpy(one.fresh.T)).T
        answers.append((found.left.numpy(), found.right.numpy(), got.numpy(), seconds))
    return answers


def peer(python: Path, kind: str, sizes: tuple[int, int, int, int], seeds: range) -> list[Answer | float]:
    """Return the answers of `decoupling`, run by its own interpreter; seconds alone where all its starts failed."""
    arrays: dict[str, np.ndarray] = {"rank": np.array(sizes[2]), "kind": np.array(kind), "seeds": np.array(seeds)}
    for seed in seeds:
        one = problem(kind, sizes, seed)
        arrays |= {f"{seed} {name}": getattr(one, name) for name in ("inputs", "values", "jacobians", "fresh")}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "problems.npz"), Path(folder, "answers.npz")
        np.savez(source, **arrays)
        subprocess.run([python, Path(__file__).with_name("peer.py"), source, target], check=True)
        with np.load(target) as found:
            told = dict(found)
    names = ("left", "right", "got")
    seconds = [float(told[f"{seed} seconds"]) for seed in seeds]
    return [
        (*(told[f"{seed} {name}"] for name in names), took) if f"{seed} left" in told else took
        for seed, took in zip(seeds, seconds, strict=True)
    ]


def judged(one: Problem, answer: Answer | float) -> tuple[float, float, float]:
    """Return the worst neuron's cosine, the error of the values at fresh inputs, and the seconds of an answer."""
    if isinstance(answer, float):
        return 0.0, float("inf"), answer
    left, right, got, seconds = answer
    return cosine(one, left, right), error(one, got), seconds


def measure(rows: harness.Rows, keep: harness.Keep, python: Path | None) -> None:
    """Solve what is missing, ten problems of each cell in turn; without an interpreter for `decoupling` ours only."""
    torch.set_num_threads(1)
    solvers = {"coupled": ours, **({} if python is None else {"decoupling": lambda *a: peer(python, *a)})}
    for solver, solve in solvers.items():
        for end in range(CHUNK, PROBLEMS + 1, CHUNK):
            for kind, sizes in [(kind, sizes) for kind in KINDS for sizes in CELLS]:
                key = f"{solver} {kind} {sizes}"
                row: Row = {"solver": solver, "kind": kind, "sizes": sizes, "cosines": [], "errors": [], "seconds": []}
                row = rows.get(key, row)
                seeds = range(len(row["errors"]), end)
                if not seeds:
                    continue
                found = [
                    judged(problem(kind, sizes, seed), answer)
                    for seed, answer in zip(seeds, solve(kind, sizes, seeds), strict=True)
                ]
                new = dict(zip(("cosines", "errors", "seconds"), map(list, zip(*found, strict=True)), strict=True))
                keep(key, row | {name: row[name] + [float(f"{v:.6g}") for v in new[name]] for name in new})


QUICK = {"CELLS": [(6, 6, 4, 40)], "PROBLEMS": 2, "CHUNK": 2}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peer", type=Path)
    chosen, sys.argv[1:] = parser.parse_known_args()
    harness.main(
        __doc__, Path(__file__).parent, lambda rows, keep: measure(rows, keep, chosen.peer), drawing, quick=QUICK
    )
