"""Two flexible layers in a row for a block: an experiment. Are they found, and are they worth more than one?

    python -m reproduce.flexible_activations.two_layers.run            # what results.json lacks, table.md, plot.png
    python -m reproduce.flexible_activations.two_layers.run --redraw   # table.md and plot.png from results.json

Rows are written as they are done: what was stopped goes on where it was.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import jacrev, vmap

import rankfold as rf
from reproduce import datasets, harness
from reproduce.flexible_activations.baselines import regression
from reproduce.flexible_activations.two_layers import drawing
from reproduce.flexible_activations.two_layers.solver import joint_fit, one_layer, scatter, two_layers
from reproduce.harness import Row
from reproduce.training import Batches, fitted, outputs, params, plain, scored

# functions that are two flexible layers
RANKS, PROBLEMS, STARTS = (2, 3, 4), 6, 4
WIDTH, SAMPLES, FRESH, BEND = 6, 100, 400, 0.6
# a trained network, all of it the block
SEEDS, WIDTHS = (0, 1, 2), (10, 30)
EPOCHS, BATCH, RATE = 5, 128, 1e-3
ROWS, PASSES = 20_000, 30
BLOCK = "0:4"  # in a sequence of five modules


def problem(rank: int, seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a random function of two flexible layers of a rank, inputs to fit it at, and others to judge it at."""
    truth = two_layers((WIDTH, rank, rank, WIDTH))
    scatter(truth, 1000 * rank + seed, BEND)
    draw = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.rand(SAMPLES + FRESH, WIDTH, dtype=torch.float64, generator=draw) - 1
    return truth.requires_grad_(False), inputs[:SAMPLES], inputs[SAMPLES:]


def directions(found: nn.Module, truth: nn.Module) -> float:
    """Return the least |cosine| of the incoming weights of the first layer with the true ones, best paired."""
    one, two = (nn.functional.normalize(model.get_parameter("0.weight").detach(), dim=1) for model in (found, truth))
    cosines = (one @ two.T).abs().numpy()
    return float(np.min(cosines[linear_sum_assignment(cosines, maximize=True)]))


def solved(rank: int, seed: int, method: str) -> Row:
    """Return errors of the values at fresh inputs from each start, and what the start of least cost found."""
    truth, inputs, fresh = problem(rank, seed)
    values, wanted = truth(inputs), truth(fresh)
    jacobians = vmap(jacrev(truth))(inputs) if method != "values" else None
    began, costs, errors, models = time.process_time(), [], [], []
    for start in range(STARTS):
        size = params(truth)
        fresh_model = one_layer(WIDTH, WIDTH, size) if method == "one" else two_layers((WIDTH, rank, rank, WIDTH))
        model, cost = joint_fit(fresh_model, inputs, values, jacobians, start)
        costs.append(cost)
        errors.append(float((outputs(model, fresh) - wanted).norm() / (wanted - wanted.mean(0)).norm()))
        models.append(model)
    best = int(np.argmin(costs))
    row: Row = {"part": "functions", "rank": rank, "seed": seed, "method": method}
    row |= {"errors": [float(f"{e:.4g}") for e in errors], "error": float(f"{errors[best]:.4g}")}
    row["cosine"] = None if method == "one" else round(directions(models[best], truth), 5)
    return {**row, "seconds": round((time.process_time() - began) / STARTS, 2)}


def network() -> nn.Sequential:
    """Return the perceptron 784, 300, 100, 10."""
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(*layers)


class Experiment:
    """A perceptron trained on Fashion-MNIST, and rows of its values."""

    def __init__(self, seed: int) -> None:
        self.seed, data = seed, datasets.fashion_mnist()
        train, test = ((images.flatten(1).float() / 255) for images in (data.train_images, data.test_images))
        self.test, self.labels = test, data.test_labels
        torch.manual_seed(seed)
        self.model = network()
        batches = Batches(train, data.train_labels, seed=seed, size=BATCH)
        recipe = plain(torch.optim.Adam)
        fitted(self.model, batches, lambda _: {"accuracy": 0.0}, epochs=EPOCHS, lr=RATE, recipe=recipe)
        self.rows = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:ROWS]]
        self.values = outputs(self.model, self.rows)

    def block(self, method: str, width: int) -> nn.Module:
        """Return what takes the network's place: so many neurons in one layer, or as many weights in two."""
        torch.manual_seed(self.seed)
        one = rf.layers.FlexibleLinear(784, 10, rank=width)
        if method == "solved":
            data = [(part,) for part in self.rows.split(500)]
            return rf.train.decouple(self.model, BLOCK, data, rank=width, rows=ROWS, seed=self.seed)[0]
        if method == "one":
            return regression(one, self.rows, self.values, seed=self.seed, passes=PASSES)
        first = width
        while params(_stacked(first)) > params(one):
            first -= 1
        return regression(_stacked(first), self.rows, self.values, seed=self.seed, passes=PASSES)

    def run(self, method: str, width: int) -> Row:
        """Return accuracy and error on the test images of one way to replace the network."""
        began = time.process_time()
        block = self.block(method, width)
        row: Row = {"part": "network", "rank": width, "seed": self.seed, "method": method}
        row |= {
            "seconds": round(time.process_time() - began, 1),
            "params": params(block),
            "dense_params": params(self.model),
        }
        wanted, got = outputs(self.model, self.test), outputs(block, self.test)
        row["error"] = round(float((got - wanted).norm() / (wanted - wanted.mean(0)).norm()), 4)
        row["accuracy"] = scored(block, self.test, self.labels)["accuracy"]
        return {**row, "dense": scored(self.model, self.test, self.labels)["accuracy"]}


def _stacked(width: int) -> nn.Sequential:
    """Return two flexible layers of a width, fresh."""
    into = rf.layers.FlexibleLinear(784, width, rank=width)
    # the last map of the first layer is the first of the second: W1 stands once
    return nn.Sequential(into, rf.layers.FlexibleActivation(width), nn.Linear(width, 10))


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Run what is missing."""
    torch.set_num_threads(1)
    for seed in range(PROBLEMS):
        for rank in RANKS:
            for method in ("two", "values", "one"):
                key = f"functions {rank} {seed} {method}"
                if key not in rows:
                    keep(key, solved(rank, seed, method))
    for seed in SEEDS:
        keys = {
            f"network {width} {seed} {method}": (method, width)
            for width in WIDTHS
            for method in ("solved", "one", "two")
        }
        if all(key in rows for key in keys):
            continue
        experiment = Experiment(seed)
        for key, (method, width) in keys.items():
            if key not in rows:
                keep(key, experiment.run(method, width))


QUICK = {
    **{"RANKS": (2,), "PROBLEMS": 1, "STARTS": 1},
    **{"SEEDS": (0,), "WIDTHS": (10,), "EPOCHS": 1, "ROWS": 150, "PASSES": 1},
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
