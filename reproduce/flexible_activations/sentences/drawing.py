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
DENSE_PARAMS, BLOCKS = 2 * 384 * 1536 + 1536 + 384, 6


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    if row["method"] == "dense":
        return f"dense | Spearman {row['spearman']:.2f}"
    head = f"block {row['block']} | rank {row['rank']} | {row['method']} | {row['params']} | {row['seconds']:.0f} s"
    return f"{head} | error {row['error']:.3f}" + (f" | Spearman {row['spearman']:.2f}" if "spearman" in row else "")


def _cases(rows: Rows) -> dict[tuple[str, int], list[Row]]:
    """Return the rows that have a score, by block and rank."""
    cases: dict[tuple[str, int], list[Row]] = {}
    for row in rows.values():
        if row["method"] != "dense" and "spearman" in row:
            cases.setdefault((str(row["block"]), row["rank"]), []).append(row)
    return dict(sorted(cases.items()))


def write_table(rows: Rows, path: Path) -> None:
    """Write error and score, block by block and rank by rank."""
    dense = rows["dense"]["spearman"]
    parts = [
        f"MLP blocks of {DENSE_PARAMS:,} parameters replaced, one at a time or all six at once, nothing trained after.",
        "Error: of a block's values on held-out tokens of the dense encoder, relative, from their mean; of all six,",
        "their mean. Spearman: in per cent on the 1,000 pairs of STS-B dev that nothing was fitted on (dense:",
        f"{dense:.2f}). Bold: the best of its block and size. Seconds of processor time.",
        "",
    ]
    lines = []
    for (block, _), group in _cases(rows).items():
        best = max(row["spearman"] for row in group), min(row["error"] for row in group)
        whole = DENSE_PARAMS * (1 if block.isdigit() else BLOCKS)
        for row in group:
            score, error = f"{row['spearman']:.2f}", f"{row['error']:.3f}"
            score = f"**{score}**" if row["spearman"] == best[0] else score
            error = f"**{error}**" if row["error"] == best[1] else error
            cells = [block, METHODS[row["method"]], f"{row['params']:,}", f"{whole / row['params']:.1f}", error, score]
            lines.append([*cells, f"{row['seconds']:.0f}"])
    headings = ("block", "method", "parameters", "times fewer", "error", "Spearman", "seconds")
    path.write_text("\n".join([*parts, *markdown(headings, lines)]) + "\n", encoding="utf-8")


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the errors of single blocks, and the score with one and with all of them replaced, method by method."""
    cases = _cases(rows)
    blocks = list(dict.fromkeys(block for block, _ in cases))
    figure, axes = panels(2 * len(blocks), width=4.2 * len(blocks), height=3.6)
    for k, block in enumerate(blocks):
        for axis, key in zip(axes[2 * k : 2 * k + 2], ("error", "spearman"), strict=True):
            for method, name in METHODS.items():
                points = [
                    (row["params"], row[key])
                    for (b, _), group in cases.items()
                    for row in group
                    if (b, row["method"]) == (block, method)
                ]
                axis.plot(*zip(*sorted(points), strict=True), "o-", color=COLOURS[method], label=name)
            unit = "Spearman (%)" if key == "spearman" else key
            axis.set_title(f"{'all six' if block == 'all' else f'block {block}'}: {unit}", loc="left", fontsize=10)
            axis.set(xlabel="parameters", xscale="log")
        axes[2 * k + 1].axhline(rows["dense"]["spearman"], color="#222222", lw=1, ls=":")
        axes[2 * k].set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    finish(figure, "MLP blocks of all-MiniLM-L6-v2 replaced (dotted: dense)", path)
