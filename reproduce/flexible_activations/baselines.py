"""What else can take the place of a block of two linear layers, fitted on rows of its inputs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankfold as rf
from reproduce.training import Batches

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # of the mean variance of the inputs
HELD_OUT = 10  # one row in so many chooses the ridge
RATE = 3e-3


def affine(inputs: Tensor, values: Tensor, rank: int) -> nn.Sequential:
    """Return the affine map of this rank that fits the values best: reduced-rank regression.

    Its ridge is the one best on held-out rows.
    """
    held = len(inputs) // HELD_OUT
    x, y = inputs[held:].double(), values[held:].double()
    mean, centre = x.mean(0), y.mean(0)
    gram, crossed = (x - mean).T @ (x - mean), (x - mean).T @ (y - centre)
    eye = gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    found: list[tuple[float, Tensor, Tensor]] = []
    for ridge in RIDGES:
        slope = torch.linalg.solve(gram + ridge * eye, crossed)
        leading = torch.linalg.eigh(slope.T @ gram @ slope)[1][:, -rank:]
        missed = (inputs[:held].double() - mean) @ slope @ leading @ leading.T + centre - values[:held]
        found.append((float(missed.square().sum()), slope @ leading, leading))
    _, into, onto = min(found, key=lambda one: one[0])
    down, up = nn.Linear(*into.shape, bias=False), nn.Linear(len(onto.T), len(onto))
    with torch.no_grad():
        for target, source in ((down.weight, into.T), (up.weight, onto), (up.bias, centre - mean @ into @ onto.T)):
            target.copy_(source)
    return nn.Sequential(down, up)


def truncated(layer: nn.Linear, rank: int, inputs: Tensor) -> nn.Sequential:
    """Return a linear layer at a rank by data-aware SVD: what it errs least by on these inputs."""
    moment = (inputs.T @ inputs / len(inputs)).double()
    weight = layer.weight.detach().double()
    left, right = rf.decompose.svd(weight, rank, second_moment=moment).balanced()
    down, up = nn.Linear(len(right.T), rank, bias=False), nn.Linear(rank, len(left))
    # what the truncation takes away on average goes into the bias
    bias = layer.bias.detach().double() + (weight - left @ right) @ inputs.double().mean(0)
    with torch.no_grad():
        for target, source in ((down.weight, right), (up.weight, left), (up.bias, bias)):
            target.copy_(source)
    return nn.Sequential(down, up)


def regression(block: nn.Module, inputs: Tensor, values: Tensor, *, seed: int, passes: int) -> nn.Module:
    """Fit a block to values in place, by AdamW with a cosine schedule on the squared error, and return it."""
    variance = float((values - values.mean(0)).square().mean())
    recipe = rf.train.Recipe(
        loss=lambda got, wanted: F.mse_loss(got, wanted) / variance, decay=0.0, clip=math.inf, progress=False
    )
    rf.train.fit(block, Batches(inputs, values, seed=seed, size=256), epochs=passes, lr=RATE, recipe=recipe)
    return block
