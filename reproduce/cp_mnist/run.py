"""CP convolutions on MNIST: trained from scratch, and made of a trained network (Ganzha and Shaposhnikova 2021).

    python -m reproduce.cp_mnist.run            # every run that results.json lacks, then table.md and plot.png
    python -m reproduce.cp_mnist.run --redraw   # table.md and plot.png from results.json

Runs are written as they are done, so that what was stopped goes on where it was; a base network whose weights are
needed again is trained again, to the same weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.cp_mnist import drawing
from reproduce.cp_mnist.model import CONVOLUTIONS, convolution_weights, draw_stages_, network, normalised
from reproduce.harness import Row
from reproduce.training import Batches, fitted, params, plain, scored

SEEDS = (0, 1, 2)
RANKS = (3, 6, 9)
STAGES_RANK = 6
EPOCHS, TUNING, BATCH, LEARNING_RATE = 5, 1, 64, 1e-4


class Experiment:
    """The data, and the trained base network of the last seed asked for."""

    def __init__(self) -> None:
        data = datasets.mnist()
        self.images, self.labels = normalised(data.train_images), data.train_labels
        self.test_images, self.test_labels = normalised(data.test_images), data.test_labels
        self.base: tuple[int, nn.Sequential] | None = None

    def run(self, kind: str, rank: int | None, seed: int) -> Row:
        """Return the row of one run.

        Its kind is "scratch" (rank None: the base network), "stages" (from scratch, each stage drawn on its own) or
        "tuned" (made of the trained base; None: nothing replaced).
        """
        row: Row = {"kind": kind, "rank": rank, "seed": seed}
        if kind != "tuned":
            model, row["epochs"] = self.trained(rank, seed, stages=kind == "stages")
        else:
            dense = self.trained_base(seed)
            model = decomposed(dense, rank, seed)
            row |= {"errors": weight_errors(dense, model), "one_shot": self.scored(model)}
            row["epochs"] = self.fitted(model, TUNING, 1000 + seed)
        return row | {"convolution_weights": convolution_weights(model), "params": params(model)}

    def trained(self, rank: int | None, seed: int, *, stages: bool = False) -> tuple[nn.Sequential, list[Row]]:
        """Return a network trained from scratch, and its epochs."""
        torch.manual_seed(seed)
        model = network(rank)
        if stages:
            draw_stages_(model)
        epochs = self.fitted(model, EPOCHS, seed)
        if rank is None:
            self.base = (seed, copy.deepcopy(model))
        return model, epochs

    def trained_base(self, seed: int) -> nn.Sequential:
        """Return the trained base network of a seed."""
        if self.base is None or self.base[0] != seed:
            self.trained(None, seed)
        return self.base[1]

    def fitted(self, model: nn.Module, epochs: int, seed: int) -> list[Row]:
        """Train in place at one learning rate, and return losses and test accuracy of each epoch."""
        batches = Batches(self.images, self.labels, seed=seed, size=BATCH)
        recipe = plain(torch.optim.Adam, fused=True)
        return fitted(model, batches, self.scored, epochs=epochs, lr=LEARNING_RATE, recipe=recipe)

    def scored(self, model: nn.Module) -> Row:
        """Return mean cross-entropy and accuracy (per cent) on the test images."""
        return scored(model, self.test_images, self.test_labels)


def decomposed(dense: nn.Sequential, rank: int | None, seed: int) -> nn.Sequential:
    """Return the network with both kernels replaced by their CP decompositions; a copy without a rank."""
    if rank is None:
        return copy.deepcopy(dense)
    choice = rf.Choice("cp", rank=rank, options={"separable": True})
    plan = rf.Plan(layers=dict.fromkeys(CONVOLUTIONS, choice))
    return rf.apply(dense, plan, seed=seed).to(memory_format=torch.channels_last)


def weight_errors(dense: nn.Sequential, small: nn.Sequential) -> dict[str, float]:
    """Return the relative error of each kernel."""
    pairs = {name: [m.get_submodule(name).weight.detach().double() for m in (dense, small)] for name in CONVOLUTIONS}
    return {name: ((new - weight).norm() / weight.norm()).item() for name, (weight, new) in pairs.items()}


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Run what is missing, one seed after the other; the base comes first, and what is made of it next."""
    torch.set_num_threads(1)  # batches of 64 small images gain nothing by more, and sums keep their order
    run = Experiment()
    kinds = [("scratch", None), *(("tuned", rank) for rank in (None, *RANKS)), *(("scratch", rank) for rank in RANKS)]
    kinds.append(("stages", STAGES_RANK))
    for seed in SEEDS:
        for kind, rank in kinds:
            key = f"{kind} {rank or 'base'} {seed}"
            if key not in rows:
                keep(key, run.run(kind, rank, seed))


QUICK = {"SEEDS": (0,), "RANKS": (3,), "EPOCHS": 1}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
