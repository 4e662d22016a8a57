"""The tables and the picture of what `run` has measured."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, number, panels

GIBI = 2**30
# Colours of Okabe and Ito (2008), told apart with any colour vision.
LOOKS = {
    ("wide", 2): ("#0072b2", "-"),
    ("wide", 4): ("#009e73", "-"),
    ("wide", 8): ("#d55e00", "-"),
    ("dense", 2): ("#222222", "--"),
    ("narrow", 2): ("#888888", "--"),
    ("narrow", 8): ("#888888", ":"),
}
KINDS = {
    "wide": "262,144 units, rank {}",
    "dense": "dense, as many parameters as at rank {}",
    "narrow": "dense, as many as at rank {} outside BatchNorm",
}
ROUND = 3_200  # images


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    if row["kind"] == "step":
        return " | ".join(["step", *_step_cells(row)])
    if row.get("trial"):
        return f"trial | {row['kind']} | {row['optimizer']} | lr {row['lr']:g} | loss {row['loss']:.3f}"
    errors = ", ".join(f"{100 - each['accuracy']:.1f} ({each['seconds']:.0f} s)" for each in row["rounds"])
    return f"{_name(row)} | {row['params']:,} | {errors}"


def write_table(rows: Rows, path: Path) -> None:
    """Write what a step costs, the errors, and the trials that chose optimiser and learning rate."""
    parts = [
        "One training step of 32 images, forward, backward and Adam, on one thread; medians of processor time:",
        "",
        *markdown(STEP_HEADINGS, [_step_cells(row) for row in _by_rank(rows, "step")]),
        "",
        "Error in per cent on 2,000 images not trained on (1,000 of the test set, 1,000 held out), after so many",
        "rounds of 3,200 images:",
        "",
        *_errors(rows),
        "",
        "What chose optimiser and learning rate: mean training loss over 960 images, the wide network at rank 2:",
        "",
        *_trials(rows),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


STEP_HEADINGS = (
    "rank",
    "parameters",
    "of them in the trains",
    "multiply-adds",
    "seconds",
    "of them BatchNorm and ReLU",
    "GFLOP/s",
    "GFLOP/s of a dense product",
    "peak resident GiB",
)


def _step_cells(row: Row) -> list[str]:
    return [
        str(row["rank"]),
        f"{row['params']:,}",
        f"{sum(row['train_params'].values()):,}",
        f"{row['macs'] / 1e9:.2f} G",
        number(statistics.median(row["seconds"])),
        number(row["tail_seconds"]),
        number(row["gflops"]),
        number(row["matmul_gflops"]),
        number(row["peak_bytes"] / GIBI),
    ]


def _by_rank(rows: Rows, kind: str) -> list[Row]:
    found = [row for row in rows.values() if row["kind"] == kind and not row.get("trial")]
    return sorted(found, key=lambda row: row["rank"])


def _trained(rows: Rows) -> list[Row]:
    return [row for kind in KINDS for row in _by_rank(rows, kind)]


def _name(row: Row) -> str:
    return KINDS[row["kind"]].format(row["rank"])


def _errors(rows: Rows) -> list[str]:
    counts = sorted({len(row["rounds"]) for row in _trained(rows)} | {1, 2, 3, 4, 5})
    lines = []
    for row in _trained(rows):
        errors = [100 - each["accuracy"] for each in row["rounds"]]
        after = [f"{errors[count - 1]:.1f}" if count <= len(errors) else "" for count in counts]
        lines.append([_name(row), f"{row['params']:,}", f"{row['optimizer']} {row['lr']:g}", *after])
    return markdown(["network", "parameters", "optimiser", *(f"after {n}" for n in counts)], lines)


def _trials(rows: Rows) -> list[str]:
    trials = [row for row in rows.values() if row.get("trial")]
    settings = sorted({(row["optimizer"], row["lr"]) for row in trials})
    losses = {(row["kind"], (row["optimizer"], row["lr"])): row["loss"] for row in trials}
    lines = [[kind, *(f"{losses[kind, setting]:.3f}" for setting in settings)] for kind in ("wide", "dense")]
    return markdown(["network", *(f"{name} {rate:g}" for name, rate in settings)], lines)


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the error and the training loss against the images seen."""
    figure, (error, loss) = panels(2, height=4.2)
    for (kind, rank), (colour, style) in LOOKS.items():
        for row in _by_rank(rows, kind):
            if row["rank"] == rank:
                _draw(error, row, [100 - each["accuracy"] for each in row["rounds"]], colour, style)
                _draw(loss, row, [each["train_loss"] for each in row["rounds"]], colour, style)
    error.set_title("Error (%) on images not trained on", loc="left", fontsize=10.5)
    loss.set_title("Training loss", loc="left", fontsize=10.5)
    loss.set_ylim(top=2.4)  # room for the legend
    loss.legend(frameon=False, fontsize=8.5)
    finish(figure, "262,144 hidden units on CIFAR-10", path)


def _draw(panel: Axes, row: Row, values: list[float], colour: str, style: str) -> None:
    images = [ROUND * (count + 1) / 1000 for count in range(len(values))]
    panel.plot(images, values, style, color=colour, marker="o", markersize=3, linewidth=1.4, label=_name(row))
    panel.set_xscale("log")
    panel.set_xticks([3.2, 6.4, 16, 32, 96], ["3.2", "6.4", "16", "32", "96"])
    panel.minorticks_off()
    panel.set_xlabel("thousands of images seen")
