"""The table and the picture of the rows that `run` has made."""

from __future__ import annotations

import statistics
from pathlib import Path

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

FUNCTIONS = {
    "two": "two layers, values and Jacobians",
    "values": "two layers, values alone",
    "one": "one layer, values and Jacobians",
}
NETWORK = {
    "solved": "one layer, solved, then fitted",
    "one": "one layer, fitted from scratch",
    "two": "two layers, fitted from scratch",
}
FOUND = 1e-3  # error of the values that counts as found
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {"solved": "#222222", "one": "#0072b2", "two": "#d55e00", "values": "#56b4e9"}


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    head = f"{row['part']} | rank {row['rank']} | seed {row['seed']} | {row['method']} | error {row['error']:.2g}"
    return head + (f" | accuracy {row['accuracy']:.2f}" if "accuracy" in row else "")


def _groups(rows: Rows, part: str) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows.values():
        if row["part"] == part:
            groups.setdefault((row["rank"], row["method"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: item[0][0]))


def write_table(rows: Rows, path: Path) -> None:
    """Write how often functions of two layers are found, then what takes the place of a network."""
    lines = []
    for (rank, method), group in _groups(rows, "functions").items():
        starts = [error for row in group for error in row["errors"]]
        errors = [row["error"] for row in group]
        cosines = [row["cosine"] for row in group if row["cosine"] is not None]
        cells = [str(rank), FUNCTIONS[method], str(len(group))]
        cells += [f"{100 * sum(e < FOUND for e in few) / len(few):.0f} %" for few in (starts, errors)]
        cells += [f"{statistics.median(errors):.1e}", f"{statistics.median(cosines):.3f}" if cosines else ""]
        lines.append([*cells, f"{statistics.median(row['seconds'] for row in group):.1f}"])
    heads = (
        "ranks",
        "fitted",
        "functions",
        "starts that find it",
        "best of 4 finds it",
        "error",
        "directions",
        "seconds",
    )
    parts = [
        "Random functions that are two flexible layers of equal ranks (6 inputs, 6 outputs, cubic polynomials), fitted",
        f"at 100 samples. Found: relative error of the values at 400 other inputs below {FOUND:g}. Error: median over",
        "functions of the start of least cost; directions: the same of the least cosine of the first layer's weights",
        "with the true ones. One layer has as many parameters. Seconds of processor time per start.",
        "",
        *markdown(heads, lines),
        "",
    ]
    lines = []
    for (_, method), group in _groups(rows, "network").items():
        params = group[0]["params"]
        cells = [NETWORK[method], f"{params:,}", f"{group[0]['dense_params'] / params:.0f}", str(len(group))]
        cells += [spread([row[name] for row in group], digits) for name, digits in (("accuracy", 2), ("error", 3))]
        lines.append([*cells, f"{statistics.median(row['seconds'] for row in group):.0f}"])
    dense = spread(list({row["seed"]: row["dense"] for row in rows.values() if row["part"] == "network"}.values()))
    parts += [
        "The perceptron 784, 300, 100, 10 trained on Fashion-MNIST as one block, fitted to its values at 20,000 of the",
        "training images, without labels; accuracy and error of the values on the test images, mean ± sd over seeds",
        f"(dense {dense}).",
        "",
        *markdown(("in its place", "parameters", "times fewer", "seeds", "accuracy", "error", "seconds"), lines),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the errors of all functions, method by method, and the accuracies in place of the network."""
    figure, axes = panels(2)
    groups = _groups(rows, "functions")
    places = {method: 0.22 * (k - 1) for k, method in enumerate(FUNCTIONS)}
    for (rank, method), group in groups.items():
        errors = [row["error"] for row in group]
        label = FUNCTIONS[method] if rank == min(rank for rank, _ in groups) else None
        axes[0].scatter([rank + places[method]] * len(errors), errors, s=18, color=COLOURS[method], label=label)
    axes[0].axhline(FOUND, color="#888888", linewidth=0.8, linestyle=":")
    axes[0].set(yscale="log", xlabel="ranks of both layers", ylabel="relative error of the values")
    axes[0].set_xticks(sorted({rank for rank, _ in groups}))
    axes[0].set_title("functions of two layers", loc="left", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    network = _groups(rows, "network")
    for method, name in NETWORK.items():
        points = [
            (group[0]["params"], [row["accuracy"] for row in group]) for (_, m), group in network.items() if m == method
        ]
        if points:
            size, accuracies = zip(*points, strict=True)
            means = [statistics.mean(few) for few in accuracies]
            axes[1].plot(size, means, "o-", color=COLOURS[method], label=name)
    axes[1].set(xlabel="parameters", ylabel="accuracy, %")
    axes[1].set_title("a perceptron on Fashion-MNIST", loc="left", fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    finish(figure, "Two flexible layers in a row: an experiment", path)
