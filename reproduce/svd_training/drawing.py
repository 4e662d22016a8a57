"""The tables and the pictures of what `run` has measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

TITLES = {
    "pretrained": "ResNet-20, pretrained",
    "scratch": "ResNet-20, from scratch",
    "mnist": "small CNN, MNIST",
    "fashion": "MLP, Fashion-MNIST",
}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {
    "svd": "#0072b2",
    "one shot": "#222222",
    "trp": "#e69f00",
    "nuclear": "#f0e442",
    "pufferfish": "#009e73",
    "cuttlefish": "#56b4e9",
    "dlrt": "#d55e00",
    "lc": "#cc79a7",
}
MARKS = {"hoyer": "o", "l1": "^", "hoyer_square": "s"}
HEADINGS = ("method", "split", "options", "MACs ≤", "MACs", "params", "before the cut", "cut", "BatchNorm", "tuned")


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    if row["method"] == "dense":
        return f"{row['task']} | dense | {row['macs']:,} MACs | tuned {row['tuned']['test']:.2f}"
    if row["budget"] is None:
        seconds = sum(epoch["seconds"] for epoch in row["log"])
        return f"{row['task']} | {row['method']} {row['split']} {_options(row)} | trained, {seconds:.0f} s"
    start = f"{row['task']} | {row['method']} {row['split']} {_options(row)} | {row['budget']}"
    if "refused" in row:
        return f"{start} | {row['refused']}"
    scores = ", ".join(
        f"{name} {row[name]['test']:.2f}" for name in ("before", "cut", "batchnorm", "tuned") if name in row
    )
    return f"{start} | {row['macs'] / row['dense_macs']:.1%} of the MACs | {scores} | {row['seconds']:.0f} s"


def write_table(rows: Rows, path: Path) -> None:
    """Write a table per network: means over the seeds, with their standard deviations where there are several."""
    parts = ["Accuracy in per cent on the test images, before the cut, after it, and after training on.", ""]
    for task, title in TITLES.items():
        found = [row for row in rows.values() if row["task"] == task]
        if found:
            dense = [row["tuned"]["test"] for row in found if row["method"] == "dense"]
            parts += [f"## {title}", "", f"Dense, trained for as many epochs: {spread(dense)}.", ""]
            parts += [*markdown(HEADINGS, _lines(found)), ""]
    path.write_text("\n".join(parts), encoding="utf-8")


def _lines(rows: list[Row]) -> list[list[str]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] != "dense" and row["budget"] is not None:
            groups[(row["method"], row["split"], _options(row), str(row["budget"]))].append(row)
    return [[*key, *_cells(same)] for key, same in sorted(groups.items())]


def _cells(same: list[Row]) -> list[str]:
    good = [row for row in same if "refused" not in row]
    if not good:
        return [same[0]["refused"].replace("|", "/"), *[""] * (len(HEADINGS) - 5)]
    kept = [statistics.mean(row[name] / row[f"dense_{name}"] for row in good) for name in ("macs", "params")]
    scores = [[row[name]["test"] for row in good if name in row] for name in ("before", "cut", "batchnorm", "tuned")]
    return [*(f"{share:.1%}" for share in kept), *map(spread, scores)]


def _options(row: Row) -> str:
    return ", ".join(f"{name}={value}" for name, value in row["options"].items())


def write_plot(rows: Rows, path: Path) -> None:
    """Draw accuracy after tuning against MACs kept, a panel per network, a curve per setting."""
    tasks = [task for task in TITLES if any(row["task"] == task for row in rows.values())]
    if not tasks:
        return
    figure, axes = panels(len(tasks), width=5.2 * len(tasks), height=4.6)
    for axis, task in zip(axes, tasks, strict=True):
        _draw(axis, task, [row for row in rows.values() if row["task"] == task])
    axes[0].set_ylabel("accuracy on test images (%)")
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    finish(figure, "Accuracy against MACs, equal epochs", path)


def _draw(axis: Axes, task: str, rows: list[Row]) -> None:
    curves: dict[tuple[str, str, str], dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    if dense := [row["tuned"]["test"] for row in rows if row["method"] == "dense"]:
        axis.axhline(statistics.mean(dense), color="#888888", linestyle=":", linewidth=1.2)
    for row in rows:
        if row["method"] != "dense" and "refused" not in row and row["budget"] not in ("own", None):
            point = (100 * row["macs"] / row["dense_macs"], row["tuned"]["test"])
            curves[row["method"], row["split"], _options(row)][row["budget"]].append(point)
    for (method, split, options), points in sorted(curves.items()):
        means = sorted(tuple(map(statistics.mean, zip(*same, strict=True))) for same in points.values())
        kind = next((name for name in sorted(MARKS, key=len, reverse=True) if f"kind={name}," in options), "")
        axis.plot(
            *zip(*means, strict=True),
            color=COLOURS[method],
            linestyle="-" if split == "spatial" else "--",
            marker=MARKS.get(kind, "."),
            markersize=5,
            markerfacecolor="white" if "orthogonality=" in options else None,
            linewidth=1.4,
            label=f"{method}, {split}{f', {options}' if method == 'svd' else ''}",
        )
    axis.set_title(TITLES[task], loc="left", fontsize=10)
    axis.set_xlabel("MACs kept (%)")
    axis.invert_xaxis()
