"""A dense block of a small network as one flexible layer, on MNIST and Fashion-MNIST, against other ways to shrink it.

    python -m reproduce.flexible_activations.run            # every run that results.json lacks, then table.md, plot.png
    python -m reproduce.flexible_activations.run --redraw   # table.md and plot.png from results.json
    python -m reproduce.flexible_activations.run --quick    # one seed, few images, two ranks; printed, not kept

Runs are written as they are done, so that what was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.flexible_activations import drawing
from reproduce.harness import Row
from reproduce.training import Batches, fitted, params, plain, scored

SEEDS = (0, 1, 2)
RANKS = (10, 20, 48, 96)
EPOCHS, TUNING, BATCH, LEARNING_RATE = 5, 1, 128, 1e-3
BLOCK, FIRST, LAST = "7:9", "7", "9"
SAMPLES = 2560
DATA = {"MNIST": datasets.mnist, "Fashion-MNIST": datasets.fashion_mnist}


def network(width: int = 512) -> nn.Sequential:
    """Return two convolutions with pooling and the dense block 1568, `width`, 10."""
    features = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(1568, width), nn.ReLU(), nn.Linear(width, 10))


def block_params(model: nn.Module) -> int:
    """Return the parameters of the dense block, or of what took its place."""
    return sum(params(model[int(key)]) for key in range(int(FIRST), int(LAST) + 1))


class Experiment:
    """The data, and the trained network of the last data set and seed asked for."""

    def __init__(self, *, images: int | None = None, epochs: int = EPOCHS) -> None:
        self.images, self.epochs = images, epochs
        self.now: tuple[str, int] | None = None

    def prepare(self, name: str, seed: int) -> Row:
        """Load the data and train the dense network, unless they are there; return the score of the network."""
        if self.now != (name, seed):
            data = DATA[name]()
            chosen = slice(0, self.images)
            self.train = data.train_images[chosen].float() / 255, data.train_labels[chosen]
            self.test = data.test_images[chosen].float() / 255, data.test_labels[chosen]
            torch.manual_seed(seed)
            self.dense = network()
            self.tuned(self.dense, seed, epochs=self.epochs)
            self.now = name, seed
        return self.scored(self.dense)

    def tuned(self, model: nn.Module, seed: int, *, epochs: int = TUNING, teacher: nn.Module | None = None) -> Row:
        """Train in place and return the score after the last epoch; with a teacher on its outputs alone."""
        batches = Batches(*self.train, seed=seed, size=BATCH)
        if teacher is not None:
            rf.train.fit(model, batches, teacher=teacher, epochs=epochs, lr=LEARNING_RATE)
            return self.scored(model)
        recipe = plain(torch.optim.Adam)
        return fitted(model, batches, self.scored, epochs=epochs, lr=LEARNING_RATE, recipe=recipe)[-1]

    def scored(self, model: nn.Module) -> Row:
        """Return mean cross-entropy and accuracy (per cent) on the test images."""
        return scored(model, *self.test)

    def flexible(self, rank: int, seed: int) -> tuple[nn.Module, Row]:
        """Return the network with a flexible layer, what the solver said, and its first activations."""
        batches = Batches(*self.train, seed=seed, size=BATCH)
        small, plan = rf.train.decouple(self.dense, BLOCK, batches, rank=rank, samples=SAMPLES, seed=seed)
        u = torch.linspace(-1, 1, 41)
        with torch.no_grad():
            curves: Tensor = small[int(FIRST)].activation(u[:, None].expand(-1, rank)).T[:10]
        return small, {"error": plan.layers[BLOCK].error, "curves": [[round(v, 4) for v in c.tolist()] for c in curves]}

    def planned(self, method: str, kept: int) -> tuple[nn.Module, Row]:
        """Return the network with its block compressed by another method, to at most `kept` parameters."""
        share = (params(self.dense) - block_params(self.dense) + kept) / params(self.dense)
        budget = rf.Budget(params=share)
        plan = rf.plan(self.dense, budget=budget, methods=(method,), include=(FIRST, LAST))
        return rf.apply(self.dense, plan), {}

    def narrow(self, kept: int, seed: int) -> nn.Module:
        """Return the network with a fresh block with a ReLU, of `kept` parameters."""
        torch.manual_seed(seed)
        model = network(max(1, (kept - 10) // (1568 + 1 + 10)))
        model[: int(FIRST)].load_state_dict(self.dense[: int(FIRST)].state_dict())
        return model

    def run(self, name: str, rank: int, seed: int, keep: Callable[[str, Row], None]) -> None:
        """Keep one row per method: without tuning, and after one epoch."""
        dense = self.prepare(name, seed)
        start = time.perf_counter()
        small, told = self.flexible(rank, seed)
        kept, told["seconds"] = block_params(small), time.perf_counter() - start
        methods: dict[str, Callable[[], tuple[nn.Module, Row]]] = {
            "flexible": lambda: (small, told),
            "svd": lambda: self.planned("svd", kept),
            "tt": lambda: self.planned("tt", kept),
            "relu": lambda: (self.narrow(kept, seed), {}),
        }
        for method, make in methods.items():
            row: Row = {"data": name, "rank": rank, "seed": seed, "method": method, "dense": dense["accuracy"]}
            try:
                model, more = make()
            except rf.BudgetError as problem:
                keep(f"{name} {rank} {seed} {method}", row | {"missing": str(problem)})
                continue
            before = self.scored(model)["accuracy"]
            tuned = copy.deepcopy(model)
            after = self.tuned(tuned, 1000 + seed, teacher=self.dense)["accuracy"]
            row |= {"params": block_params(model), "one_shot": before, "tuned": after, **more}
            keep(f"{name} {rank} {seed} {method}", row)


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Run what is missing, one data set and seed after the other."""
    torch.set_num_threads(1)
    run = Experiment()
    for name in DATA:
        for seed in SEEDS:
            for rank in RANKS:
                if f"{name} {rank} {seed} relu" not in rows:
                    run.run(name, rank, seed, keep)


def quick() -> None:
    """Print a small version of the runs."""
    torch.set_num_threads(1)
    run = Experiment(images=6000, epochs=2)
    for rank in (10, 48):
        run.run("Fashion-MNIST", rank, 0, lambda _, row: print(drawing.line(row), flush=True))


if __name__ == "__main__":
    if sys.argv[1:] == ["--quick"]:
        quick()
    else:
        harness.main(__doc__, Path(__file__).parent, measure, drawing)
