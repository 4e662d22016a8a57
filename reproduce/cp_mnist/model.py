"""The network of Ganzha and Shaposhnikova 2021, Table 1: two 3×3 convolutions with 10 filters, two linear layers."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

import rankfold as rf

CONVOLUTIONS = ("conv1", "conv2")
FILTERS, HIDDEN = 10, 128
MEAN, STD = 0.1307, 0.3081  # of the pixels of the training images


def network(rank: int | None = None) -> nn.Sequential:
    """Return the base network, or with a rank the one whose two convolutions are CP layers of this rank."""
    conv = nn.Conv2d if rank is None else partial(rf.layers.CPConv2d, rank=rank, separable=True)
    layers = {
        "conv1": conv(1, FILTERS, 3),
        "relu1": nn.ReLU(),
        "conv2": conv(FILTERS, FILTERS, 3),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "hidden": nn.Linear(FILTERS * 24 * 24, HIDDEN),
        "relu3": nn.ReLU(),
        "output": nn.Linear(HIDDEN, 10),
    }
    # With ten channels the order (height, width, channels) in memory is the faster one on a CPU, for dense and CP.
    return nn.Sequential(OrderedDict(layers)).to(memory_format=torch.channels_last)


def draw_stages_(model: nn.Sequential) -> None:
    """Draw the values of every stage of the CP layers anew as torch draws those of a convolution that stands alone."""
    for layer in CONVOLUTIONS:
        for stage in model.get_submodule(layer).children():
            stage.reset_parameters()


def convolution_weights(model: nn.Sequential) -> int:
    """Return how many weights the two convolutions hold, biases left out."""
    return sum(
        parameter.numel()
        for layer in CONVOLUTIONS
        for name, parameter in model.get_submodule(layer).named_parameters()
        if name.endswith("weight")
    )


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images (batch, 1, 28, 28) as the network takes them."""
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)
