"""Plots of plans, reports and spectra (needs matplotlib, the extra `plots`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankfold._common import atomic_path
from rankfold.errors import RankfoldError
from rankfold.planning import Plan
from rankfold.reports import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito (2008), which can be distinguished with any colour vision.
COLOURS = {"dense": "#b8b8b8", "svd": "#0072b2", "cp": "#e69f00", "tucker": "#009e73", "tt": "#cc79a7"}
OTHER = "#56b4e9"
PANELS = 5  # per row of spectra
FLOOR = 1e-4  # of the largest value of a spectrum; smaller values are drawn here
INK, PLAIN, FAINT = "#333333", "#5a6b7b", "#dddddd"
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.dpi": 150,
}


def plot_report(report: Report, path: str | Path) -> Path:
    """Draw how much of the model is kept and its accuracy, next to the error of every layer.

    Args:
        report: what `rankfold.report` returned.
        path: the file to write; its suffix determines the format (.png, .svg, .pdf).

    Returns:
        The path.

    Raises:
        RankfoldError: matplotlib is missing or does not know the suffix.
    """
    layers = [layer for layer in report.layers if layer.weight_error is not None]

    def draw(figure: Figure) -> None:
        whole, errors = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_shares(whole, report)
        _draw_bars(
            errors,
            [layer.name for layer in layers],
            [layer.weight_error or 0.0 for layer in layers],
            [layer.method for layer in layers],
        )
        errors.set_title("Error of each layer's weight")
        errors.set_xlabel("relative Frobenius error")
        predicted = [math.nan if layer.predicted_error is None else layer.predicted_error for layer in layers]
        errors.scatter(predicted, range(len(layers)), marker="|", s=70, color=INK, label="predicted", zorder=3)
        _legend(errors, [layer.method for layer in layers])

    return _draw(draw, path, lines=max(4, len(layers)))


def plot_plan(plan: Plan, path: str | Path) -> Path:
    """Draw the parameters that a plan keeps in each layer, and the error that it predicts.

    Args:
        plan: any plan.
        path: the file to write; its suffix determines the format (.png, .svg, .pdf).

    Returns:
        The path.

    Raises:
        RankfoldError: matplotlib is missing or does not know the suffix.
    """
    names, choices = list(plan.layers), list(plan.layers.values())
    methods = [choice.method for choice in choices]

    def draw(figure: Figure) -> None:
        params, errors = figure.subplots(1, 2, sharey=True)
        params.barh(range(len(names)), [choice.dense.params or 0 for choice in choices], color=FAINT, height=0.7)
        _draw_bars(params, names, [choice.params or 0 for choice in choices], methods)
        params.set_title("Parameters kept, of those before")
        params.xaxis.set_major_formatter(lambda value, _: _short(value))
        _draw_bars(errors, names, [choice.error or 0.0 for choice in choices], methods)
        errors.set_title("Predicted error")
        errors.set_xlabel("relative Frobenius error")
        errors.tick_params(labelleft=False)
        _legend(errors, methods)

    return _draw(draw, path, lines=len(names))


def plot_spectra(spectra: Sequence[Mapping[str, Tensor]], path: str | Path) -> Path:
    """Draw the singular values of every layer over the epochs of a training run, one panel per layer.

    Args:
        spectra: what `spectrum()` of a training method returned, epoch by epoch.
        path: the file to write; its suffix determines the format (.png, .svg, .pdf).

    Returns:
        The path.

    Raises:
        RankfoldError: there are no spectra, or matplotlib is missing or does not know the suffix.
    """
    names = list(spectra[0]) if spectra else []
    if not names:
        raise RankfoldError("there is no spectrum to draw: collect run.spectrum() after each epoch")

    def draw(figure: Figure) -> None:
        rows = math.ceil(len(names) / PANELS)
        panels = figure.subplots(rows, min(PANELS, len(names)), sharex=True, squeeze=False).ravel()
        for panel, name in zip(panels, names, strict=False):
            curves = [spectrum[name].clamp_min(FLOOR * float(spectrum[name][0])).tolist() for spectrum in spectra]
            panel.plot(range(len(curves)), curves, color=COLOURS["svd"], linewidth=0.7, alpha=0.6)
            panel.set_yscale("log")
            panel.set_title(name or "the model", fontsize=8)
            panel.tick_params(labelsize=7)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        figure.supxlabel("epoch", fontsize=9)
        figure.supylabel("singular value", fontsize=9)

    return _draw(draw, path, lines=6 * math.ceil(len(names) / PANELS))


def _draw(draw: Callable[[Figure], None], path: str | Path, *, lines: int) -> Path:
    """Draw on a figure high enough for this many lines and save it, without touching pyplot's state."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise RankfoldError(f"pictures need matplotlib: pip install 'rankfold[plots]' ({problem})") from problem
    path = Path(path)
    with rc_context(SETTINGS):  # type: ignore[arg-type]  # its keys are literals
        figure = Figure(figsize=(9.5, 1.4 + 0.24 * lines), layout="constrained")
        form = path.suffix.removeprefix(".")
        known = figure.canvas.get_supported_filetypes()
        if form not in known:
            raise RankfoldError(
                f"{path.name}: the format of a picture must be one of {', '.join(sorted(known))}, got {form!r}"
            )
        draw(figure)
        with atomic_path(path) as unfinished:
            figure.savefig(unfinished, format=form)
    return path


def _draw_shares(axes: Axes, report: Report) -> None:
    """Draw the fraction of the dense model that is left; values that were not measured have no bar."""
    before, after = report.rows[0], report.rows[-1]
    shares: dict[str, tuple[float, str]] = {
        "parameters": (after.params / before.params, f"{_short(before.params)} → {_short(after.params)}"),
        "bytes": (after.bytes / before.bytes, f"{_short(before.bytes)} → {_short(after.bytes)}"),
    }
    if before.macs and after.macs:
        shares["MACs"] = (after.macs / before.macs, f"{_short(before.macs)} → {_short(after.macs)}")
    if before.latency and after.latency:
        milliseconds = f"{1e3 * before.latency.median:.3g} → {1e3 * after.latency.median:.3g} ms"
        shares["latency"] = (1 / after.latency.ratio, milliseconds)
    if before.accuracy and after.accuracy:
        shares["accuracy"] = (after.accuracy / before.accuracy, f"{before.accuracy:.4g} → {after.accuracy:.4g}")
    names, values = list(shares), [share for share, _ in shares.values()]
    axes.barh(names, [1.0] * len(names), color=FAINT, height=0.62)
    axes.barh(names, values, color=PLAIN, height=0.62)
    for line, (share, text) in enumerate(shares.values()):
        axes.text(max(share, 1.0) + 0.03, line, f"{share:.0%}  ({text})", va="center", color=INK, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05 * max(1.0, *values))
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "dense"])
    axes.set_title("After, as a share of before")


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], methods: Sequence[str]) -> None:
    lines = range(len(names))
    axes.barh(lines, values, color=[COLOURS.get(method, OTHER) for method in methods], height=0.7)
    axes.set_yticks(lines, names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)  # first layer on top
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _legend(axes: Axes, methods: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=COLOURS.get(m, OTHER), label=m) for m in dict.fromkeys(methods)]
    marks, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(handles=[*handles, *marks], loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)


def _short(value: float) -> str:
    """Return a number with three digits and k, M or G."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
