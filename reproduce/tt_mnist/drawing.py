"""The tables and the picture of the runs that `run` has made."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

DENSE, MATRIX = "dense", "matrix"
BIAS, DENSE_WEIGHTS = 1024, 1024 * 1024
# Colours of Okabe and Ito (2008), told apart with any colour vision, and a mark each.
LOOKS = {
    MATRIX: ("#888888", "s"),
    "32×32": ("#222222", "o"),
    "4×8×8×4": ("#0072b2", "^"),
    "4^5": ("#009e73", "D"),
    "2×2×8×8×2×2": ("#e69f00", "v"),
    "2^10": ("#d55e00", "P"),
}
NAMES = {MATRIX: "matrix rank", DENSE: "dense"}


def line(row: Row) -> str:
    """Return a run on one line, for a person who waits."""
    name = f"{'trial of ' if row.get('trial') else ''}{_name(row['kind'])}"
    errors = ", ".join(f"{100 - epoch['accuracy']:.2f}" for epoch in row["epochs"])
    seconds = sum(epoch["seconds"] for epoch in row["epochs"])
    rank = "" if row["rank"] is None else f"rank {row['rank']}"
    return " | ".join([name, rank, f"seed {row['seed']}", f"lr {row['lr']:g}", errors, f"{seconds:.0f} s"])


def write_table(rows: Rows, path: Path) -> None:
    """Write errors by rank and kind, and the trials that chose the learning rates."""
    parts = [
        "Test error in per cent by the rank of the hidden layer, in brackets its weights (the bias, 1,024 more in each",
        "layer, left out). Mean ± standard deviation where there is more than one seed, else of seed 0.",
        "",
        *_by_rank(rows),
        "",
        "Everything of more than one seed:",
        "",
        *_seeds(rows),
        "",
        "What chose the learning rates: error in per cent on the last 10,000 training images after four epochs on the",
        "others, tensor trains and low-rank layers at rank 4.",
        "",
        *_trials(rows),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _name(kind: str) -> str:
    return NAMES.get(kind, kind)


def _runs(rows: Rows, kind: str, rank: int | None) -> list[Row]:
    return [row for row in rows.values() if (row["kind"], row["rank"]) == (kind, rank) and not row.get("trial")]


def _weights(run: Row) -> int:
    return run["params"] - BIAS


def _errors(runs: list[Row]) -> list[float]:
    return [100 - run["epochs"][-1]["accuracy"] for run in runs]


def _ranks(rows: Rows, kind: str | None = None) -> list[int]:
    own = [row for row in rows.values() if kind in (None, row["kind"]) and not row.get("trial")]
    return sorted({row["rank"] for row in own} - {None})


def _by_rank(rows: Rows) -> list[str]:
    lines = []
    for rank in [None, *_ranks(rows)]:
        cells = []
        for kind in (DENSE, *LOOKS) if rank is None else LOOKS:
            runs = _runs(rows, kind, rank)
            cells.append(f"{spread(_errors(runs))} ({_weights(runs[0]):,})" if runs else "")
        lines.append(["dense", cells[0], *[""] * (len(LOOKS) - 1)] if rank is None else [str(rank), *cells])
    return markdown(["rank", *map(_name, LOOKS)], lines)


def _seeds(rows: Rows) -> list[str]:
    lines = []
    for kind in (DENSE, *LOOKS):
        for rank in [None] if kind == DENSE else _ranks(rows, kind):
            runs = _runs(rows, kind, rank)
            if len(runs) > 1:
                each = ", ".join(f"{error:.2f}" for error in _errors(runs))
                weights = _weights(runs[0])
                cells = [_name(kind), "" if rank is None else str(rank), f"{weights:,}"]
                lines.append([*cells, f"{DENSE_WEIGHTS / weights:,.1f}", spread(_errors(runs)), each])
    return markdown(["hidden layer", "rank", "weights", "times fewer", "error", "each seed"], lines)


def _trials(rows: Rows) -> list[str]:
    trials = [row for row in rows.values() if row.get("trial")]
    rates = sorted({row["lr"] for row in trials})
    lines = []
    for kind in (DENSE, *LOOKS):
        errors = {row["lr"]: _errors([row])[0] for row in trials if row["kind"] == kind}
        lines.append([_name(kind), *(f"{errors[rate]:.2f}" for rate in rates), f"{min(errors, key=errors.get):g}"])
    return markdown(["hidden layer", *(f"{rate:g}" for rate in rates), "chosen"], lines)


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the error against the number of parameters, and against the rank."""
    figure, (by_params, by_rank) = panels(2, height=4.4)
    for kind, (colour, mark) in LOOKS.items():
        ranks = _ranks(rows, kind)
        errors = [statistics.mean(_errors(_runs(rows, kind, rank))) for rank in ranks]
        sizes = [_weights(_runs(rows, kind, rank)[0]) for rank in ranks]
        for panel, x in ((by_params, sizes), (by_rank, ranks)):
            panel.plot(x, errors, color=colour, marker=mark, markersize=5, linewidth=1.4, label=_name(kind))
    dense = _errors(_runs(rows, DENSE, None))
    for panel in (by_params, by_rank):
        panel.axhline(statistics.mean(dense), color="#222222", linestyle=":", linewidth=1.2, label="dense")
        _scales(panel)
    by_params.set_xlabel(f"weights of the hidden layer, dense: {DENSE_WEIGHTS:,}")
    by_rank.set_xlabel("rank")
    by_rank.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    by_rank.minorticks_off()
    by_params.set_title("Test error (%) against weights", loc="left", fontsize=10.5)
    by_rank.set_title("Test error (%) against rank", loc="left", fontsize=10.5)
    by_rank.legend(frameon=False)
    finish(figure, "A tensor-train layer 1024 → 1024 on MNIST", path)


def _scales(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_yticks([1.5, 2, 3, 5, 10, 20, 40], ["1.5", "2", "3", "5", "10", "20", "40"])
    panel.tick_params(axis="y", which="minor", left=False, labelleft=False)
