"""The table and the picture of the rows that `run` has measured."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from reproduce.harness import Row
from reproduce.tables import markdown

STAGES = {"one_shot": "one shot", "batchnorm": "BatchNorm re-estimated", "tuned": "one epoch of tuning"}
TITLES = {
    "one_shot": "One shot",
    "batchnorm": "BatchNorm re-estimated",
    "tuned": "One epoch of fine-tuning",
}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
STYLES = {
    "svd": ("#0072b2", "o", "SVD"),
    "tucker": ("#009e73", "s", "Tucker"),
    "cp": ("#e69f00", "^", "CP"),
    "tt": ("#cc79a7", "D", "tensor train"),
    "mix": ("#222222", "*", "planner's mix"),
}
HEADINGS = (
    "MACs ≤",
    "method",
    "ranks",
    "MACs",
    "params",
    "Σ error², predicted",
    "Σ error², measured",
    *STAGES.values(),
    "layers",
)


def write_table(rows: dict[str, Row], path: Path) -> None:
    """Write every row, grouped by budget, and the comparison that the issue of equal MACs is about."""
    dense = rows["dense"]
    body = [
        "Top-1 in per cent; in brackets the difference to dense on the same 1,000 images ± its standard error.",
        "",
        *markdown(HEADINGS, [_dense_cells(dense), *(_cells(row) for row in _planned(rows))]),
        "",
        "The planner's mix beside the best that a single method reaches with uniform or EVBMF ranks:",
        "",
        *markdown(*_comparison(rows)),
    ]
    path.write_text("\n".join(body) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    cells = _dense_cells(row) if row["method"] == "dense" else _cells(row)
    return " | ".join(cells)


def _planned(rows: dict[str, Row]) -> list[Row]:
    order = ["optimal", "uniform", "uniform, classifier kept", "evbmf"]
    planned = [row for row in rows.values() if row["method"] != "dense"]
    return sorted(
        planned, key=lambda row: (-row["budget"], list(STYLES).index(row["method"]), order.index(row["rule"]))
    )


def _dense_cells(row: Row) -> list[str]:
    whole = [f"{row['macs'] / 1e6:.1f} M", f"{row['params'] / 1e3:.0f} k"]
    return ["", "dense", "", *whole, "0", "0", *(_score(row, stage) for stage in STAGES), ""]


def _cells(row: Row) -> list[str]:
    start = [f"{row['budget']:.0%}", row["method"], row["rule"]]
    if "refused" in row:
        return [*start, *[""] * (len(HEADINGS) - 4), row["refused"].replace("|", "/")]
    kept = [f"{row['macs_kept']:.1%}", f"{row['params_kept']:.1%}"]
    errors = [f"{row['predicted']:.3f}", f"{row['measured']:.3f}"]
    used = ", ".join(f"{count} {name}" for name, count in sorted(row["used"].items(), key=lambda item: -item[1]))
    return [*start, *kept, *errors, *(_score(row, stage) for stage in STAGES), used]


def _score(row: Row, stage: str) -> str:
    if stage not in row:
        return ""
    score = row[stage]
    return f"{score['top1']:.1f} ({score['difference']:+.1f} ± {score['se']:.1f})"


def _comparison(rows: dict[str, Row]) -> tuple[list[str], list[list[str]]]:
    headings = ["MACs ≤", "Σ error²: mix", "best single", "top-1 after BatchNorm: mix", "best single", "mix - single"]
    lines = []
    for mix in _planned(rows):
        if (mix["method"], mix["rule"]) != ("mix", "optimal"):
            continue
        others = [
            row
            for row in _planned(rows)
            if row["budget"] == mix["budget"]
            and row["method"] != "mix"
            and row["rule"] != "optimal"
            and "refused" not in row
        ]
        least = min(others, key=lambda row: row["predicted"])
        best = max(others, key=lambda row: row["batchnorm"]["top1"])
        difference, error = _paired(mix["batchnorm"]["right"], best["batchnorm"]["right"])
        lines.append(
            [
                f"{mix['budget']:.0%}",
                f"{mix['predicted']:.3f}",
                f"{least['predicted']:.3f} ({least['method']}, {least['rule']})",
                f"{mix['batchnorm']['top1']:.1f}",
                f"{best['batchnorm']['top1']:.1f} ({best['method']}, {best['rule']})",
                f"{difference:+.1f} ± {error:.1f}",
            ]
        )
    return headings, lines


def _paired(a: str, b: str) -> tuple[float, float]:
    """Return the mean difference of two packed outcomes and its standard error, in per cent."""
    first, second = (bin(int("1" + digits, 16))[-4 * len(digits) :] for digits in (a, b))
    differences = [100 * (int(x) - int(y)) for x, y in zip(first, second, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    return mean, (sum((x - mean) ** 2 for x in differences) / (count - 1) / count) ** 0.5


def write_plot(rows: dict[str, Row], path: Path) -> None:
    """Draw top-1 against the MACs kept: a curve per method, a panel per stage of recovery."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 4.0), sharey=True, layout="constrained")
    for panel, stage in zip(panels, STAGES, strict=True):
        _draw(panel, stage, rows)
    panels[0].set_ylabel("top-1 on 1,000 test images (%)")
    figure.suptitle("ResNet-20 on CIFAR-10, compressed at equal MACs", x=0.01, ha="left", fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], color="#555555", linestyle="--", linewidth=1))
    labels.append("same method, uniform ranks")
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _draw(panel: Axes, stage: str, rows: dict[str, Row]) -> None:
    dense = rows["dense"][stage]["top1"]
    panel.axhline(dense, color="#888888", linestyle=":", linewidth=1.5, label="dense")
    for method, (colour, marker, name) in STYLES.items():
        for rule, style in (("optimal", "-"), ("uniform", "--")):
            points = _points(rows, method, rule, stage)
            if not points or (method, rule) == ("mix", "uniform"):
                continue
            planned = rule == "optimal"
            under = method == "cp" and planned  # the mix often is CP everywhere: its curve must show beneath
            panel.plot(
                *zip(*points, strict=True),
                color=colour,
                linestyle=style,
                linewidth=6 if under else 1.8 if planned else 1,
                marker=marker if planned else None,
                markersize={"mix": 11, "cp": 9}.get(method, 5.5),
                markeredgecolor="white",
                alpha=0.75 if under else 1,
                label=name if planned else None,
                zorder=3 if method == "mix" else 2,
            )
    panel.set_title(TITLES[stage], loc="left", fontsize=10.5)
    panel.set_xlabel("MACs kept (%)")
    panel.set_xticks(sorted({100 * row["budget"] for row in rows.values() if "budget" in row}))
    panel.invert_xaxis()
    panel.set_ylim(0, 100)
    panel.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)


def _points(rows: dict[str, Row], method: str, rule: str, stage: str) -> list[tuple[float, float]]:
    """Return (MACs kept, top-1) of a method at every budget, in per cent."""
    chosen = [row for row in _planned(rows) if (row["method"], row["rule"]) == (method, rule) and stage in row]
    return [(100 * row["macs_kept"], row[stage]["top1"]) for row in chosen]
