"""The table and the picture of the rows that `run` has made."""

from __future__ import annotations

from pathlib import Path

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels

METHODS = {
    "flexible": "flexible",
    "svd": "SVD of both weights",
    "aware": "data-aware SVD of both",
    "affine": "affine map of reduced rank",
    "narrow": "narrow GELU block, fitted from scratch",
}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = dict(zip(METHODS, "#d55e00 #0072b2 #56b4e9 #cc79a7 #222222".split(), strict=True))
DENSE_PARAMS = 2 * 384 * 1536 + 1536 + 384


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    if row["method"] == "dense":
        return f"dense | Spearman {row['spearman']:.2f}"
    head = f"block {row['block']} | rank {row['rank']} | {row['method']} | {row['params']} | {row['seconds']:.0f} s"
    return f"{head} | error {row['error']:.3f} | Spearman {row['spearman']:.2f}"


def write_table(rows: Rows, path: Path) -> None:
    """Write error and score, block by block and rank by rank."""
    dense = rows["dense"]["spearman"]
    parts = [
        f"One MLP block of {DENSE_PARAMS:,} parameters replaced, nothing trained after. Error: of the block's values",
        "on held-out tokens, relative, from their mean. Spearman: in per cent on the 1,000 pairs of STS-B dev that",
        f"nothing was fitted on (dense: {dense:.2f}). Bold: the best of its block and size. Seconds of processor time.",
        "",
    ]
    lines = []
    done = [row for row in rows.values() if row["method"] != "dense"]
    for block, rank in sorted({(row["block"], row["rank"]) for row in done}):
        group = [row for row in done if (row["block"], row["rank"]) == (block, rank)]
        best = max(row["spearman"] for row in group), min(row["error"] for row in group)
        for row in group:
            score, error = f"{row['spearman']:.2f}", f"{row['error']:.3f}"
            score = f"**{score}**" if row["spearman"] == best[0] else score
            error = f"**{error}**" if row["error"] == best[1] else error
            times = f"{DENSE_PARAMS / row['params']:.1f}"
            cells = [str(block), METHODS[row["method"]], f"{row['params']:,}", times, error, score]
            lines.append([*cells, f"{row['seconds']:.0f}"])
    headings = ("block", "method", "parameters", "times fewer", "error", "Spearman", "seconds")
    path.write_text("\n".join([*parts, *markdown(headings, lines)]) + "\n", encoding="utf-8")


def write_plot(rows: Rows, path: Path) -> None:
    """Draw, for each block and size, the error of the block and the score of the encoder, method by method."""
    done = [row for row in rows.values() if row["method"] != "dense"]
    cases = sorted({(row["block"], row["rank"]) for row in done})
    figure, axes = panels(2 * len(cases), width=12, height=3)
    for k, case in enumerate(cases):
        group = {row["method"]: row for row in done if (row["block"], row["rank"]) == case}
        names = [METHODS[method] for method in group]
        for axis, key in zip(axes[2 * k : 2 * k + 2], ("error", "spearman"), strict=True):
            axis.scatter([row[key] for row in group.values()], names, c=[COLOURS[method] for method in group])
            axis.set_title(
                f"Block {case[0]}: {'Spearman (%)' if key == 'spearman' else key}", loc="left", fontsize=10.5
            )
            axis.invert_yaxis()
            if axis is not axes[0]:
                axis.set_yticklabels([])
        axes[2 * k + 1].axvline(rows["dense"]["spearman"], color="#222222", lw=1, ls=":")
    finish(figure, "One MLP block of all-MiniLM-L6-v2 with 46 times fewer parameters (dotted: dense)", path)
