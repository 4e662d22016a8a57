"""The network of Novikov et al. 2015 with 262,144 hidden units, and dense ones with as many parameters."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

import rankfold as rf

IN_FEATURES, HIDDEN, NARROW, CLASSES = 3_072, 262_144, 4_096, 10
IN_SHAPE, HIDDEN_SHAPE, NARROW_SHAPE = (4, 4, 4, 4, 4, 3), (8,) * 6, (4,) * 6


def wide(rank: int) -> nn.Sequential:
    """Return the network of two tensor trains of one rank, without bias, with BatchNorm after each."""
    first = rf.layers.TTLinear(IN_FEATURES, HIDDEN, bias=False, rank=rank, in_shape=IN_SHAPE, out_shape=HIDDEN_SHAPE)
    second = rf.layers.TTLinear(HIDDEN, NARROW, bias=False, rank=rank, in_shape=HIDDEN_SHAPE, out_shape=NARROW_SHAPE)
    return nn.Sequential(
        OrderedDict(
            tt1=first,
            norm1=nn.BatchNorm1d(HIDDEN),
            relu1=nn.ReLU(),
            tt2=second,
            norm2=nn.BatchNorm1d(NARROW),
            relu2=nn.ReLU(),
            output=nn.Linear(NARROW, CLASSES),
        )
    )


def dense(hidden: int) -> nn.Sequential:
    """Return a dense network of one hidden layer, with BatchNorm after it."""
    return nn.Sequential(
        OrderedDict(
            hidden=nn.Linear(IN_FEATURES, hidden, bias=False),
            norm=nn.BatchNorm1d(hidden),
            relu=nn.ReLU(),
            output=nn.Linear(hidden, CLASSES),
        )
    )


def equal_width(params: int) -> int:
    """Return the width of the dense network whose number of parameters is nearest to this one."""
    return round((params - CLASSES) / (IN_FEATURES + 2 + CLASSES))


def standardised(images: Tensor, like: Tensor) -> Tensor:
    """Return uint8 images (batch, 3, 32, 32) as rows, each pixel by its mean and deviation over the images `like`.

    The channel comes last, as in `IN_SHAPE`.
    """
    deviation, mean = torch.std_mean(like.float(), dim=0)
    return ((images - mean) / deviation).permute(0, 2, 3, 1).flatten(1)
