"""The tables and the picture of what `run` has measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, number, panels

# Novikov et al. 2015, Table 2: how many times fewer parameters.
PUBLISHED = {"rank 1": 713_614, "rank 2": 194_622, "rank 4": 50_972}
KINDS = {"forward": "forward", "training": "forward + backward"}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {"dense": "#222222", "rank 1": "#0072b2", "rank 2": "#009e73", "rank 4": "#d55e00"}
MEBI = 2**20


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    return " | ".join(_cells(row))


def write_table(rows: Rows, path: Path) -> None:
    """Write the parameters beside the published ratios, then times and memory."""
    parts = [
        "Parameters, 25088 → 4096 without bias:",
        "",
        *markdown(*_params(rows)),
        "",
        "Milliseconds of processor time on one thread, median ± half the range between the quartiles; in brackets how",
        "many times faster than dense, the median over the rounds. Peak memory: what a call allocates, the parameters",
        "and the input left out, the gradients of both included.",
        "",
        *markdown(*_measured(rows)),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _params(rows: Rows) -> tuple[list[str], list[list[str]]]:
    params = {row["layer"]: row["params"] for row in rows.values()}
    lines = [
        [name, f"{count:,}", f"{params['dense'] / count:,.1f}", f"{PUBLISHED[name]:,}" if name in PUBLISHED else ""]
        for name, count in params.items()
    ]
    return ["layer", "parameters", "times fewer", "published"], lines


def _measured(rows: Rows) -> tuple[list[str], list[list[str]]]:
    peaks = [f"peak MiB, {name}" for name in KINDS.values()]
    return ["batch", "layer", "MACs", *KINDS.values(), *peaks], [_cells(row) for row in rows.values()]


def _cells(row: Row) -> list[str]:
    peaks = [number(row[kind]["peak_bytes"] / MEBI) for kind in KINDS]
    return [
        str(row["batch"]),
        row["layer"],
        f"{number(row['macs'] / 1e6)} M",
        *(_time(row[kind]) for kind in KINDS),
        *peaks,
    ]


def _time(found: Row) -> str:
    lower, median, upper = statistics.quantiles(found["seconds"], n=4)
    return f"{number(1e3 * median)} ± {number(1e3 * (upper - lower) / 2, 1)} ({number(found['faster'])})"


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the times of both kinds and the memory of training against the batch."""
    figure, axes = panels(3)
    for panel, (kind, name) in zip(axes, KINDS.items(), strict=False):
        _draw(panel, rows, lambda row, kind=kind: 1e3 * statistics.median(row[kind]["seconds"]))
        panel.set_title(f"{name[0].upper()}{name[1:]} (ms, one thread)", loc="left", fontsize=10.5)
    _draw(axes[2], rows, lambda row: row["training"]["peak_bytes"] / MEBI)
    axes[2].set_title("Peak memory of forward + backward (MiB)", loc="left", fontsize=10.5)
    axes[0].legend(frameon=False)
    finish(figure, "fc6 of VGG-16, 25088 → 4096, as a tensor train", path)


def _draw(panel: Axes, rows: Rows, value: Any) -> None:
    for name, colour in COLOURS.items():
        own = [row for row in rows.values() if row["layer"] == name]
        panel.plot(
            [r["batch"] for r in own], [value(r) for r in own], color=colour, marker="o", markersize=4, label=name
        )
    panel.set_xscale("log")
    panel.set_yscale("log")
    batches = sorted({row["batch"] for row in rows.values()})
    panel.set_xticks(batches, [str(batch) for batch in batches])
    panel.minorticks_off()
    panel.set_xlabel("batch")
