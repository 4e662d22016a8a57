"""A tensor-train layer on MNIST, its error against its number of parameters (Novikov et al. 2015, Figure 1).

    python -m reproduce.tt_mnist.run            # every run that results.json lacks, then table.md and plot.png
    python -m reproduce.tt_mnist.run --redraw   # table.md and plot.png from results.json

Runs are written as they are done, so that what was stopped goes on where it was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.harness import Row
from reproduce.training import Batches, fitted, params, plain, scored
from reproduce.tt_mnist import drawing

SIDE = 32  # of the padded images
FEATURES, HIDDEN = SIDE * SIDE, 1024
SHAPES = {
    "32×32": (32, 32),
    "4×8×8×4": (4, 8, 8, 4),
    "4^5": (4,) * 5,
    "2×2×8×8×2×2": (2, 2, 8, 8, 2, 2),
    "2^10": (2,) * 10,
}
RANKS = (1, 2, 4, 8, 3, 6)  # of the trains, those that tell most first
MATRIX_RANKS = (1, 2, 3, 4, 6, 8, 16, 32)
REPEATED = {"dense": (None,), "matrix": (1, 2, 4, 8), **dict.fromkeys(SHAPES, (8,))}  # also with the further seed
SEEDS = (0, 1)
EPOCHS, BATCH = 6, 250
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TRIAL_EPOCHS, TRIAL_RANK, HELD_OUT = 4, 4, 10_000  # what chooses the learning rate: training images, not test images
MEAN, STD = 0.1307, 0.3081  # of the pixels of the training images, before they are padded

Run = tuple[str, int | None, int]
Data = Sequence[Tensor]  # images and labels


def runs() -> Iterator[Run]:
    """Yield kind (a shape, "matrix" or "dense"), rank and seed of every run, one seed after the other."""
    yield ("dense", None, SEEDS[0])
    yield from (("matrix", rank, SEEDS[0]) for rank in MATRIX_RANKS)
    yield from ((shape, rank, SEEDS[0]) for rank in RANKS for shape in SHAPES)
    yield from ((kind, rank, seed) for seed in SEEDS[1:] for kind, ranks in REPEATED.items() for rank in ranks)


def hidden_layer(kind: str, rank: int | None) -> nn.Module:
    """Return the hidden layer of a run."""
    if rank is None:
        return nn.Linear(FEATURES, HIDDEN)
    if kind == "matrix":
        return rf.layers.LowRankLinear(FEATURES, HIDDEN, rank=rank)
    return rf.layers.TTLinear(FEATURES, HIDDEN, rank=rank, in_shape=SHAPES[kind], out_shape=SHAPES[kind])


def network(kind: str, rank: int | None, seed: int) -> nn.Sequential:
    """Return the untrained network of a run."""
    torch.manual_seed(seed)
    layers = {"hidden": hidden_layer(kind, rank), "relu": nn.ReLU(), "output": nn.Linear(HIDDEN, 10)}
    return nn.Sequential(OrderedDict(layers))


def flattened(images: Tensor) -> Tensor:
    """Return uint8 images (batch, 1, 28, 28) as standardised rows of 32 × 32 pixels; the border is black."""
    margin = (SIDE - images.shape[-1]) // 2
    return ((F.pad(images, (margin,) * 4).float() / 255 - MEAN) / STD).flatten(1)


class Experiment:
    """The data, and how a network is trained on them."""

    def __init__(self) -> None:
        data = datasets.mnist()
        self.train = (flattened(data.train_images), data.train_labels)
        self.test = (flattened(data.test_images), data.test_labels)
        self.recipe = plain(torch.optim.Adam, schedule="cosine", fused=True)

    def trial(self, kind: str, rate: float) -> Row:
        """Return the row of a short run at one learning rate, scored on training images that it has not seen."""
        rank = None if kind == "dense" else TRIAL_RANK
        seen, unseen = ([part[where] for part in self.train] for where in (slice(-HELD_OUT), slice(-HELD_OUT, None)))
        row = self._row(kind, rank, 0, rate, seen, unseen, TRIAL_EPOCHS)
        return {**row, "trial": True}

    def run(self, kind: str, rank: int | None, seed: int, rate: float) -> Row:
        """Return the row of one run on all training images."""
        return self._row(kind, rank, seed, rate, self.train, self.test, EPOCHS)

    def _row(self, kind: str, rank: int | None, seed: int, rate: float, train: Data, test: Data, epochs: int) -> Row:
        model = network(kind, rank, seed)
        batches = Batches(*train, seed=seed, size=BATCH)
        score = partial(scored, images=test[0], labels=test[1])
        done = fitted(model, batches, score, epochs=epochs, lr=rate, recipe=self.recipe)
        row: Row = {"kind": kind, "rank": rank, "seed": seed, "lr": rate, "params": params(model.hidden)}
        return {**row, "epochs": done}


def chosen_rate(rows: harness.Rows, kind: str) -> float:
    """Return the learning rate at which the trial of a kind has the highest accuracy."""
    trials = [rows[f"trial {kind} {rate:g}"] for rate in LEARNING_RATES]
    return max(trials, key=lambda row: row["epochs"][-1]["accuracy"])["lr"]


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Train what is missing: the trials first."""
    torch.set_num_threads(1)  # the machine's other threads stay free, and sums keep their order
    experiment = Experiment()
    for kind in ("dense", "matrix", *SHAPES):
        for rate in LEARNING_RATES:
            key = f"trial {kind} {rate:g}"
            if key not in rows:
                keep(key, experiment.trial(kind, rate))
    for kind, rank, seed in runs():
        key = f"{kind} {rank or ''} {seed}".replace("  ", " ")
        if key not in rows:
            keep(key, experiment.run(kind, rank, seed, chosen_rate(rows, kind)))


QUICK = {
    **{"SEEDS": (0,), "EPOCHS": 1, "TRIAL_EPOCHS": 1, "HELD_OUT": 100},
    **{"LEARNING_RATES": (1e-3,), "RANKS": (2,), "MATRIX_RANKS": (2,)},
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
