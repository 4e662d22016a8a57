"""The dense block of a small network as one flexible layer, on MNIST and Fashion-MNIST, beside other ways to shrink it.

    python -m reproduce.flexible_activations.dense_block.run            # what results.json lacks, table.md, plot.png
    python -m reproduce.flexible_activations.dense_block.run --redraw   # table.md and plot.png from results.json

Trained networks are kept in the cache folder, rows are written as they are done: what was stopped goes on where it was.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rankfold as rf
from reproduce import datasets, harness
from reproduce.flexible_activations.baselines import affine, regression, truncated
from reproduce.flexible_activations.dense_block import drawing
from reproduce.harness import Row
from reproduce.training import Batches, fitted, outputs, params, plain, scored

SEEDS, RANKS = (0, 1, 2), (10, 50, 25, 100)  # 50, 10, 20 and 5 times fewer parameters
EPOCHS, BATCH, LEARNING_RATE = 5, 128, 1e-3
SAMPLES, ROWS = 1280, 20_000  # for the Jacobians; for the values, and for whatever the other methods fit
PASSES = 30  # of the narrow ReLU block over these rows
TUNING_RATES = {"relu": 1e-3}  # of the epoch of distillation; all others begin near the end, at
TUNING_RATE = 3e-4
DATA = {"MNIST": datasets.mnist, "Fashion-MNIST": datasets.fashion_mnist}
NAME = "0:2"  # of the block in the sequence of its three modules


def network() -> nn.Sequential:
    """Return two convolutions with pooling and the dense block 1568, 512, 10."""
    features = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*features, nn.Linear(1568, 512), nn.ReLU(), nn.Linear(512, 10))


class Experiment:
    """A trained network with its block's inputs: what the convolutions return, which stay as they are."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.seed = name, seed
        data = DATA[name]()
        train, test = data.train_images.float() / 255, data.test_images.float() / 255
        self.labels, self.test_labels = data.train_labels, data.test_labels
        model = self._trained(train)
        self.inputs, self.test_inputs = outputs(model[:7], train), outputs(model[:7], test)
        self.block = nn.Sequential(*model[7:]).eval()
        self.dense = self.accuracy(self.block)
        order = torch.randperm(len(self.inputs), generator=torch.Generator().manual_seed(seed))
        self.rows = self.inputs[order[:ROWS]]
        self.values = outputs(self.block, self.rows)

    def _trained(self, images: Tensor) -> nn.Sequential:
        torch.manual_seed(self.seed)
        model = network()
        file = datasets.made_in() / "flexible_activations" / f"{self.name} {self.seed}.pt"
        if file.is_file():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        batches = Batches(images, self.labels, seed=self.seed, size=BATCH)
        recipe = plain(torch.optim.Adam)
        fitted(model, batches, lambda _: {"accuracy": 0.0}, epochs=EPOCHS, lr=LEARNING_RATE, recipe=recipe)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        return model

    def accuracy(self, block: nn.Module) -> float:
        """Return the accuracy on the test images in per cent."""
        return scored(block, self.test_inputs, self.test_labels)["accuracy"]

    def error(self, block: nn.Module) -> float:
        """Return the relative error of the logits on the test images, from their mean."""
        wanted, got = outputs(self.block, self.test_inputs), outputs(block, self.test_inputs)
        return float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())

    def tuned(self, block: nn.Module, method: str) -> float:
        """Distil for one epoch of all training images, the convolutions fixed; return the accuracy after it."""
        batches = Batches(self.inputs, self.labels, seed=1000 + self.seed, size=BATCH)
        rate = TUNING_RATES.get(method, TUNING_RATE)
        rf.train.fit(block, batches, teacher=self.block, lr=rate, recipe=rf.train.Recipe(progress=False))
        return self.accuracy(block)

    def flexible(self, rank: int, rows: int) -> tuple[nn.Module, Row]:
        """Return a flexible layer, and its first activations."""
        data = [(part,) for part in self.rows.split(500)]
        found, _ = rf.train.decouple(self.block, NAME, data, rank=rank, samples=SAMPLES, rows=rows, seed=self.seed)
        u = torch.linspace(-1, 1, 41)
        with torch.no_grad():
            curves: Tensor = found[0].activation(u[:, None].expand(-1, rank)).T[:10]
        return found, {"curves": [[round(v, 4) for v in curve.tolist()] for curve in curves]} if rows else {}

    def planned(self, method: str, kept: int) -> tuple[nn.Module, Row]:
        """Return the block compressed by another method of the library, to at most `kept` parameters."""
        plan = rf.plan(self.block, budget=rf.Budget(params=kept / params(self.block)), methods=(method,))
        return rf.apply(self.block, plan), {}

    def aware(self, kept: int) -> nn.Module:
        """Return the block with its first layer by data-aware SVD, of at most `kept` parameters."""
        first, act, last = self.block
        rank = (kept - params(last) - 512) // (1568 + 512)
        return nn.Sequential(*truncated(first, rank, self.rows), act, copy.deepcopy(last))

    def relu(self, kept: int) -> tuple[nn.Module, Row]:
        """Return a fresh block with a ReLU of `kept` parameters, fitted to the values at the rows."""
        torch.manual_seed(self.seed)
        width = max(1, (kept - 10) // (1568 + 1 + 10))
        narrow = nn.Sequential(nn.Linear(1568, width), nn.ReLU(), nn.Linear(width, 10))
        return regression(narrow, self.rows, self.values, seed=self.seed, passes=PASSES), {}

    def methods(self, rank: int, kept: int) -> dict[str, Callable[[], tuple[nn.Module, Row]]]:
        """Return how each method makes its block of at most `kept` parameters."""
        ways: dict[str, Callable[[], tuple[nn.Module, Row]]] = {
            "solved": lambda: self.flexible(rank, 0),
            "flexible": lambda: self.flexible(rank, ROWS),
            "svd": lambda: self.planned("svd", kept),
            "aware": lambda: (self.aware(kept), {}),
            "tt": lambda: self.planned("tt", kept),
            "relu": lambda: self.relu(kept),
        }
        if rank == min(RANKS):  # its rank is at most the 10 outputs, whatever the budget
            ways["affine"] = lambda: (affine(self.rows, self.values, 10), {})
        return ways

    def run(self, rank: int, rows: harness.Rows, keep: harness.Keep) -> None:
        """Keep the rows that are missing at a rank: without tuning, and after one epoch."""
        kept = sum(p.numel() for p in rf.layers.FlexibleLinear(1568, 10, rank=rank).parameters())
        for method, make in self.methods(rank, kept).items():
            key = f"{self.name} {rank} {self.seed} {method}"
            if key in rows:
                continue
            row: Row = {"data": self.name, "rank": rank, "seed": self.seed, "method": method, "dense": self.dense}
            start = time.process_time()
            try:
                block, more = make()
            except rf.BudgetError as problem:
                keep(key, row | {"missing": str(problem)})
                continue
            row |= {"params": params(block), "seconds": round(time.process_time() - start, 1)}
            row |= {"one_shot": self.accuracy(block), "error": round(self.error(block), 4), **more}
            if method != "solved":
                row["tuned"] = self.tuned(block, method)
            keep(key, row)


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Run what is missing, one data set and seed after the other."""
    torch.set_num_threads(1)
    for seed in SEEDS:
        for name in DATA:
            last = f"{name} {RANKS[-1]} {seed} relu"
            if last not in rows:
                experiment = Experiment(name, seed)
                for rank in RANKS:
                    experiment.run(rank, rows, keep)


QUICK = {
    **{"SEEDS": (0,), "RANKS": (10,), "EPOCHS": 1, "SAMPLES": 1280, "ROWS": 150, "PASSES": 1},
    "DATA": {"MNIST": datasets.mnist},
}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
