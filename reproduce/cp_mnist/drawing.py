"""The tables and the picture of the runs that `run` has made."""

from __future__ import annotations

import statistics
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread

DENSE_WEIGHTS = 990  # 10·1·3·3 + 10·10·3·3
# Ganzha and Shaposhnikova 2021, Table 1: test accuracy in per cent and compression, by rank.
PUBLISHED = {None: (98.34, 1.0), 3: (97.12, 7.7), 6: (97.95, 3.8), 9: (97.67, 2.6)}
# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {None: "#222222", 3: "#d55e00", 6: "#e69f00", 9: "#0072b2"}
NAMES = {None: "base", 3: "CP, rank 3", 6: "CP, rank 6", 9: "CP, rank 9"}


def line(row: Row) -> str:
    """Return a run on one line, for a person who waits."""
    words = [row["kind"], NAMES[row["rank"]], f"seed {row['seed']}"]
    if "one_shot" in row:
        words.append(f"one shot {row['one_shot']['accuracy']:.2f}")
    epochs = ", ".join(f"{epoch['accuracy']:.2f} ({epoch['seconds']:.0f} s)" for epoch in row["epochs"])
    return " | ".join([*words, epochs])


def write_table(rows: Rows, path: Path) -> None:
    """Write what the paper's Table 1 has, the networks made of the trained base, and the epochs."""
    parts = [
        "Test accuracy in per cent, mean ± standard deviation over the seeds; compression is 990 / (weights of both",
        "convolutions), biases left out. Seconds: the fastest epoch of all runs, on one thread, with the test.",
        "",
        "Trained from scratch, five epochs:",
        "",
        *markdown(*_scratch(rows)),
        "",
        "Made of the trained base, then trained for one epoch:",
        "",
        *markdown(*_tuned(rows)),
        "",
        "From scratch with each stage initialised as torch initialises a convolution that stands alone:",
        "",
        *markdown(*_stages(rows)),
        "",
        "From scratch, mean over the seeds after each epoch:",
        "",
        *markdown(*_epochs(rows)),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _runs(rows: Rows, kind: str, rank: int | None) -> list[Row]:
    return [row for row in rows.values() if (row["kind"], row["rank"]) == (kind, rank)]


def _finals(runs: list[Row]) -> list[float]:
    return [run["epochs"][-1]["accuracy"] for run in runs]


def _scratch(rows: Rows) -> tuple[list[str], list[list[str]]]:
    headings = [
        "convolutions",
        "weights",
        "compression",
        "published",
        "accuracy",
        "each seed",
        "published",
        "ours - published",
        "seconds an epoch",
    ]
    lines = []
    for rank, (accuracy, compression) in PUBLISHED.items():
        runs = _runs(rows, "scratch", rank)
        if runs:
            finals, weights = _finals(runs), runs[0]["convolution_weights"]
            fastest = min(epoch["seconds"] for run in runs for epoch in run["epochs"])
            lines.append(
                [
                    *(NAMES[rank], f"{weights}", f"{DENSE_WEIGHTS / weights:.3f}", f"{compression:g}"),
                    *(spread(finals), ", ".join(f"{value:.2f}" for value in finals), f"{accuracy:.2f}"),
                    *(f"{statistics.mean(finals) - accuracy:+.2f}", f"{fastest:.1f}"),
                ]
            )
    return headings, lines


def _tuned(rows: Rows) -> tuple[list[str], list[list[str]]]:
    headings = ["convolutions", "error of conv1", "error of conv2", "one shot", "after one epoch", "from scratch"]
    lines = []
    for rank in PUBLISHED:
        runs = _runs(rows, "tuned", rank)
        errors = [spread([run["errors"][layer] for run in runs], 3) for layer in ("conv1", "conv2")]
        one_shot = spread([run["one_shot"]["accuracy"] for run in runs])
        finals = [spread(_finals(found)) for found in (runs, _runs(rows, "scratch", rank))]
        lines.append([NAMES[rank], *(errors if rank else ("", "")), one_shot, *finals])
    return headings, lines


def _stages(rows: Rows) -> tuple[list[str], list[list[str]]]:
    headings = ["convolutions", "accuracy", "each seed", "initialised by the library"]
    lines = []
    for rank in PUBLISHED:
        if runs := _runs(rows, "stages", rank):
            each = ", ".join(f"{value:.2f}" for value in _finals(runs))
            lines.append([NAMES[rank], spread(_finals(runs)), each, spread(_finals(_runs(rows, "scratch", rank)))])
    return headings, lines


def _means(rows: Rows, rank: int | None, name: str) -> list[float]:
    runs = _runs(rows, "scratch", rank)
    return [statistics.mean(values) for values in zip(*([e[name] for e in run["epochs"]] for run in runs), strict=True)]


def _epochs(rows: Rows) -> tuple[list[str], list[list[str]]]:
    names = {"train_loss": "training loss", "test_loss": "test loss", "accuracy": "test accuracy"}
    headings = ["convolutions", "epoch", *names.values()]
    lines = []
    for rank in PUBLISHED:
        columns = zip(*(_means(rows, rank, name) for name in names), strict=True)
        for epoch, (train, test, accuracy) in enumerate(columns, start=1):
            lines.append([NAMES[rank], f"{epoch}", f"{train:.4f}", f"{test:.4f}", f"{accuracy:.2f}"])
    return headings, lines


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the loss and the accuracy of each epoch, and the accuracies at the end beside the published ones."""
    figure, (loss, accuracy, final) = panels(3)
    _draw_curves(loss, rows, "train_loss")
    _draw_curves(accuracy, rows, "accuracy")
    _draw_finals(final, rows)
    loss.set_yscale("log")
    loss.set_yticks([0.05, 0.1, 0.2, 0.4], ["0.05", "0.1", "0.2", "0.4"])
    loss.minorticks_off()
    loss.set_title("Training loss", loc="left", fontsize=10.5)
    accuracy.set_title("Test accuracy (%)", loc="left", fontsize=10.5)
    accuracy.legend(frameon=False, loc="lower right")
    final.set_title("At the end (%)", loc="left", fontsize=10.5)
    final.legend(frameon=False, loc="lower right")
    finish(figure, "CP convolutions on MNIST", path)


def _draw_curves(panel: Axes, rows: Rows, name: str) -> None:
    """Draw the mean over the seeds, and a band from the least to the greatest."""
    for rank, colour in COLOURS.items():
        values = list(
            zip(*([epoch[name] for epoch in run["epochs"]] for run in _runs(rows, "scratch", rank)), strict=True)
        )
        if values:
            epochs = range(1, len(values) + 1)
            panel.plot(
                epochs, list(map(statistics.mean, values)), color=colour, marker="o", markersize=4, label=NAMES[rank]
            )
            panel.fill_between(
                epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
            )
            panel.set_xticks(epochs)
    panel.set_xlabel("epoch")


def _draw_finals(panel: Axes, rows: Rows) -> None:
    places = {rank: place for place, rank in enumerate(PUBLISHED)}
    panel.plot(
        places.values(), [accuracy for accuracy, _ in PUBLISHED.values()], "_", color="#888888", markersize=26,
        markeredgewidth=2, label="published",
    )  # fmt: skip
    kinds = {
        "scratch": ("#222222", "o", -0.12, "from scratch, 5 epochs"),
        "tuned": ("#009e73", "s", 0.12, "trained base decomposed, 1 epoch"),
    }
    for kind, (colour, marker, shift, label) in kinds.items():
        for rank, place in places.items():
            finals = _finals(_runs(rows, kind, rank))
            panel.plot(
                [place + shift] * len(finals), finals, marker, color=colour, markersize=5, alpha=0.7,
                label=None if rank else label,
            )  # fmt: skip
    panel.set_xticks(list(places.values()), ["base" if rank is None else f"rank {rank}" for rank in places])
    panel.set_xlim(-0.5, len(places) - 0.5)
    panel.set_ylim(bottom=96.2)  # room for the legend
