"""The table and the picture of the rows that `run` has measured."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels

STAGES = {
    "one_shot": "one shot",
    "batchnorm": "BatchNorm",
    "recalibrated": "recalibrated",
    "both": "both",
    "decided": "decided",
    "tuned": "3 epochs",
}
DRAWN = {"one_shot": "One shot", "recalibrated": "Recalibrated, no gradient step: another scale"}
SCALES = {"one_shot": (0, 100), "recalibrated": (70, 95)}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
STYLES = {
    "svd": ("#0072b2", "o", "SVD"),
    "tucker": ("#009e73", "s", "Tucker"),
    "cp": ("#e69f00", "^", "CP"),
    "svd+tucker": ("#56b4e9", "v", "SVD and Tucker"),
    "mix": ("#222222", "*", "planner's mix"),
}
RULES = ("optimal", "uniform", "energy", "evbmf")
METRICS = ("outputs", "weights", "fisher", "fwsvd", "asvd", "whitening")
RECOMMENDED = ("mix", "optimal", "outputs", "calibrated")  # what `rf.compress` does with a loader and these methods
HEADINGS = (
    "MACs ≤",
    "methods",
    "ranks",
    "metric",
    "objective",
    "MACs",
    "params",
    "output error, predicted",
    "measured",
)


def write_table(rows: Rows, path: Path) -> None:
    """Write every row, grouped by budget, and the best of each budget."""
    body = [
        "Top-1 in per cent; in brackets the difference to dense on the same 1,000 images ± its standard error.",
        "",
        *markdown([*HEADINGS, *STAGES.values(), "layers"], [_cells(row) for row in ordered(rows)]),
        "",
        "The best of each budget without a gradient step:",
        "",
        *markdown(*_best(rows)),
    ]
    path.write_text("\n".join(body) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    return " | ".join(_cells(row))


def ordered(rows: Rows) -> list[Row]:
    """Return the dense row, then the others by budget, methods, rule and metric."""

    def place(row: Row) -> tuple[float, int, int, int, str]:
        if row["method"] == "dense":
            return (-2.0, 0, 0, 0, "")
        kinds = list(STYLES).index(row["method"]), RULES.index(row["rule"]), METRICS.index(row["metric"])
        return (-row["budget"], *kinds, row["objective"])

    return sorted(rows.values(), key=place)


def _cells(row: Row) -> list[str]:
    if row["method"] == "dense":
        sizes = [f"{row['macs'] / 1e6:.1f} M", f"{row['params'] / 1e3:.0f} k"]
        return ["", "dense", "", "", "", *sizes, "0", "0", *(_score(row, stage) for stage in STAGES), ""]
    start = [f"{row['budget']:.0%}", row["method"], row["rule"], row["metric"], row["objective"]]
    if "refused" in row:
        return [*start, *[""] * (len(HEADINGS) + len(STAGES) - 5), row["refused"].replace("|", "/")]
    kept = [f"{row['macs_kept']:.1%}", f"{row['params_kept']:.1%}"]
    errors = [f"{row['predicted']:.3f}", f"{row['one_shot']['output_error']:.3f}"]
    used = ", ".join(f"{count} {name}" for name, count in sorted(row["used"].items(), key=lambda item: -item[1]))
    return [*start, *kept, *errors, *(_score(row, stage) for stage in STAGES), used]


def stage_of(row: Row, stage: str) -> Row | None:
    """Return a stage of a row; "decided" is what `compress` keeps: that of the least error on the calibration data."""
    if stage != "decided":
        return row.get(stage)
    names = ("recalibrated", "both") if "recalibrated" in row else ("one_shot", "batchnorm")
    found = [row[name] for name in names if name in row]
    return min(found, key=lambda one: one["output_error"]) if found else None


def _score(row: Row, stage: str) -> str:
    score = stage_of(row, stage)
    return "" if score is None else f"{score['top1']:.1f} ({score['difference']:+.1f} ± {score['se']:.1f})"


def _best(rows: Rows) -> tuple[list[str], list[list[str]]]:
    headings = ["MACs ≤", "planner's mix on outputs", "best other", "top-1 of the mix", "of the other"]
    lines = []
    for mix in ordered(rows):
        if _what(mix) != RECOMMENDED:
            continue
        others = [
            row for row in rows.values() if row.get("budget") == mix["budget"] and row is not mix and "plan" in row
        ]
        if others:
            best = max(others, key=lambda row: stage_of(row, "decided")["top1"])
            name = f"{best['method']}, {best['rule']}, {best['metric']}, {best['objective']}"
            scores = [_score(row, "decided") for row in (mix, best)]
            lines.append([f"{mix['budget']:.0%}", "optimal, calibrated", name, *scores])
    return headings, lines


def write_plot(rows: Rows, path: Path) -> None:
    """Draw top-1 against the MACs kept: a colour per method, full on outputs, dashed on weights."""
    figure, axes = panels(len(DRAWN))
    for axis, stage in zip(axes, DRAWN, strict=True):
        _draw(axis, stage, rows)
    axes[0].set_ylabel("top-1 on 1,000 test images (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    finish(figure, "ResNet-20 on CIFAR-10 from 1,000 images, at equal MACs (dashed: planned on weights)", path)


def _draw(axis: Axes, stage: str, rows: Rows) -> None:
    axis.axhline(rows["dense"]["one_shot"]["top1"], color="#888888", linestyle=":", linewidth=1.5, label="dense")
    for method, (colour, marker, name) in STYLES.items():
        for metric, style in (("outputs", "-"), ("weights", "--")):
            wanted = (method, "optimal", metric, "squares")
            wanted = RECOMMENDED if wanted[:3] == RECOMMENDED[:3] else wanted
            chosen = [row for row in ordered(rows) if _what(row) == wanted and stage in row]
            points = [(100 * row["macs_kept"], row[stage]["top1"]) for row in chosen]
            if points:
                known = metric == "outputs"
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=style,
                    linewidth=1.8 if known else 1,
                    marker=marker if known else None,
                    markeredgecolor="white",
                    label=name if known else None,
                )
    axis.set_title(DRAWN[stage], loc="left", fontsize=10.5)
    axis.set_xlabel("MACs kept (%)")
    axis.invert_xaxis()
    axis.set_ylim(SCALES[stage])


def _what(row: Row) -> tuple[str | None, ...]:
    return tuple(row.get(key) for key in ("method", "rule", "metric", "objective"))
