"""The table and the picture of the runs that `run` has made."""

from __future__ import annotations

from pathlib import Path

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

METHODS = {"flexible": "flexible", "svd": "SVD of both layers", "tt": "tensor train", "relu": "narrow ReLU, fresh"}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {"flexible": "#d55e00", "svd": "#0072b2", "tt": "#009e73", "relu": "#222222"}
DENSE_PARAMS = 1568 * 512 + 512 + 512 * 10 + 10


def line(row: Row) -> str:
    """Return a run on one line, for a person who waits."""
    head = f"{row['data']} | rank {row['rank']} | seed {row['seed']} | {row['method']}"
    if "missing" in row:
        return f"{head} | {row['missing']}"
    times = f"{DENSE_PARAMS / row['params']:.1f}x"
    scores = f"dense {row['dense']:.2f}, one shot {row['one_shot']:.2f}, tuned {row['tuned']:.2f}"
    return f"{head} | {row['params']} ({times}) | {scores}" + (f" | error {row['error']:.3f}" if "error" in row else "")


def write_table(rows: Rows, path: Path) -> None:
    """Write accuracy without and with one epoch of distillation, per data set, rank and method."""
    headings = ("data", "rank", "method", "parameters of the block", "times fewer", "one shot", "one epoch", "dense")
    lines = []
    for data, rank, method in dict.fromkeys((r["data"], r["rank"], r["method"]) for r in rows.values()):
        runs = [r for r in rows.values() if (r["data"], r["rank"], r["method"]) == (data, rank, method)]
        done = [r for r in runs if "missing" not in r]
        if not done:
            lines.append((data, str(rank), METHODS[method], "-", "-", "-", "-", "-"))
            continue
        counts = sum(r["params"] for r in done) / len(done)
        scores = [spread([r[key] for r in done]) for key in ("one_shot", "tuned", "dense")]
        lines.append((data, str(rank), METHODS[method], f"{counts:,.0f}", f"{DENSE_PARAMS / counts:.1f}", *scores))
    intro = "Test accuracy in per cent, mean ± standard deviation over the seeds; rank is that of the flexible layer."
    path.write_text("\n".join([intro, "", *markdown(headings, lines)]) + "\n", encoding="utf-8")


def write_plot(rows: Rows, path: Path) -> None:
    """Draw accuracy without tuning against parameters, and the activations of one layer."""
    names = list(dict.fromkeys(r["data"] for r in rows.values()))
    figure, axes = panels(len(names) + 1)
    for axis, data in zip(axes, names, strict=False):
        for method in METHODS:
            done = [r for r in rows.values() if r["data"] == data and r["method"] == method and "missing" not in r]
            done.sort(key=lambda r: r["params"])
            xs = [r["params"] for r in done]
            axis.plot(xs, [r["one_shot"] for r in done], "o", color=COLOURS[method], label=METHODS[method], ms=4)
            axis.plot(xs, [r["tuned"] for r in done], "+", color=COLOURS[method], ms=7)
        axis.set(title=data, xlabel="parameters of the block", ylabel="accuracy, %", xscale="log")
        axis.legend(fontsize=7)
    first = next(r for r in rows.values() if "curves" in r)
    for curve in first["curves"]:
        axes[-1].plot([-1 + k / 20 for k in range(len(curve))], curve, lw=1)
    axes[-1].set(title=f"activations, {first['data']}, rank {first['rank']}", xlabel="u", ylabel="g(u)")
    finish(figure, "A dense block as one flexible layer (o: one shot, +: one epoch)", path)
