"""The tables and the picture of what `run` has counted and trained."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from reproduce.harness import Row, Rows
from reproduce.tables import finish, markdown, panels, spread
from reproduce.training import paired, unpacked

# Colours of Okabe and Ito (2008), told apart with any colour vision.
COLOURS = {"dense": "#222222", "TT-conv": "#0072b2", "naive": "#d55e00", "low rank": "#888888"}
NAMES = {"dense": "dense", "TT-conv": "TT-conv", "naive": "naive: train of the kernel", "low rank": "two convolutions"}
CLASSES = 10
CONV_FILTERS, FC_UNITS = 64 * 2 + 128 * 4, 1_536 + 512
# Parameters of the last layer and of BatchNorm, which are the same in the dense network.
OTHERS = {
    "TT-conv": (128 * CLASSES, 2 * CONV_FILTERS),
    "naive": (128 * CLASSES, 2 * CONV_FILTERS),
    "TT-conv-TT-fc": (512 * CLASSES + CLASSES, 2 * (CONV_FILTERS + FC_UNITS)),
}
# Garipov et al. 2016, official poster: compression of the whole network.
PUBLISHED = {"TT-conv": 3.23, "TT-conv-TT-fc": 41.65}


def line(row: Row) -> str:
    """Return a row on one line, for a person who waits."""
    if "layer" in row:
        return " | ".join(_count_cells(row))
    epochs = ", ".join(f"{epoch['accuracy']:.2f} ({epoch['seconds']:.0f} s)" for epoch in row["epochs"])
    return f"{NAMES[row['kind']]} | seed {row['seed']} | {row['weights']:,} | {epochs}"


def write_table(rows: Rows, path: Path) -> None:
    """Write the counts, their totals beside the published ones, the accuracies and their differences."""
    parts = [
        "Weights of each layer:",
        "",
        *markdown(COUNT_HEADINGS, [_count_cells(row) for row in rows.values() if "layer" in row]),
        "",
        "Whole networks: the weights of all these layers, then also what is the same in both networks:",
        "",
        *_totals(rows),
        "",
        "Accuracy in per cent on 5,000 images not trained on, mean ± standard deviation over the seeds:",
        "",
        *_accuracies(rows),
        "",
        "TT-conv against naive on the same images and seed, in points ± standard error over the images:",
        "",
        *_differences(rows),
    ]
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


COUNT_HEADINGS = ("layer", "bonds", "dense", "TT-conv", "naive", "TT-conv-TT-fc")


def _count_cells(row: Row) -> list[str]:
    bonds = "" if row["bonds"] is None else ", ".join(map(str, row["bonds"]))
    weights = [f"{row[name]:,}" if name in row else "" for name in COUNT_HEADINGS[2:]]
    return [row["layer"], bonds, *weights]


def _totals(rows: Rows) -> list[str]:
    counts = [row for row in rows.values() if "layer" in row]
    convolutions = [row for row in counts if row["layer"].startswith("conv")]
    lines = []
    for name, others in OTHERS.items():
        layers = counts if name.endswith("fc") else convolutions
        dense, train = (sum(row[column] for row in layers) for column in ("dense", name))
        ratios = [f"{(dense + more) / (train + more):.2f}" for more in (0, others[0], sum(others))]
        published = f"{PUBLISHED[name]:g}" if name in PUBLISHED else ""
        lines.append([name, f"{dense:,}", f"{train:,}", *ratios, published])
    headings = ["network", "dense weights", "weights", "times fewer", "with the last layer", "with BatchNorm too"]
    return markdown([*headings, "published"], lines)


def _runs(rows: Rows, kind: str) -> list[Row]:
    return [row for row in rows.values() if row.get("kind") == kind]


def _accuracies(rows: Rows) -> list[str]:
    lines = []
    for kind, name in NAMES.items():
        runs = _runs(rows, kind)
        if runs:
            epochs = list(zip(*([epoch["accuracy"] for epoch in run["epochs"]] for run in runs), strict=True))
            seconds = min(epoch["seconds"] for run in runs for epoch in run["epochs"])
            each = ", ".join(f"{value:.2f}" for value in epochs[-1])
            lines.append([name, f"{runs[0]['weights']:,}", *map(spread, epochs), each, f"{seconds:.0f}"])
    count = max(len(row["epochs"]) for row in rows.values() if "epochs" in row)
    after = [f"epoch {epoch}" for epoch in range(1, count + 1)]
    return markdown(["convolutions", "weights", *after, "each seed", "seconds of the fastest epoch"], lines)


def _differences(rows: Rows) -> list[str]:
    lines = []
    rights: dict[str, list[torch.Tensor]] = {"TT-conv": [], "naive": []}
    for seed in sorted({row["seed"] for row in _runs(rows, "TT-conv")}):
        found = {row["kind"]: unpacked(row["right"]) for row in rows.values() if row.get("seed") == seed}
        if rights.keys() <= found.keys():
            for kind, kept in rights.items():
                kept.append(found[kind])
            lines.append([f"seed {seed}", "{:+.2f} ± {:.2f}".format(*paired(found["TT-conv"], found["naive"]))])
    if len(lines) > 1:
        means = [torch.stack(kept).double().mean(dim=0) for kept in rights.values()]
        lines.append(["mean over the seeds", "{:+.2f} ± {:.2f}".format(*paired(*means))])
    return markdown(["", "TT-conv - naive"], lines)


def write_plot(rows: Rows, path: Path) -> None:
    """Draw the training loss and the accuracy of each epoch."""
    figure, (loss, accuracy) = panels(2)
    for panel, name in ((loss, "train_loss"), (accuracy, "accuracy")):
        for kind, colour in COLOURS.items():
            values = list(zip(*([epoch[name] for epoch in run["epochs"]] for run in _runs(rows, kind)), strict=True))
            epochs = range(1, len(values) + 1)
            panel.plot(epochs, list(map(statistics.mean, values)), color=colour, marker="o", label=NAMES[kind])
            panel.fill_between(
                epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.15, linewidth=0
            )
            panel.set_xticks(epochs)
        panel.set_xlabel("epoch")
    loss.set_title("Training loss", loc="left", fontsize=10.5)
    accuracy.set_title("Accuracy (%) on images not trained on", loc="left", fontsize=10.5)
    accuracy.legend(frameon=False, loc="lower right")
    finish(figure, "TT-convolutions on CIFAR-10, 3.26 times fewer weights", path)
