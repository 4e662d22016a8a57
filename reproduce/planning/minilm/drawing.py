"""The table and the picture of the rows that `run` has made."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels

SETS = ("STS-B", "Shakespeare")
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {
    "plain SVD": "#999999",
    "FWSVD": "#e69f00",
    "ASVD": "#d55e00",
    "whitening": "#0072b2",
    "outputs": "#cc79a7",
    "loss": "#56b4e9",
    "tempered loss": "#f0e442",
    "ours": "#009e73",
}


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    words = [row["rule"], row["texts"], f"{row['ratio']:.0%}", f"Spearman {row['spearman']:.2f}"]
    if "seconds" in row:
        words.append(f"{row['seconds']:.0f} s")
    return " | ".join(word for word in words if word)


def write_table(rows: Rows, path: Path) -> None:
    """Write one table for each set of texts, and what recalibration did."""
    dense = rows["dense"]
    parts = [
        "Spearman's correlation in per cent on 1,000 development pairs of the STS benchmark that no rule has seen, by",
        "share of the parameters of the linear layers kept; nothing was trained. Bold: the best of its column.",
        f"Dense: {dense['spearman']:.2f} ({dense['all pairs']:.2f} on all 1,500 pairs).",
    ]
    for texts in SETS:
        if any(row["texts"] == texts for row in rows.values()):
            parts += ["", f"Calibrated on {texts}:", "", *markdown(*_by_ratio(rows, texts))]
    parts += ["", "Relative error of the outputs on the calibration texts, before and after recalibration:", ""]
    parts += markdown(*_recalibrated(rows))
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _ratios(rows: Rows) -> list[float]:
    return sorted({row["ratio"] for row in rows.values()} - {1.0}, reverse=True)


def _found(rows: Rows, rule: str, texts: str, ratio: float) -> Row | None:
    wanted = [(rule, texts, ratio), (rule, "", ratio)]
    return next((row for row in rows.values() if (row["rule"], row["texts"], row["ratio"]) in wanted), None)


def _rules(rows: Rows) -> list[str]:
    return [rule for rule in dict.fromkeys(row["rule"] for row in rows.values()) if rule != "dense"]


def _by_ratio(rows: Rows, texts: str) -> tuple[list[str], list[list[str]]]:
    ratios = _ratios(rows)
    columns = {r: {rule: _found(rows, rule, texts, r) for rule in _rules(rows)} for r in ratios}
    best = {r: max((row["spearman"] for row in column.values() if row), default=0) for r, column in columns.items()}
    lines = []
    for rule in _rules(rows):
        cells = [_cell(columns[ratio][rule], best[ratio]) for ratio in ratios]
        lines.append([rule, *cells])
    shares = [f"{100 * best[ratio] / rows['dense']['spearman']:.1f} %" for ratio in ratios]
    return ["rule", *(f"{ratio:.0%}" for ratio in ratios)], [*lines, ["best, of dense", *shares]]


def _cell(row: Row | None, best: float) -> str:
    if row is None:
        return ""
    return f"**{row['spearman']:.2f}**" if row["spearman"] == best else f"{row['spearman']:.2f}"


def _recalibrated(rows: Rows) -> tuple[list[str], list[list[str]]]:
    found = [row for row in rows.values() if "after" in row]
    errors = [[f"{row[name]:.4f}" for name in ("before", "after")] for row in found]
    return ["texts", "kept", "before", "after", "seconds"], [
        [row["texts"], f"{row['ratio']:.0%}", *pair, f"{row['seconds']:.0f}"]
        for row, pair in zip(found, errors, strict=True)
    ]


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the correlation over the share kept, a panel for each set of texts."""
    figure, axes = panels(2, width=10.5, height=4.6)
    for axis, texts in zip(axes, SETS, strict=True):
        _draw(axis, rows, texts)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    finish(figure, "all-MiniLM-L6-v2 without training", path)


def _draw(axis: Axes, rows: Rows, texts: str) -> None:
    axis.axhline(rows["dense"]["spearman"], color="#222222", linewidth=1, linestyle=":", label="dense")
    for rule in _rules(rows):
        points = [(100 * r, row["spearman"]) for r in _ratios(rows) if (row := _found(rows, rule, texts, r))]
        if points:
            name, allocated, _ = rule.partition(", allocated")
            solid = bool(allocated) or name == "ours"
            axis.plot(
                *zip(*points, strict=True), color=COLOURS[name], marker="o" if solid else "s", markersize=4,
                linestyle="-" if solid else "--", label=rule, alpha=1 if solid else 0.7,
            )  # fmt: skip
    axis.set_xlim(92, 48)
    axis.set_xticks([90, 80, 70, 60, 50])
    axis.set_xlabel("parameters of the linear layers kept (%)")
    axis.set_title(f"Spearman (%), calibrated on {texts}", loc="left", fontsize=10.5)
