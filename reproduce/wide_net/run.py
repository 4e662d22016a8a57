"""A network of 262,144 hidden units on CIFAR-10, made of two tensor trains (Novikov et al. 2015).

    python -m reproduce.wide_net.run            # what results.json lacks, then table.md and plot.png
    python -m reproduce.wide_net.run --redraw   # table.md and plot.png from results.json

What was stopped goes on after the last round of training that was done.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.harness import Row
from reproduce.training import Batches, params, plain, scored
from reproduce.wide_net import drawing
from reproduce.wide_net.model import dense, equal_width, standardised, wide
from reproduce.wide_net.step import measured

RANKS = (2, 8, 4)  # in the order in which they are trained
ROUNDS = {"wide": 5, "dense": 30, "narrow": 30}
ROUND = 3_200  # images, drawn anew for each round
BATCH, SEED = 32, 0
HELD_OUT = 1_000  # of the 25,000 images: unseen, as the 1,000 test images
OPTIMIZERS = {
    "Adam": partial(plain, torch.optim.Adam, fused=True),
    "SGD": partial(plain, torch.optim.SGD, momentum=0.9, fused=True),
}
TRIALS = (
    ("Adam", 1e-4),
    ("Adam", 3e-4),
    ("Adam", 1e-3),
    ("Adam", 3e-3),
    ("Adam", 1e-2),
    ("SGD", 1e-2),
    ("SGD", 3e-2),
    ("SGD", 1e-1),
)
TRIAL_RANK, TRIAL_IMAGES = 2, 960


class Experiment:
    """The data, and how a network is trained on them."""

    def __init__(self) -> None:
        data = datasets.cifar10()
        images, labels = data.train_images[:-HELD_OUT], data.train_labels[:-HELD_OUT]
        unseen = torch.cat([data.train_images[-HELD_OUT:], data.test_images])
        self.images, self.labels = standardised(images, images), labels
        self.unseen = standardised(unseen, images)
        self.unseen_labels = torch.cat([data.train_labels[-HELD_OUT:], data.test_labels])

    def trial(self, kind: str, optimizer: str, rate: float) -> Row:
        """Return the training loss of a short run, on images each seen for the first time."""
        batches = Batches(self.images, self.labels, seed=SEED, size=BATCH, count=TRIAL_IMAGES)
        recipe = OPTIMIZERS[optimizer]()
        history = rf.train.fit(network(kind, TRIAL_RANK), batches, lr=rate, recipe=recipe)
        return {"kind": kind, "trial": True, "optimizer": optimizer, "lr": rate, "loss": history.epochs[0].loss}

    def train(self, kind: str, rank: int, chosen: Row) -> Row:
        """Return the row of a network trained with the optimiser and the learning rate of a trial."""
        model = network(kind, rank)
        file = datasets.made_in() / f"wide_net {kind} {rank}.checkpoint"
        file.parent.mkdir(parents=True, exist_ok=True)
        batches = Batches(self.images, self.labels, seed=SEED, size=BATCH, count=ROUND)
        history = rf.train.fit(
            model,
            batches,
            epochs=ROUNDS[kind],
            lr=chosen["lr"],
            evaluate=lambda model: scored(model, self.unseen, self.unseen_labels, size=50)["accuracy"],
            recipe=OPTIMIZERS[chosen["optimizer"]](checkpoint=file),
        )
        file.unlink()
        rounds = [{"train_loss": row.loss, "accuracy": row.metric, "seconds": row.seconds} for row in history.epochs]
        setting = {name: chosen[name] for name in ("optimizer", "lr")}
        return {"kind": kind, "rank": rank, "seed": SEED, **setting, "params": params(model), "rounds": rounds}


def network(kind: str, rank: int) -> nn.Sequential:
    """Return the untrained network of a kind.

    "wide" is the one of tensor trains of this rank, "dense" one of as many parameters, "narrow" a dense one of as
    many parameters as the wide one has outside its BatchNorm.
    """
    torch.manual_seed(SEED)
    model = wide(rank)
    if kind == "wide":
        return model
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    return dense(equal_width(params(model) - (sum(map(params, norms)) if kind == "narrow" else 0)))


def chosen(rows: harness.Rows, kind: str) -> Row:
    """Return the trial of a kind with the lowest loss; the narrow network takes what is best for the dense one."""
    like = "wide" if kind == "wide" else "dense"
    trials = [row for row in rows.values() if row["kind"] == like and row.get("trial")]
    return min(trials, key=lambda row: row["loss"])


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Measure what is missing: one step at each rank, then the trials, then the training."""
    for rank in RANKS:
        if f"step {rank}" not in rows:
            keep(f"step {rank}", measured(rank, BATCH))
    torch.set_num_threads(1)
    experiment = Experiment()
    for kind in ("wide", "dense"):
        for optimizer, rate in TRIALS:
            if f"trial {kind} {optimizer} {rate:g}" not in rows:
                keep(f"trial {kind} {optimizer} {rate:g}", experiment.trial(kind, optimizer, rate))
    for kind, rank in [("dense", 2), ("narrow", 2), ("narrow", 8), *(("wide", rank) for rank in RANKS)]:
        if f"{kind} {rank}" not in rows:
            keep(f"{kind} {rank}", experiment.train(kind, rank, chosen(rows, kind)))


QUICK = {
    **{"RANKS": (2,), "ROUNDS": dict.fromkeys(ROUNDS, 1), "ROUND": 64, "HELD_OUT": 100},
    **{"TRIALS": TRIALS[:1], "TRIAL_IMAGES": 64},
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
