"""The table and the heat map of the problems that `run` has solved."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from reproduce.flexible_activations.exact.problems import FOUND, KINDS
from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, number, panels

SOLVERS = {"coupled": "rf.decompose.coupled", "decoupling": "decoupling 0.0.9"}
EXACT = 1e-3  # error of the values that counts as exact


def line(row: Row) -> str:
    """Return a cell on one line, for a person who waits."""
    return " | ".join(_cells(row))


def write_table(rows: Rows, path: Path) -> None:
    """Write success rates, errors and times, cell by cell, both solvers below each other."""
    headings = (
        "activations",
        "in, out, rank, samples",
        "solver",
        "problems",
        "found",
        "exact values",
        "error",
        "seconds",
    )
    ordered = sorted(rows.values(), key=lambda row: (KINDS.index(row["kind"]), row["sizes"]))
    parts = [
        f"Found: every neuron's weights have a cosine above {FOUND} with the true ones, up to permutation, scale and",
        f"sign. Exact values: relative error below {EXACT:g} at 400 inputs that the solver has not seen. Error: its",
        "median and its ninth decile. Seconds: processor time per problem, median.",
        "",
        *markdown(headings, map(_cells, ordered)),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    count, errors = len(row["errors"]), row["errors"]
    return [
        row["kind"],
        ", ".join(map(str, row["sizes"])),
        SOLVERS[row["solver"]],
        str(count),
        f"{100 * _rate(row):.0f} %",
        f"{100 * sum(e < EXACT for e in errors) / count:.0f} %",
        f"{statistics.median(errors):.1e}, {statistics.quantiles(errors, n=10)[-1]:.1e}",
        number(statistics.median(row["seconds"]), 2),
    ]


def _rate(row: Row) -> float:
    return sum(c > FOUND for c in row["cosines"]) / len(row["cosines"])


def write_plot(rows: Rows, path: Path) -> None:
    """Draw a heat map of the share of problems whose neurons are found, per solver and kind of activation."""
    figure, axes = panels(len(SOLVERS) * len(KINDS), height=3.4)
    for axis, (solver, kind) in zip(axes, [(s, k) for k in KINDS for s in SOLVERS], strict=True):
        _heat(axis, [row for row in rows.values() if (row["solver"], row["kind"]) == (solver, kind)])
        axis.set_title(f"{kind}\n{SOLVERS[solver]}", loc="left", fontsize=9)
    finish(figure, "Per cent of random 6 × 6 problems whose neurons are all found", path)


def _heat(axis: Axes, rows: list[Row]) -> None:
    ranks, samples = (sorted({row["sizes"][k] for row in rows}) for k in (2, 3))
    rates = np.full((len(ranks), len(samples)), np.nan)
    for row in rows:
        at = ranks.index(row["sizes"][2]), samples.index(row["sizes"][3])
        rates[at] = _rate(row)
        ink = "w" if rates[at] < 0.6 else "k"
        axis.text(at[1], at[0], f"{100 * rates[at]:.0f}", ha="center", va="center", color=ink)
    axis.imshow(rates, vmin=0, vmax=1, cmap="viridis", origin="lower", aspect="auto")
    axis.set_xticks(range(len(samples)), list(map(str, samples)))
    axis.set_yticks(range(len(ranks)), list(map(str, ranks)))
    axis.grid(visible=False)
    axis.set(xlabel="samples", ylabel="rank")
