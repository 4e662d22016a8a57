"""Tables and pictures alike in all reproductions: markdown, numbers in words, the look of a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRID = "#e6e6e6"


def markdown(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * (lines[0].count(" | ") + 1), *lines[1:]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def number(value: float, digits: int = 3) -> str:
    """Return a positive number to this many significant digits at least, without an exponent."""
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(value)))}f}"


def panels(count: int, *, width: float = 10.5, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, list(axes[0])


def finish(figure: Figure, title: str, path: Path) -> None:
    """Put the title on a figure, write it and let it go."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=160)
    plt.close(figure)
