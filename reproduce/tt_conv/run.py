"""TT-convolutions on CIFAR-10: how many weights they have, and how they train (Garipov et al. 2016).

    python -m reproduce.tt_conv.run            # what results.json lacks, then table.md and plot.png
    python -m reproduce.tt_conv.run --redraw   # table.md and plot.png from results.json

Runs are written as they are done, so that what was stopped goes on where it was.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reproduce import datasets, harness
from reproduce.harness import Row
from reproduce.training import Batches, correct, fitted, packed, params, plain, scored
from reproduce.tt_conv import drawing
from reproduce.tt_conv.model import BONDS_WITH_FC, FC_LAYERS, LAYERS, MAKE, fc_layer, network, tt_layer

SIDE = 20  # of the shrunken images: an epoch costs a third
HELD_OUT = 4_000  # of the 25,000 images: unseen, as the 1,000 test images
EPOCHS, BATCH, LEARNING_RATE = 2, 100, 3e-3
SEEDS = (0, 1, 2)


def counts() -> list[Row]:
    """Return the weights of every convolution and fully connected layer, dense and as trains."""
    rows: list[Row] = []
    for name, (channels, filters, _, bonds) in LAYERS.items():
        dense = channels * filters * 9
        weights = [dense] * 3 if bonds is None else [params(MAKE[kind](name)) for kind in ("TT-conv", "naive")]
        if bonds is not None:
            weights.append(params(tt_layer(name, BONDS_WITH_FC)))
        rows.append({"layer": name, "bonds": bonds, "dense": dense, **dict(zip(WEIGHTS, weights, strict=True))})
    for name in FC_LAYERS:
        layer = fc_layer(name)
        dense = layer.in_features * layer.out_features
        rows.append({"layer": name, "bonds": FC_LAYERS[name][2], "dense": dense, "TT-conv-TT-fc": params(layer)})
    return rows


WEIGHTS = ("TT-conv", "naive", "TT-conv-TT-fc")


def shrunk(images: Tensor, like: Tensor) -> Tensor:
    """Return uint8 images smaller and standardised by the mean and deviation of `like`."""
    deviation, mean = torch.std_mean(like.float() / 255, dim=(0, 2, 3), keepdim=True)
    small = torch.cat([F.interpolate(part.float(), size=SIDE, mode="area") for part in images.split(1_000)])
    return ((small / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images of which half are mirrored."""
    mirror = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirror, images.flip(3), images)


class Experiment:
    """The data, and how a network is trained on them."""

    def __init__(self) -> None:
        data = datasets.cifar10()
        seen = data.train_images[:-HELD_OUT]
        self.images, self.labels = shrunk(seen, seen), data.train_labels[:-HELD_OUT]
        self.unseen = shrunk(torch.cat([data.train_images[-HELD_OUT:], data.test_images]), seen)
        self.unseen_labels = torch.cat([data.train_labels[-HELD_OUT:], data.test_labels])

    def run(self, kind: str, seed: int) -> Row:
        """Return the row of one run."""
        torch.manual_seed(seed)
        model = network(kind).to(memory_format=torch.channels_last)
        batches = Batches(self.images, self.labels, seed=seed, size=BATCH, change=flipped)
        score = partial(scored, images=self.unseen, labels=self.unseen_labels)
        recipe = plain(torch.optim.Adam, schedule="cosine", fused=True)
        row: Row = {"kind": kind, "seed": seed, "params": params(model), "weights": convolution_weights(model)}
        row["epochs"] = fitted(model, batches, score, epochs=EPOCHS, lr=LEARNING_RATE, recipe=recipe)
        return row | {"right": packed(correct(model, self.unseen, self.unseen_labels))}


def convolution_weights(model: nn.Sequential) -> int:
    """Return how many weights the six convolutions have."""
    return sum(params(layer) for name, layer in model.named_children() if name.replace("_", ".") in LAYERS)


def measure(rows: harness.Rows, keep: harness.Keep) -> None:
    """Count, then train what is missing, one seed after the other."""
    torch.set_num_threads(1)
    for row in counts():
        if f"count {row['layer']}" not in rows:
            keep(f"count {row['layer']}", row)
    experiment = Experiment()
    further = [(kind, seed) for seed in SEEDS[1:] for kind in ("TT-conv", "naive")]
    for kind, seed in [*((kind, SEEDS[0]) for kind in MAKE), *further]:
        if f"{kind} {seed}" not in rows:
            keep(f"{kind} {seed}", experiment.run(kind, seed))


QUICK = {"SEEDS": (0,), "EPOCHS": 1, "HELD_OUT": 100}

if __name__ == "__main__":
    harness.main(__doc__, Path(__file__).parent, measure, drawing, quick=QUICK)
