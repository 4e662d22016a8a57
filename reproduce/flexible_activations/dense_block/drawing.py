"""The table and the picture of the runs that `run` has made."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

METHODS = {
    "solved": "flexible, solved only",
    "flexible": "flexible",
    "svd": "SVD of the weights",
    "aware": "data-aware SVD",
    "tt": "tensor train",
    "relu": "narrow ReLU, fitted from scratch",
    "affine": "affine map",
}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = dict(zip(METHODS, "#e69f00 #d55e00 #0072b2 #56b4e9 #009e73 #222222 #cc79a7".split(), strict=True))
DENSE_PARAMS = 1568 * 512 + 512 + 512 * 10 + 10


def line(row: Row) -> str:
    """Return a run on one line, for a person who waits."""
    head = f"{row['data']} | rank {row['rank']} | seed {row['seed']} | {row['method']}"
    if "missing" in row:
        return f"{head} | {row['missing']}"
    scores = f"dense {row['dense']:.2f}, one shot {row['one_shot']:.2f}, tuned {row.get('tuned', 0):.2f}"
    return f"{head} | {row['params']} | {scores} | error {row['error']:.3f} | {row['seconds']:.0f} s"


def write_table(rows: Rows, path: Path) -> None:
    """Write what is lost without and with one epoch of distillation, per data set, rank and method."""
    headings = ("method", "parameters", "times fewer", "logits' error", "one shot", "one epoch", "seconds", "seeds")
    parts = [
        "Test accuracy in per cent, mean ± standard deviation over the seeds; bold: the best of its column. Error: of",
        "the logits on the test images, relative, before the epoch. Seconds: processor time to make the block, median.",
    ]
    for data, rank in sorted({(r["data"], r["rank"]) for r in rows.values()}, reverse=True):
        runs = [r for r in rows.values() if (r["data"], r["rank"]) == (data, rank) and "missing" not in r]
        if runs:
            dense = spread(_by_seed(runs))
            parts += [
                "",
                f"{data}, flexible layer of rank {rank}; dense block: {DENSE_PARAMS:,} parameters, {dense}:",
                "",
            ]
            parts += markdown(headings, _lines(runs))
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _by_seed(runs: list[Row]) -> list[float]:
    return list({r["seed"]: r["dense"] for r in runs}.values())


def _lines(runs: list[Row]) -> list[list[str]]:
    groups = {method: [r for r in runs if r["method"] == method] for method in METHODS}
    groups = {method: found for method, found in groups.items() if found}
    means = {
        key: {method: statistics.mean(values) for method in groups if (values := _values(groups[method], key))}
        for key in ("one_shot", "tuned")
    }
    lines = []
    for method, found in groups.items():
        count = statistics.mean(r["params"] for r in found)
        scores = []
        for key, column in means.items():
            cell = spread(_values(found, key))
            scores.append(f"**{cell}**" if cell and column[method] == max(column.values()) else cell)
        error = f"{statistics.mean(r['error'] for r in found):.3f}"
        seconds = f"{statistics.median(r['seconds'] for r in found):.0f}"
        times = f"{DENSE_PARAMS / count:.1f}"
        lines.append([METHODS[method], f"{count:,.0f}", times, error, *scores, seconds, str(len(found))])
    return lines


def _values(runs: list[Row], key: str) -> list[float]:
    return [r[key] for r in runs if key in r]


def write_plot(rows: Rows, path: Path) -> None:
    """Draw accuracy before and after tuning against parameters, and the activations of one layer, each to scale."""
    names = list(dict.fromkeys(r["data"] for r in rows.values()))
    figure, axes = panels(2 * len(names), width=13, height=3.8)
    for axis, data in zip(axes, names, strict=False):
        _accuracies(axis, [r for r in rows.values() if r["data"] == data and "missing" not in r])
        axis.set_title(data, loc="left", fontsize=10.5)
    axes[0].legend(fontsize=7, frameon=False, loc="lower right")
    for axis, data in zip(axes[len(names) :], names, strict=True):
        chosen = next(r for r in rows.values() if "curves" in r and r["data"] == data)
        for curve in chosen["curves"]:
            span = curve[-1] - curve[0]
            axis.plot([-1 + k / 20 for k in range(len(curve))], [(v - curve[20]) / span for v in curve], lw=1)
        axis.set_title(f"{data}: activations, rank {chosen['rank']}", loc="left", fontsize=10.5)
        axis.set_xlabel("u")
    finish(figure, "The block 1568 → 512 → 10: accuracy (%) one shot (line) and after one epoch (crosses)", path)


def _accuracies(axis: Axes, runs: list[Row]) -> None:
    for method, name in METHODS.items():
        ranks = sorted({r["rank"] for r in runs if r["method"] == method})
        groups = [[r for r in runs if (r["method"], r["rank"]) == (method, rank)] for rank in ranks]
        xs = [DENSE_PARAMS / statistics.mean(r["params"] for r in group) for group in groups]
        ys = [statistics.mean(r["one_shot"] for r in group) for group in groups]
        axis.plot(xs, ys, "o-", color=COLOURS[method], label=name, ms=4, lw=1)
        if method != "solved":
            axis.plot(xs, [statistics.mean(r["tuned"] for r in group) for group in groups], "+", color=COLOURS[method])
    dense = statistics.mean(_by_seed(runs))
    axis.axhline(dense, color="#222222", lw=1, ls=":")
    axis.set(xlabel="times fewer parameters", xscale="log", ylim=(dense - 8, dense + 1))
    axis.set_xticks([5, 10, 20, 50], ["5", "10", "20", "50"])
    axis.minorticks_off()
